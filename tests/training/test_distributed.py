"""Two processes train as one does, also on a number of images that they cannot share evenly."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scanlib.trainer import Accuracy, Trainer
from scanlib.training.distributed import all_reduce_sum, get_world_size, is_main_process, process_group, shard_loader
from scanlib.training.randomness import isolated_rng, iterate_seeded_batches

ROOT = Path(__file__).parents[2]


class Network(nn.Module):
    """A classifier with a frozen and an unused layer, which is not run by its ``forward``."""

    def __init__(self, norm: bool):
        super().__init__()
        self.hidden, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity()
        self.head, self.frozen, self.unused = nn.Linear(8, 2), nn.Linear(2, 2).requires_grad_(False), nn.Linear(3, 3)

    def classify(self, x):
        return self.frozen(self.head(self.norm(self.hidden(x)).tanh()))


def build_loaders(drop_last=False):
    """37 training and 33 validation images in batches of 4: the last batches have one image, so one process has none."""
    generator = torch.Generator().manual_seed(0)
    training, validation = torch.randn(37, 6, generator=generator), torch.randn(33, 6, generator=generator)
    label = lambda x: (x[:, 0] + 0.3 * x[:, 1] > 0).long()  # noqa: E731
    training, validation = (TensorDataset(images, label(images)) for images in (training, validation))
    return DataLoader(training, 4, shuffle=True, drop_last=drop_last), DataLoader(validation, 4)


def train(path=None, norm=False):
    """Train a small classifier; return its history and the model."""
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # the weights of the main process count
    model = Network(norm)

    def step(batch, training):
        logits = model.classify(batch[0])
        return nn.functional.cross_entropy(logits, batch[1]), logits, batch[1]

    loader, validation = (shard_loader(loader) for loader in build_loaders(drop_last=norm))  # no batch norm of one image
    trainer = Trainer(model, step, torch.optim.SGD(model.parameters(), 0.3), metrics=[Accuracy()], checkpoint=path)
    return trainer.fit(loader, 3, validation), model


def train_in_each_process():
    with process_group():
        path = os.environ["CHECKPOINT"]
        history, model = train(path)
        assert train(path)[0] == history  # a finished run is only read, by all processes
        assert all_reduce_sum([1.0, 2.0]) == [2.0, 4.0] and get_world_size() == 2
        norm_history, norm_model = train(f"{path}.norm", norm=True)
        for tensor in [*model.state_dict().values(), *norm_model.state_dict().values()]:
            others = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(others, tensor)
            assert torch.equal(*others)
        if is_main_process():
            result = {"history": json.dumps(history), "model": model.state_dict(), "norm_history": json.dumps(norm_history)}
            torch.save(result, os.environ["RESULT"])


def find_free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_two_processes(function: str, **environment) -> list[str]:
    """Run a function of this file in two processes and return what each of them printed."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    local = {"CUDA_VISIBLE_DEVICES": "", "USE_LIBUV": "0"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"from tests.training.test_distributed import {function}; {function}()"],
            env=os.environ | common | local | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], outputs
    return outputs


needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="gloo is not available")


@needs_gloo
def test_two_processes_train_as_one(tmp_path):
    outputs = run_two_processes("train_in_each_process", RESULT=str(tmp_path / "result.pt"), CHECKPOINT=str(tmp_path / "run.pt"))
    assert "epoch 3/3" in outputs[0] and "epoch" not in outputs[1]  # only the main process prints
    assert "Warning" not in outputs[0] + outputs[1]
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    expected, model = train()
    history = json.loads(result["history"])
    assert history["Accuracy"] == expected["Accuracy"] and history["val_Accuracy"] == expected["val_Accuracy"]
    assert history["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    torch.testing.assert_close(result["model"], model.state_dict(), atol=1e-6, rtol=1e-5)

    # with batch norm, the validation is of the model that is saved, whose state is that of a plain model
    norm = Network(norm=True)
    norm.load_state_dict(torch.load(tmp_path / "run.pt.norm", weights_only=True)["model"])
    x, y = build_loaders()[1].dataset.tensors
    loss = nn.functional.cross_entropy(norm.eval().classify(x), y).item()
    assert json.loads(result["norm_history"])["val_loss"][-1] == pytest.approx(loss, rel=1e-5)


def train_scouter(path):
    """A SCOUTER whose backbone has batch norms. Only its slots are trained, so the statistics do not change."""
    from scanlib.scouter import recipes

    recipe = recipes.Recipe(
        **asdict(recipes.PRESETS["signs-positive"]) | {"scenes": 128, "epochs": 3, "learning_rate": 0.01, "power": 1}
    )
    return recipes.train_recipe(recipe, path, "cpu")[1]


def train_scouter_in_each_process():
    with process_group():
        history = train_scouter(os.environ["MODEL"])
        if is_main_process():
            torch.save(json.dumps(history), os.environ["RESULT"])


@needs_gloo
def test_scouter_trained_by_two_processes_equals_one_by_one(tmp_path, monkeypatch):
    result, path = tmp_path / "result.pt", tmp_path / "both.pt"
    outputs = run_two_processes("train_scouter_in_each_process", RESULT=str(result), MODEL=str(path))
    assert "epoch 3/3" in outputs[0] and "epoch" not in outputs[1] and path.exists()
    history = json.loads(torch.load(result, weights_only=True))
    monkeypatch.setattr("scanlib.scouter.recipes.CACHE_BYTES", 0)  # several processes do not keep features
    expected = train_scouter(tmp_path / "alone.pt")
    assert history["Accuracy"] == expected["Accuracy"] and history["val_Accuracy"] == expected["val_Accuracy"]
    for name in ("loss", "val_loss", "val_Area", "val_LogitRange"):
        assert history[name] == pytest.approx(expected[name], rel=1e-3)


@pytest.mark.parametrize("drop_last", [False, True])
def test_shares_of_all_processes_make_up_each_batch(monkeypatch, drop_last):
    loader = DataLoader(range(13), 4, shuffle=True, drop_last=drop_last)

    def iterate(loader):
        with isolated_rng():
            return [None if batch is None else batch.tolist() for batch in iterate_seeded_batches(loader, 0, 2)]

    whole, shares = iterate(loader), []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        share = shard_loader(loader)
        shares.append(iterate(share))
        assert len(share) == len(loader) == len(shares[-1])
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert [part or [] for part in parts] == [batch[rank::3] for rank in range(3)]
    assert drop_last or [share[-1] for share in shares] == [whole[-1], None, None]


def test_one_process_changes_nothing():
    loader = DataLoader(range(5))
    with process_group():
        assert shard_loader(loader) is loader and is_main_process() and all_reduce_sum([2.0, 3.0]) == [2.0, 3.0]
