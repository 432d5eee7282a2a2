import itertools
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scanlib.trainer import Accuracy, Trainer, build_classifier_step
from scanlib.training.checkpoint import load_checkpoint


class Killed(BaseException):
    """Stands in for a kill: not an Exception, so nothing may catch it."""


def build_data(count=40):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(count, 3, 8, 8, generator=generator)
    return TensorDataset(x, (x[:, 0].mean((1, 2)) > x[:, 1].mean((1, 2))).long())


def build_trainer(checkpoint=None, seed=0, lr=0.01, dropout=0.3, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, 200)
    return Trainer(
        model,
        build_classifier_step(model, lambda x: x),
        optimizer,
        scheduler,
        scheduler_interval="step",
        metrics=[Accuracy()],
        checkpoint=checkpoint,
        seed=seed,
        config={"lr": lr},
        **options,
    )


def build_loader(**options):
    return DataLoader(build_data(), batch_size=8, shuffle=True, **options)


def test_fit_learns_and_returns_its_history():
    trainer = build_trainer(dropout=0.0)
    history = trainer.fit(build_loader(), 20, validation=DataLoader(build_data(), 16), verbose=False)
    assert set(history) == {"loss", "Accuracy", "val_loss", "val_Accuracy"} and all(
        len(values) == 20 for values in history.values()
    )
    assert history["loss"][-1] < history["loss"][0] / 2 and history["val_Accuracy"][-1] > 0.9
    # the validation values are those of the model in eval mode, computed by hand
    model, (x, y) = trainer.model.eval().requires_grad_(False), build_data().tensors
    assert history["val_loss"][-1] == pytest.approx(float(nn.functional.cross_entropy(model(x), y)), rel=1e-5)


@pytest.mark.parametrize("kill_at", [1, 3, 5, 7, 12])
@pytest.mark.parametrize("generator", [False, True])
def test_killed_and_restarted_run_ends_bit_for_bit_the_same(tmp_path, kill_at, generator):
    options = lambda: {"generator": torch.Generator().manual_seed(5)} if generator else {}  # noqa: E731
    whole = build_trainer()
    history = whole.fit(build_loader(**options()), 3, validation=DataLoader(build_data(), 16), verbose=False)

    count = itertools.count(1)

    def kill(trainer):
        if next(count) == kill_at:
            raise Killed

    killed = build_trainer(
        tmp_path / "run.pt", save_every=0, on_step=kill
    )  # saved after each step, killed before this one is saved
    with pytest.raises(Killed):
        killed.fit(build_loader(**options()), 3, validation=DataLoader(build_data(), 16), verbose=False)
    torch.manual_seed(999)  # a new process has another random state
    resumed = build_trainer(tmp_path / "run.pt")
    assert resumed.fit(build_loader(**options()), 3, validation=DataLoader(build_data(), 16), verbose=False) == history
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    for ours, theirs in zip(
        whole.optimizer.state_dict()["state"].values(), resumed.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])


def test_finished_run_is_not_trained_again(tmp_path):
    first = build_trainer(tmp_path / "run.pt")
    history = first.fit(build_loader(), 2, verbose=False)
    steps = []
    second = build_trainer(tmp_path / "run.pt", on_step=steps.append)
    assert second.fit(build_loader(), 2, verbose=False) == history and not steps
    second.fit(build_loader(), 1, verbose=False)  # trains one more epoch
    assert len(steps) == 5 and second.epoch == 3


def test_fit_raises_for_the_checkpoint_of_another_run(tmp_path):
    build_trainer(tmp_path / "run.pt").fit(build_loader(), 1, verbose=False)
    with pytest.raises(ValueError, match=r"run.pt is of a run with lr = 0.01, this one has 0.1; delete it"):
        build_trainer(tmp_path / "run.pt", lr=0.1).fit(build_loader(), 1, verbose=False)
    with pytest.raises(ValueError, match="seed = 0, this one has 7"):
        build_trainer(tmp_path / "run.pt", seed=7).fit(build_loader(), 1, verbose=False)


def test_random_state_of_the_caller_is_unchanged():
    trainer, batches = build_trainer(), build_loader()
    before = torch.get_rng_state()
    trainer.fit(batches, 1, verbose=False)
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_differ_between_steps_and_epochs():
    seen = []
    model = nn.Linear(2, 2)

    def step(batch, training):
        seen.append(torch.rand(()).item())
        return model(batch[0]).sum(), batch[0], batch[0]

    Trainer(model, step, torch.optim.SGD(model.parameters(), 0.01)).fit([(torch.rand(2, 2),)] * 4, 3, verbose=False)
    assert len(set(seen)) == 12


