"""One visible training loop, for classifiers and decoders alike.

It shows progress, validates, and can be killed at any moment: a run that is started again from its checkpoint ends with the same
weights, bit for bit on the CPU. That holds because everything random is a function of (seed, epoch, step): the generators
are seeded anew before each batch is drawn, and the caller's own random state is left alone. (torch's, numpy's and Python's
generators; a data set with one of its own has to see to itself.)

    trainer = Trainer(model, step, torch.optim.Adam(model.parameters()), checkpoint="run.pt")
    history = trainer.fit(loader, epochs=2, validation=other)       # {"loss": [...], "val_loss": [...], ...}

where ``step(batch, training) -> (loss, outputs, target)`` is the one thing a task has to say.
"""

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from scanlib.layers import get_logits
from scanlib.training import distributed
from scanlib.training.checkpoint import load_checkpoint, save_checkpoint
from scanlib.training.randomness import isolated_rng, iterate_seeded_batches


class Accuracy:
    """Share of images whose largest logit is the label's."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.right = self.seen = 0

    @torch.no_grad()
    def update(self, target: Tensor, outputs) -> None:
        """Labels (B,), and logits (B, K) or what ``get_logits`` finds them in."""
        self.right += int((get_logits(outputs).argmax(1) == target).sum())
        self.seen += len(target)

    def compute(self) -> float:
        return self.right / self.seen if self.seen else math.nan


def build_classifier_step(model: nn.Module, preprocess: Callable[[Tensor], Tensor], device="cpu"):
    """The step of a classifier: cross-entropy of (images in [0, 255], labels)."""

    def step(batch, training):
        images, labels = batch[0].to(device), batch[1].to(device)
        logits = model(preprocess(images))
        return nn.functional.cross_entropy(logits, labels), logits, labels

    return step


def detach_outputs(outputs):
    """A step's outputs without their graph: a tensor, or a tuple of them."""
    if isinstance(outputs, Tensor):
        return outputs.detach()
    return getattr(type(outputs), "_make", type(outputs))([output.detach() for output in outputs])


