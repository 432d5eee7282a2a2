"""One visible training loop for classifiers and decoders.

It shows progress, validates, and can be killed at any moment: a run that is started again from its checkpoint ends with the same
weights, bit for bit on the CPU, because every random number is a function of (seed, epoch, step).

    trainer = Trainer(model, step_function, torch.optim.Adam(model.parameters()), checkpoint="run.pt")
    history = trainer.fit(loader, epochs=2, validation=other)       # {"loss": [...], "val_loss": [...], ...}

A task is one function, ``step_function(batch, training) -> (loss, outputs, target)``: the mean loss of a batch, and what the
metrics compare, with one row per image.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from operator import length_hint
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scanlib.training import distributed
from scanlib.training.checkpoint import check_writable, is_plain, is_same, load_checkpoint, load_state, save_checkpoint
from scanlib.training.interrupts import delay_interrupts
from scanlib.training.metrics import Accuracy as Accuracy, Totals
from scanlib.training.randomness import isolated_rng, iterate_seeded_batches


def build_classifier_step(model: nn.Module, preprocess: Callable[[Tensor], Tensor], device="cpu") -> Callable:
    """Return the step function of a classifier: cross-entropy of batches (images in [0, 255], labels)."""

    def step(batch, training):
        images, labels = batch[0].to(device), batch[1].to(device)
        logits = model(preprocess(images))
        return nn.functional.cross_entropy(logits, labels), logits, labels

    return step


class _StepModule(nn.Module):
    """A step function as a module. DDP averages the gradients of its own forward; a step may call any method of the model."""

    def __init__(self, model: nn.Module, step_function: Callable):
        super().__init__()
        self.model, self.step_function = model, step_function

    def forward(self, batch, training: bool):
        # DDP waits for all gradients in every process: those of unused parameters and of an empty share are zero
        zero = 0.0 * sum(parameter.sum() for parameter in self.model.parameters() if parameter.requires_grad)
        if batch is None:
            return zero, None, ()
        loss, outputs, target = self.step_function(batch, training)
        return loss + zero, outputs, target


class Trainer:
    """Trains ``model`` with ``step_function(batch, training) -> (loss, outputs, target)``.

    Args:
        model, step_function, optimizer: the module, its loss on a batch, and the optimizer of its parameters.
        scheduler: a learning rate scheduler; it steps once per ``scheduler_interval``, "epoch" or "step".
        metrics: objects with reset(), update(preds, target), compute(), named by their class in the history; see ``Totals``.
        checkpoint: file to resume from, and to save to at the end of each epoch and every ``save_every`` seconds.
        config: plain values that must agree for a checkpoint to be resumed.
        amp: run the step in bfloat16 autocast.
        on_step: called with the trainer after each training step. Its ``epoch`` counts finished epochs, its ``step`` the
            finished steps of the current epoch, and its ``loss`` is that of the last step.

    With several processes, give ``fit`` loaders from ``shard_loader``. The main process prints, and saves at each epoch's end.
    """

    def __init__(
        self,
        model: nn.Module,
        step_function: Callable,
        optimizer: torch.optim.Optimizer,
        scheduler=None,
        *,
        scheduler_interval: str = "epoch",
        metrics: Sequence = (),
        device: torch.device | str = "cpu",
        checkpoint: str | os.PathLike | None = None,
        config: dict | None = None,
        seed: int = 0,
        amp: bool = False,
        save_every: float = 30.0,
        on_step: Callable[["Trainer"], None] | None = None,
    ):
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval must be 'epoch' or 'step', got {scheduler_interval!r}")
        self.model, self.step_function, self.optimizer, self.scheduler = model, step_function, optimizer, scheduler
        self.scheduler_interval, self.metrics, self.device = scheduler_interval, list(metrics), torch.device(device)
        self.checkpoint, self.config, self.seed = checkpoint, dict(config or {}), seed
        self.amp, self.save_every, self.on_step = amp, save_every, on_step
        self.epoch, self.step, self.loss = 0, 0, math.nan
        self.history: dict[str, list[float]] = {}
        self._first_epoch = 0  # of the current fit; an interrupted fit keeps it for the next call
        self._totals = Totals(self.metrics)  # of the current epoch
        self._source: Iterable = ()  # of the batches of the current epoch
        self._has_failed = False

    def fit(
        self, loader: Iterable, epochs: int, validation: Iterable | None = None, verbose: bool = True
    ) -> dict[str, list[float]]:
        """Train for ``epochs`` more epochs. After an interruption, or with a checkpoint on disk, train only what is left of them.

        Returns this fit's history: one value per epoch for "loss" and each metric, and with ``validation`` for "val_" + name.
        Raises ValueError for an empty loader or a checkpoint of another run, FloatingPointError for a loss that is not finite.
        """
        if not 1 <= epochs < math.inf or epochs != int(epochs):
            raise ValueError(f"epochs must be an integer of at least 1, got {epochs}")
        first, goal = self._first_epoch, self._first_epoch + int(epochs)
        verbose = verbose and distributed.is_main_process()
        source = getattr(loader, "source", loader)  # encoded batches are built anew for each fit
        if source is not self._source and (self._has_failed or length_hint(source) != length_hint(self._source)):
            self.step = 0  # an epoch on other data begins anew
        self._source, self._has_failed = source, False
        try:
            with distributed.main_process_first():  # it may still be writing the checkpoint of the last fit
                self._resume(verbose)
            if distributed.all_reduce_sum([self.epoch])[0] != self.epoch * distributed.get_world_size():
                raise ValueError(f"checkpoint must be on a disk that all processes read; some do not find {self.checkpoint}")
            run_step = self.step_function
            if distributed.is_distributed():  # this copies the weights of the main process to the others
                run_step = DistributedDataParallel(_StepModule(self.model, self.step_function))
            while self.epoch < goal:
                self._train_epoch(run_step, loader, goal, verbose)
                results = self._totals.compute("loader")
                if validation is not None:
                    results |= self._validate(run_step, validation)
                with delay_interrupts():
                    self._finish_epoch(results)
                if verbose:
                    latest = "  ".join(f"{name} {values[-1]:.4f}" for name, values in self.history.items())
                    print(f"epoch {self.epoch}/{goal}: {latest}")
        except Exception:  # an error, not an interruption: the next fit counts its epochs from here
            self._first_epoch, self._has_failed = self.epoch, True
            raise
        self._first_epoch = self.epoch
        prefix = "val_" if validation is None else None  # an earlier fit may have validated
        return {name: values[first - goal :] for name, values in self.history.items() if name[:4] != prefix}

    def _train_epoch(self, run_step, loader, goal, verbose):
        from tqdm.auto import tqdm

        if self.step == 0:
            self._totals = Totals(self.metrics)
        total = length_hint(loader) or None  # a stream has no length
        bar = tqdm(total=total, desc=f"epoch {self.epoch + 1}/{goal}", disable=not verbose, leave=False)
        saved = time.monotonic()
        with bar, isolated_rng():
            for count, batch in enumerate(iterate_seeded_batches(loader, self.seed, self.epoch), 1):
                if count > self.step:  # the steps before were done before the run was killed
                    with delay_interrupts():  # the step and its counter are one
                        self._train_step(run_step, batch)
                    bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
                    if self.on_step is not None:
                        self.on_step(self)
                    if time.monotonic() - saved > self.save_every and not distributed.is_distributed():
                        self._save()
                        saved = time.monotonic()
                bar.update()

    def _train_step(self, run_step, batch):
        self.model.train()  # on_step may have changed the mode
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss, outputs, target = run_step(batch, True)
        own_loss, own_images = float(loss.detach()), len(target)
        loss_sum, images = distributed.all_reduce_sum([own_loss * own_images, own_images])
        self.loss = loss_sum / images
        self._check_finite("loss", self.loss, f"epoch {self.epoch + 1}, step {self.step + 1}")
        # DDP takes the mean over processes; this weight, 1 for one process, makes it the mean over the images of the batch
        (loss * (distributed.get_world_size() * own_images / images)).backward()
        self.optimizer.step()
        if self.scheduler_interval == "step":
            self._step_scheduler()
        self._totals.update(own_loss, outputs, target)
        self.step += 1

    @torch.no_grad()
    def _validate(self, run_step, loader):
        self.model.eval()
        totals = Totals(copy.deepcopy(self.metrics))  # the metrics of training keep their state
        with isolated_rng():
            # DDP copies the buffers of the main process before the first batch: every process validates what that one saves
            for batch in iterate_seeded_batches(loader, self.seed, self.epoch):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                    loss, outputs, target = run_step(batch, False)
                totals.update(float(loss), outputs, target)
        results = totals.compute("validation")
        self._check_finite("validation loss", results["loss"], f"epoch {self.epoch + 1}")
        return {f"val_{name}": value for name, value in results.items()}

    def _check_finite(self, name, value, location):
        if not math.isfinite(value):
            rate = self.optimizer.param_groups[0]["lr"]
            advice = f"start from new weights with a learning rate below {rate:.1g}, or without amp"
            raise FloatingPointError(f"the {name} became {value} in {location}; {advice}")

    def _finish_epoch(self, results):
        for name, value in results.items():
            self.history.setdefault(name, []).append(value)
        if self.scheduler_interval == "epoch":
            self._step_scheduler()
        self.epoch, self.step = self.epoch + 1, 0
        self._save()

    def _step_scheduler(self):
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            losses = self.history.get("val_loss") or self.history.get("loss") or [self.loss]
            self.scheduler.step(losses[-1])
        elif self.scheduler is not None:
            self.scheduler.step()

    def _save(self):
        if self.checkpoint is None or not distributed.is_main_process():
            return
        sums = [self._totals.loss, self._totals.images]
        content = {
            "format": 1,
            "kind": "training run",
            "config": self.config,
            "progress": {"epoch": self.epoch, "step": self.step, "sums": sums, "history": self.history, "seed": self.seed},
            "metrics": [vars(metric) for metric in self.metrics],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
        }
        save_checkpoint(content, self.checkpoint)

    def _resume(self, verbose):
        if self.checkpoint is None:
            return
        if not Path(self.checkpoint).exists():
            check_writable(self.checkpoint)
            return
        required = ("config", "progress", "metrics", "model", "optimizer", "scheduler")
        saved = load_checkpoint(self.checkpoint, required, self.device)
        own = copy.deepcopy([part and part.state_dict() for part in (self.model, self.optimizer, self.scheduler)])
        started = self.epoch, self.step
        try:
            with delay_interrupts():
                self._load(saved)
        except BaseException as error:
            for part, state in zip((self.model, self.optimizer, self.scheduler), own, strict=True):
                if part:
                    part.load_state_dict(state)  # a refused checkpoint changes nothing
            if str(self.checkpoint) in str(error) or not isinstance(error, Exception):
                raise
            reason = type(error).__name__
            raise ValueError(f"{self.checkpoint} is not a checkpoint of this kind of run ({reason}); delete it") from error
        if verbose and (self.epoch, self.step) != started:
            print(f"{self.checkpoint}: continuing after {self.epoch} epochs and {self.step} steps")

    def _load(self, saved: dict):
        progress = saved["progress"]
        ours, theirs = self.config | {"seed": self.seed}, saved["config"] | {"seed": progress["seed"]}
        for name in ours | theirs:
            if not is_same(ours.get(name), theirs.get(name)):
                message = f"{self.checkpoint} is of a run with {name} = {theirs.get(name)}, this one has {ours.get(name)}"
                raise ValueError(f"{message}; delete it or give another path")
        counts, history = [progress["epoch"], progress["step"]], progress["history"]
        if len(saved["metrics"]) != len(self.metrics) or not all(type(count) is int and count >= 0 for count in counts):
            raise KeyError("metrics or progress")
        if not is_plain(progress) or any(len(values) > counts[0] for values in history.values()):
            raise KeyError("progress")
        if counts[0] < self.epoch:
            return  # this trainer has trained for longer
        load_state(self.model, saved["model"], self.checkpoint)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        (self.epoch, self.step), self.history = counts, history
        self._totals = Totals(self.metrics)
        if distributed.is_main_process():  # the other processes have nothing to add to the sums of a single one
            self._totals.loss, self._totals.images = progress["sums"]
            for index, metric in enumerate(self.metrics):
                vars(metric).update(saved["metrics"][index])