def test_fit_raises_for_a_non_finite_loss_before_the_weights_change():
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    step = lambda batch, training: (model(batch[0]).sum() * float("nan"), batch[0], batch[0])  # noqa: E731
    with pytest.raises(
        FloatingPointError, match="became nan in epoch 1, step 1; start from new weights with a learning rate below 0.1"
    ):
        Trainer(model, step, torch.optim.SGD(model.parameters(), 0.1)).fit([(torch.rand(2, 2),)], 1, verbose=False)
    assert torch.equal(model.weight, before)


def test_numpy_and_python_draws_resume(tmp_path):
    import random

    import numpy as np

    def run(checkpoint=None, kill=None):
        drawn = []
        model = nn.Linear(2, 2)

        class Drawing(torch.utils.data.Dataset):
            def __len__(self):
                return 6

            def __getitem__(self, index):
                drawn.append((random.random(), np.random.rand()))
                return torch.rand(2)

        def on_step(trainer):
            trainer.save_every = 0
            if trainer.epoch == 1 and trainer.step == kill:
                raise Killed

        step = lambda batch, training: (model(batch).sum(), batch, batch)  # noqa: E731
        trainer = Trainer(model, step, torch.optim.SGD(model.parameters(), 0.01), checkpoint=checkpoint, on_step=on_step)
        try:
            trainer.fit(DataLoader(Drawing(), 2, shuffle=True), 2, verbose=False)
        except Killed:
            random.seed(99)
        return drawn

    state = random.getstate()
    whole = run()
    assert random.getstate() == state
    run(tmp_path / "run.pt", kill=2)
    assert run(tmp_path / "run.pt") == whole[6:]


def test_next_fit_finishes_an_interrupted_one_but_not_a_failed_one(tmp_path):
    def interrupt(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    trainer = build_trainer()
    trainer.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(build_loader(), 3, verbose=False)
    trainer.on_step = None
    assert len(trainer.fit(build_loader(), 3, verbose=False)["loss"]) == 3 and trainer.epoch == 3
    assert len(trainer.fit(build_loader(), 2, verbose=False)["loss"]) == 2 and trainer.epoch == 5
    with pytest.raises(ValueError, match="loader must have at least one batch, got none"):
        trainer.fit([], 4, verbose=False)
    trainer.fit(build_loader(), 1, verbose=False)
    assert trainer.epoch == 6
    for epochs in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"epochs must be an integer of at least 1, got {epochs}"):
            trainer.fit(build_loader(), epochs)