class Trainer:
    """Trains ``model`` with ``step(batch, training) -> (loss, outputs, target)``.

    Args:
        model, step, optimizer: what is trained, what one batch means, and how the weights move.
        scheduler: stepped once per ``scheduler_interval``, "epoch" or "step".
        metrics: objects with reset(), update(target, outputs), compute(); named by their class in the history. Their attributes
            are sums, so that those of several processes add up.
        checkpoint: file to save to, at each epoch's end and every ``save_every`` seconds, and to resume from.
        config: plain values that must agree for a checkpoint to be resumed.
        amp: run the step in bfloat16 autocast.
        on_step: called with the trainer after each training step (``epoch``, ``step``, ``loss`` tell where it is).

    Among several processes (``scanlib.distributed``) each ``fit`` takes a loader of its own share, ``shared(loader)``; the first
    process prints and saves, at each epoch's end only.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable,
        optimizer: torch.optim.Optimizer,
        scheduler=None,
        *,
        scheduler_interval: str = "epoch",
        metrics: Sequence = (),
        device: torch.device | str = "cpu",
        checkpoint: str | Path | None = None,
        config: dict | None = None,
        seed: int = 0,
        amp: bool = False,
        save_every: float = 30.0,
        on_step: Callable[["Trainer"], None] | None = None,
    ):
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval {scheduler_interval!r} is not known; take 'epoch' or 'step'")
        self.model, self.one_step, self.optimizer, self.scheduler = model, step, optimizer, scheduler
        self.scheduler_interval, self.metrics, self.device = scheduler_interval, list(metrics), torch.device(device)
        self.checkpoint, self.config, self.seed = checkpoint, dict(config or {}), seed
        self.amp, self.save_every, self.on_step = amp, save_every, on_step
        self._start: int | None = None  # the epoch at which an unfinished fit began
        self.epoch = self.step = 0  # finished epochs; finished steps of the current one
        self.loss = math.nan
        self.history: dict[str, list[float]] = {}
        self._sums = [0.0, 0]  # loss and images of the current epoch

    # --- the loop ---

    def fit(
        self, loader: Iterable, epochs: int, validation: Iterable | None = None, verbose: bool = True
    ) -> dict[str, list[float]]:
        """Train for ``epochs`` more epochs; after an interruption, or with a checkpoint on disk, only for what is left of them.

        Returns this fit's history: one value an epoch for "loss" and each metric, and "val_" of both with ``validation``.
        Raises ValueError for an empty loader or a checkpoint of another run, FloatingPointError for a loss that is not finite.
        """
        if epochs != int(epochs) or epochs < 1:
            raise ValueError(f"epochs {epochs} is no number of epochs; give 1 or more")
        if self._start is None:  # else: the last call was interrupted, and this one goes on from there
            self._start = self.epoch
        goal = self._start + int(epochs)
        verbose = verbose and distributed.is_main_process()
        try:
            self._resume()
            if distributed.all_reduce_sum([self.epoch], self.device)[0] != self.epoch * distributed.get_world_size():
                raise ValueError(f"the processes do not find the same {self.checkpoint}; put it on a disk that all of them see")
            distributed.same_start([*self.model.parameters(), *self.model.buffers()])
            while self.epoch < goal:
                self._train_epoch(loader, goal, verbose)
                distributed.average_statistics(self.model)
                validated = self._validate(validation) if validation is not None else None
                self._finish_epoch(validated)
                self._save()
                if verbose:
                    latest = "  ".join(f"{name} {values[-1]:.4f}" for name, values in self.history.items())
                    print(f"epoch {self.epoch}/{goal}: {latest}")
        except Exception:  # an error, not an interruption: there is nothing to go on with
            self._start = None
            raise
        begun, self._start = self._start, None
        return {name: values[begun:] for name, values in self.history.items()}

    def _train_epoch(self, loader, goal, verbose):
        from tqdm.auto import tqdm

        try:
            total = len(loader)
        except (TypeError, NotImplementedError):  # a stream has no length
            total = None
        bar = tqdm(total=total, desc=f"epoch {self.epoch + 1}/{goal}", disable=not verbose, leave=False)
        saved, count = time.monotonic(), 0
        with bar, isolated_rng(self.device):
            for count, batch in enumerate(iterate_seeded_batches(loader, self.seed, self.epoch), 1):
                if count > self.step:  # else: done before the run was killed
                    self._train_step(batch)
                    bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
                    if self.on_step is not None:
                        self.on_step(self)
                    if time.monotonic() - saved > self.save_every and not distributed.is_distributed():
                        self._save()
                        saved = time.monotonic()
                bar.update()
        if not count:
            raise ValueError("the loader is empty; give it at least one batch (with drop_last, at least batch_size pictures)")

    def _train_step(self, batch):
        self.model.train()  # whatever on_step or the step of another task left it in
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss, outputs, target = self.one_step(batch, True) if batch is not None else (None, None, ())
        own = float(loss.detach()) if len(target) else 0.0
        total, pictures = distributed.all_reduce_sum([own * len(target), len(target)], self.device)
        self.loss = total / pictures if distributed.is_distributed() else own
        if not math.isfinite(self.loss):
            rate = self.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"the loss became {self.loss} in epoch {self.epoch + 1}, step {self.step + 1}; "
                f"start from new weights with a learning rate below {rate:.1g}, or without amp"
            )
        if len(target):
            loss.backward()
        distributed.sum_gradients(self.model, len(target) / pictures)
        self.optimizer.step()
        if self.scheduler is not None and self.scheduler_interval == "step":
            self._step_scheduler()
        self._tally(self._sums, self.metrics, outputs, target, own)
        self.step += 1

    @torch.no_grad()
    def _validate(self, loader):
        """Sums and metrics over a loader, in eval mode, with metrics of its own so that the training ones stay."""
        self.model.eval()
        sums, metrics = [0.0, 0], copy.deepcopy(self.metrics)
        for metric in metrics:
            metric.reset()
        with isolated_rng(self.device):
            for batch in iterate_seeded_batches(loader, self.seed, self.epoch):
                if batch is None:  # other processes have what is left
                    continue
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                    loss, outputs, target = self.one_step(batch, False)
                self._tally(sums, metrics, outputs, target, float(loss))
        sums = self._of_all(sums, metrics)
        if sums[1] and not math.isfinite(sums[0]):
            value, epoch = sums[0] / sums[1], self.epoch + 1
            raise FloatingPointError(
                f"the validation loss became {value} in epoch {epoch}; start from new weights with a smaller learning rate"
            )
        if not sums[1]:
            raise ValueError("the validation loader is empty; give it at least one batch, or leave it out")
        return sums, metrics

    def _tally(self, sums, metrics, outputs, target, loss):
        sums[0] += loss * len(target)
        sums[1] += len(target)
        for metric in metrics if len(target) else ():
            metric.update(target, detach_outputs(outputs))

    def _of_all(self, sums, metrics):
        """Sums over all processes, and the metrics' too, in place."""
        if distributed.is_distributed():
            for metric in metrics:
                names = list(vars(metric))
                vars(metric).update(
                    zip(names, distributed.all_reduce_sum([vars(metric)[n] for n in names], self.device), strict=True)
                )
        return distributed.all_reduce_sum(sums, self.device)

    def _finish_epoch(self, validated):
        self._record("", self._of_all(self._sums, self.metrics), self.metrics)
        if validated is not None:
            self._record("val_", *validated)
        if self.scheduler is not None and self.scheduler_interval == "epoch":
            self._step_scheduler()
        self.epoch, self.step, self._sums = self.epoch + 1, 0, [0.0, 0]
        for metric in self.metrics:
            metric.reset()

    def _record(self, prefix, sums, metrics):
        self.history.setdefault(f"{prefix}loss", []).append(sums[0] / sums[1])
        for metric in metrics:
            self.history.setdefault(f"{prefix}{type(metric).__name__}", []).append(metric.compute())

    def _step_scheduler(self):
        wants_value = "metrics" in inspect.signature(self.scheduler.step).parameters  # ReduceLROnPlateau
        losses = self.history.get("val_loss") or self.history.get("loss") or [self.loss]
        self.scheduler.step(losses[-1]) if wants_value else self.scheduler.step()

    # --- stop and go ---

    def _save(self):
        if self.checkpoint is None or not distributed.is_main_process():
            return
        content = {
            "format": 1,
            "kind": "training run",
            "config": self.config,
            "progress": {"epoch": self.epoch, "step": self.step, "sums": self._sums, "history": self.history, "seed": self.seed},
            "metrics": [vars(metric) for metric in self.metrics],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
        }
        save_checkpoint(content, self.checkpoint)

    def _resume(self):
        distributed.wait_for_all()  # for what the first process may still be writing
        if self.checkpoint is None or not Path(self.checkpoint).exists():
            return
        saved = load_checkpoint(
            self.checkpoint, ("config", "progress", "metrics", "model", "optimizer", "scheduler"), self.device
        )
        try:
            self._load(saved)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"{self.checkpoint} is no checkpoint of this kind of run ({type(error).__name__}); delete it"
            ) from error

    def _load(self, saved: dict):
        ours = {**self.config, "seed": self.seed}
        theirs = {**saved["config"], "seed": saved["progress"]["seed"]}
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"{self.checkpoint} is of a run with {name} = {theirs.get(name)}, this one has {ours.get(name)}; "
                    "delete it or give another path"
                )
        if saved["progress"]["epoch"] < self.epoch:
            return  # older than what this trainer has already done
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        if len(saved["metrics"]) != len(self.metrics):
            raise KeyError("metrics")
        for metric, state in zip(self.metrics, saved["metrics"], strict=True):
            vars(metric).update(state)
        progress = saved["progress"]
        self.epoch, self.step, self._sums, self.history = (progress[name] for name in ("epoch", "step", "sums", "history"))
        if not distributed.is_main_process():  # the sums of a run that was alone count once
            self._sums = [0.0, 0]
            for metric in self.metrics:
                metric.reset()
