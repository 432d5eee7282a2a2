import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scanlib.trainer import Accuracy, Trainer, build_classifier_step
from scanlib.training.checkpoint import load_checkpoint, save_checkpoint


class Killed(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


def data(count=40):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(count, 3, 8, 8, generator=generator)
    return TensorDataset(x, (x[:, 0].mean((1, 2)) > x[:, 1].mean((1, 2))).long())


def build(checkpoint=None, seed=0, lr=0.01, dropout=0.3, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, 200)
    step = build_classifier_step(model, lambda x: x)
    return Trainer(
        model,
        step,
        optimizer,
        scheduler,
        scheduler_interval="step",
        metrics=[Accuracy()],
        checkpoint=checkpoint,
        seed=seed,
        config={"lr": lr},
        **options,
    )


def loader(**options):
    return DataLoader(data(), batch_size=8, shuffle=True, **options)


def test_learns_and_reports():
    trainer = build(dropout=0.0)
    history = trainer.fit(loader(), 20, validation=DataLoader(data(), 16), verbose=False)
    assert set(history) == {"loss", "Accuracy", "val_loss", "val_Accuracy"} and all(
        len(values) == 20 for values in history.values()
    )
    assert history["loss"][-1] < history["loss"][0] / 2 and history["val_Accuracy"][-1] > 0.9
    # the validation figures are those of the model in eval mode, computed by hand
    model, (x, y) = trainer.model.eval().requires_grad_(False), data().tensors
    assert history["val_loss"][-1] == pytest.approx(float(nn.functional.cross_entropy(model(x), y)), rel=1e-5)


@pytest.mark.parametrize("kill_at", [1, 3, 5, 7, 12])
@pytest.mark.parametrize("generator", [False, True])
def test_killed_and_restarted_ends_bit_for_bit_the_same(tmp_path, kill_at, generator):
    options = lambda: {"generator": torch.Generator().manual_seed(5)} if generator else {}  # noqa: E731
    whole = build()
    history = whole.fit(loader(**options()), 3, validation=DataLoader(data(), 16), verbose=False)

    count = itertools.count(1)

    def kill(trainer):
        if next(count) == kill_at:
            raise Killed

    killed = build(tmp_path / "run.pt", save_every=0, on_step=kill)  # saved after each step; killed before the save of this one
    with pytest.raises(Killed):
        killed.fit(loader(**options()), 3, validation=DataLoader(data(), 16), verbose=False)
    torch.manual_seed(999)  # a new process has other randomness
    resumed = build(tmp_path / "run.pt")
    assert resumed.fit(loader(**options()), 3, validation=DataLoader(data(), 16), verbose=False) == history
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    for ours, theirs in zip(
        whole.optimizer.state_dict()["state"].values(), resumed.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = build(tmp_path / "run.pt")
    history = first.fit(loader(), 2, verbose=False)
    steps = []
    second = build(tmp_path / "run.pt", on_step=steps.append)
    assert second.fit(loader(), 2, verbose=False) == history and not steps
    second.fit(loader(), 1, verbose=False)  # and goes on from there
    assert len(steps) == 5 and second.epoch == 3


def test_checkpoint_of_another_run_is_refused(tmp_path):
    build(tmp_path / "run.pt").fit(loader(), 1, verbose=False)
    with pytest.raises(ValueError, match=r"run.pt is of a run with lr = 0.01, this one has 0.1; delete it"):
        build(tmp_path / "run.pt", lr=0.1).fit(loader(), 1, verbose=False)
    with pytest.raises(ValueError, match="seed = 0, this one has 7"):
        build(tmp_path / "run.pt", seed=7).fit(loader(), 1, verbose=False)


def test_the_callers_random_state_is_left_alone():
    trainer, batches = build(), loader()
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


def test_non_finite_loss_stops_before_the_weights_are_touched():
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    step = lambda batch, training: (model(batch[0]).sum() * float("nan"), batch[0], batch[0])  # noqa: E731
    with pytest.raises(
        FloatingPointError, match="became nan in epoch 1, step 1; start from new weights with a learning rate below 0.1"
    ):
        Trainer(model, step, torch.optim.SGD(model.parameters(), 0.1)).fit([(torch.rand(2, 2),)], 1, verbose=False)
    assert torch.equal(model.weight, before)


def test_numpy_and_python_draws_resume_too(tmp_path):
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


def test_an_interrupted_fit_is_finished_by_the_next_and_a_failed_one_is_not(tmp_path):
    def interrupt(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    trainer = build()
    trainer.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loader(), 3, verbose=False)
    trainer.on_step = None
    assert len(trainer.fit(loader(), 3, verbose=False)["loss"]) == 3 and trainer.epoch == 3
    assert len(trainer.fit(loader(), 2, verbose=False)["loss"]) == 2 and trainer.epoch == 5
    with pytest.raises(ValueError, match="the loader is empty"):
        trainer.fit([], 4, verbose=False)
    trainer.fit(loader(), 1, verbose=False)
    assert trainer.epoch == 6
    for epochs in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"epochs {epochs} is no number of epochs"):
            trainer.fit(loader(), epochs)


class Count:
    """How many pictures were seen since the last reset."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.seen = 0

    def update(self, target, outputs):
        self.seen += len(target)

    def compute(self):
        return self.seen


def test_metrics_are_of_their_epoch_and_not_mixed_with_validation():
    trainer = build()
    trainer.metrics = [Count()]
    history = trainer.fit(loader(), 3, validation=[data(12).tensors], verbose=False)
    assert history["Count"] == [40, 40, 40] and history["val_Count"] == [12, 12, 12]


def test_a_damaged_run_is_refused_in_one_line(tmp_path):
    build(tmp_path / "run.pt").fit(loader(), 1, verbose=False)
    content = load_checkpoint(tmp_path / "run.pt")
    for key, value in (("progress", 3), ("config", 3), ("metrics", []), ("model", 3), ("optimizer", 3)):
        torch.save(content | {key: value}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=r"bad.pt is (no checkpoint of this kind of run|of a run with)") as raised:
            build(tmp_path / "bad.pt").fit(loader(), 1, verbose=False)
        assert "\n" not in str(raised.value)


def test_validation_that_is_not_finite_stops():
    model = nn.Linear(2, 2)
    step = lambda batch, training: (model(batch[0]).sum() * (1 if training else float("inf")), batch[0], batch[0])  # noqa: E731
    with pytest.raises(FloatingPointError, match="the validation loss became (-?inf|nan) in epoch 1"):
        batches = [(torch.rand(2, 2),)]
        Trainer(model, step, torch.optim.SGD(model.parameters(), 0.1)).fit(batches, 1, validation=batches, verbose=False)


def test_empty_loaders():
    with pytest.raises(ValueError, match="the loader is empty"):
        build().fit([], 1, verbose=False)
    with pytest.raises(ValueError, match="the validation loader is empty"):
        build().fit(loader(), 1, validation=[], verbose=False)


def test_plateau_scheduler_and_epoch_interval():
    trainer = build()
    trainer.scheduler, trainer.scheduler_interval = (
        torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.optimizer, patience=0, threshold=1e9),
        "epoch",
    )
    trainer.fit(loader(), 3, verbose=False)
    assert trainer.optimizer.param_groups[0]["lr"] < 0.001
    with pytest.raises(ValueError, match="scheduler_interval 'batch' is not known"):
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


def test_checkpoints_are_atomic(tmp_path, monkeypatch):
    path = save_checkpoint({"a": torch.ones(2)}, tmp_path / "new" / "c.pt")

    def fail(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"a": torch.zeros(2)}, path)
    assert torch.equal(load_checkpoint(path)["a"], torch.ones(2)) and list(path.parent.iterdir()) == [path]


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))


def test_bad_checkpoints(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match="hostile.pt is truncated or no plain checkpoint"):
        load_checkpoint(tmp_path / "hostile.pt")
    assert "code ran" not in capsys.readouterr().out
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    (tmp_path / "empty.pt").touch()
    for name in ("cut.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"{name} is truncated"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="checkpoint of another kind: it lacks state_dict"):
        load_checkpoint(tmp_path / "whole.pt", needs=("state_dict",))