class Count:
    """Number of images since the last reset; a stored output must have no graph."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.seen = 0

    def update(self, preds, target):
        assert preds.shape == (len(target), 2) and not preds.requires_grad and not target.is_floating_point()
        self.seen += len(target)

    def compute(self):
        return self.seen


def test_metrics_are_reset_each_epoch_and_separate_from_validation():
    trainer = build_trainer()
    trainer.metrics = [Count()]
    history = trainer.fit(build_loader(), 3, validation=[build_data(12).tensors], verbose=False)
    assert history["Count"] == [40, 40, 40] and history["val_Count"] == [12, 12, 12]


def test_fit_raises_one_line_for_a_damaged_checkpoint(tmp_path):
    build_trainer(tmp_path / "run.pt").fit(build_loader(), 1, verbose=False)
    content = load_checkpoint(tmp_path / "run.pt")
    for key, value in (("progress", 3), ("config", 3), ("metrics", []), ("model", 3), ("optimizer", 3)):
        torch.save(content | {key: value}, tmp_path / "bad.pt")
        kinds = "bad.pt (is not a checkpoint of this kind of run|is of a run with|must hold a state dict)"
        with pytest.raises(ValueError, match=kinds) as raised:
            build_trainer(tmp_path / "bad.pt").fit(build_loader(), 1, verbose=False)
        assert "\n" not in str(raised.value)


def test_fit_raises_for_a_non_finite_validation_loss():
    model = nn.Linear(2, 2)
    step = lambda batch, training: (model(batch[0]).sum() * (1 if training else float("inf")), batch[0], batch[0])  # noqa: E731
    with pytest.raises(FloatingPointError, match="the validation loss became (-?inf|nan) in epoch 1"):
        batches = [(torch.rand(2, 2),)]
        Trainer(model, step, torch.optim.SGD(model.parameters(), 0.1)).fit(batches, 1, validation=batches, verbose=False)


def test_fit_raises_for_empty_loaders():
    with pytest.raises(ValueError, match="loader must have at least one batch, got none"):
        build_trainer().fit([], 1, verbose=False)
    with pytest.raises(ValueError, match="validation must have at least one batch, got none"):
        build_trainer().fit(build_loader(), 1, validation=[], verbose=False)


def test_plateau_scheduler_and_epoch_interval():
    trainer = build_trainer()
    trainer.scheduler, trainer.scheduler_interval = (
        torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.optimizer, patience=0, threshold=1e9),
        "epoch",
    )
    trainer.fit(build_loader(), 3, verbose=False)
    assert trainer.optimizer.param_groups[0]["lr"] < 0.001
    with pytest.raises(ValueError, match="scheduler_interval must be 'epoch' or 'step', got 'batch'"):
        Trainer(nn.Linear(1, 1), None, None, scheduler_interval="batch")


def test_amp_runs_in_bfloat16():
    kinds = []
    model = nn.Linear(4, 2)

    def step(batch, training):
        out = model(batch[0])
        kinds.append(out.dtype)
        return out.float().sum(), out, batch[0]

    Trainer(model, step, torch.optim.SGD(model.parameters(), 0.01), amp=True).fit([(torch.rand(2, 4),)], 1, verbose=False)
    assert kinds == [torch.bfloat16]


def get_weights(trainer):
    return torch.cat([value.double().flatten() for value in trainer.model.state_dict().values()])


@pytest.mark.parametrize("moment", ["after the optimizer", "in the loss", "in the callback"])
def test_ctrl_c_without_a_checkpoint_continues_bit_for_bit(moment):
    """A real signal; the step that it falls into is finished first."""
    expected = build_trainer()
    expected.fit(build_loader(), 3, verbose=False)
    trainer, calls = build_trainer(), itertools.count()

    def interrupt(*_):
        if next(calls) == 7:
            signal.raise_signal(signal.SIGINT)

    if moment == "after the optimizer":
        trainer.optimizer.register_step_post_hook(interrupt)
    elif moment == "in the loss":
        trainer.model.register_forward_hook(interrupt)
    else:
        trainer.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(build_loader(), 3, verbose=False)
    assert (trainer.epoch, trainer.step) == (1, 3)  # of five steps an epoch; eight are done
    history = trainer.fit(build_loader(), 3, verbose=False)
    assert torch.equal(get_weights(trainer), get_weights(expected)) and history == expected.history


def test_after_an_error_other_data_is_trained_on_from_its_start():
    class Breaks(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            if index == 30:
                raise OSError("disk gone")
            return build_data()[index]

    trainer, steps = build_trainer(on_step=lambda trainer: steps.append(1)), []
    with pytest.raises(OSError, match="disk gone"):
        trainer.fit(DataLoader(Breaks(), 8), 1, verbose=False)
    assert len(steps) == 3
    history = trainer.fit(DataLoader(build_data(16), 8), 1, verbose=False)
    assert len(steps) == 5 and len(history["loss"]) == 1


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    build_trainer(tmp_path / "run.pt").fit(build_loader(), 1, verbose=False)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    for change in (
        {"optimizer": {"state": {}, "param_groups": []}},
        {"progress": saved["progress"] | {"epoch": -1}},
        {"progress": saved["progress"] | {"step": float("inf")}},
        {"progress": saved["progress"] | {"history": {"loss": [1.0] * 9}}},
        {"model": {name: value * float("nan") for name, value in saved["model"].items()}},
        {"metrics": []},
    ):
        torch.save(saved | change, tmp_path / "bad.pt")
        trainer = build_trainer(tmp_path / "bad.pt")
        before = get_weights(trainer)
        with pytest.raises(ValueError, match="bad.pt"):
            trainer.fit(build_loader(), 2, verbose=False)
        assert torch.equal(get_weights(trainer), before) and trainer.epoch == 0


def test_a_restart_says_where_it_continues(tmp_path, capsys):
    build_trainer(tmp_path / "run.pt").fit(build_loader(), 1, verbose=False)
    build_trainer(tmp_path / "run.pt").fit(build_loader(), 2)
    assert "run.pt: continuing after 1 epochs and 0 steps" in capsys.readouterr().out


def test_an_impossible_checkpoint_is_noticed_before_training(tmp_path):
    (tmp_path / "file").touch()
    steps = []
    with pytest.raises(OSError, match="cannot be written"):
        build_trainer(tmp_path / "file" / "run.pt", on_step=steps.append).fit(build_loader(), 1, verbose=False)
    assert not steps


def test_endless_epochs_raise():
    for epochs in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="epochs must be an integer of at least 1"):
            build_trainer().fit(build_loader(), epochs, verbose=False)
