"""Two processes walk the same way as one, on a number of pictures that they can not share evenly."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scanlib.trainer import Accuracy, Trainer
from scanlib.training.distributed import all_reduce_sum, is_main_process, process_group, shard_loader

ROOT = Path(__file__).parents[2]


def run(path=None):
    """Train a small classifier on 37 pictures, validate on 33: the last batches leave one process with nothing."""
    generator = torch.Generator().manual_seed(0)
    pictures, validation = torch.randn(37, 6, generator=generator), torch.randn(33, 6, generator=generator)
    labels = lambda x: (x[:, 0] + 0.3 * x[:, 1] > 0).long()  # noqa: E731
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # each process starts elsewhere; the first one's weights count
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    def step(batch, training):
        logits = model(batch[0])
        return nn.functional.cross_entropy(logits, batch[1]), logits, batch[1]

    loaders = [
        DataLoader(TensorDataset(x, labels(x)), 4, shuffle=shuffle) for x, shuffle in ((pictures, True), (validation, False))
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    trainer = Trainer(model, step, optimizer, metrics=[Accuracy()], checkpoint=path)
    history = trainer.fit(shard_loader(loaders[0]), 3, shard_loader(loaders[1]))
    return history, [parameter.detach() for parameter in model.parameters()]


def walk():
    """What each of the processes does."""
    with process_group():
        path = os.environ["CHECKPOINT"]
        history, parameters = run(path)
        again, _ = run(path)  # a finished run is read, by all
        assert again == history and all_reduce_sum([1.0], torch.device("cpu")) == [2.0]
        others = [torch.empty_like(parameters[0]) for _ in range(2)]
        torch.distributed.all_gather(others, parameters[0])
        assert torch.equal(*others)
        if is_main_process():
            torch.save({"history": json.dumps(history), "parameters": parameters}, os.environ["RESULT"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_two_processes(work: str, **files) -> list[str]:
    """Run a function of this file in two processes; what each of them said."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    alone = {"CUDA_VISIBLE_DEVICES": "", "USE_LIBUV": "0"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"from tests.training.test_distributed import {work}; {work}()"],
            env=os.environ | common | alone | files | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    return said


has_gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()


@pytest.mark.skipif(not has_gloo, reason="no gloo here")
def test_two_processes_are_as_one(tmp_path):
    said = in_two_processes("walk", RESULT=str(tmp_path / "result.pt"), CHECKPOINT=str(tmp_path / "run.pt"))
    assert "epoch 3/3" in said[0] and "epoch" not in said[1]  # the first one speaks
    assert "Warning" not in said[0] + said[1]
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    history, parameters = run()
    theirs = json.loads(found["history"])
    assert theirs["Accuracy"] == history["Accuracy"] and theirs["val_Accuracy"] == history["val_Accuracy"]
    assert theirs["val_loss"] == pytest.approx(history["val_loss"], rel=1e-5)
    torch.testing.assert_close(found["parameters"], parameters, atol=1e-6, rtol=1e-5)


def scouter(path):
    """A SCOUTER on a network with batch norms, a few steps long; its slots only are trained, so that statistics stay."""
    from scanlib.scouter import recipes

    recipe = recipes.Recipe(
        **asdict(recipes.PRESETS["signs-positive"]) | {"scenes": 128, "epochs": 3, "learning_rate": 0.01, "power": 1}
    )
    return recipes.train(recipe, path, "cpu")[1]


def train_a_scouter():
    with process_group():
        history = scouter(os.environ["MODEL"])
        if is_main_process():
            torch.save(json.dumps(history), os.environ["RESULT"])


@pytest.mark.skipif(not has_gloo, reason="no gloo here")
def test_a_scouter_trained_by_two_is_as_accurate_as_by_one(tmp_path, monkeypatch):
    said = in_two_processes("train_a_scouter", RESULT=str(tmp_path / "result.pt"), MODEL=str(tmp_path / "both.pt"))
    assert "epoch 3/3" in said[0] and "epoch" not in said[1] and (tmp_path / "both.pt").exists()
    theirs = json.loads(torch.load(tmp_path / "result.pt", weights_only=True))
    monkeypatch.setattr("scanlib.scouter.recipes.CACHE_BYTES", 0)  # several processes keep no features
    alone = scouter(tmp_path / "alone.pt")
    assert theirs["Accuracy"] == alone["Accuracy"] and theirs["val_Accuracy"] == alone["val_Accuracy"]
    for name in ("loss", "val_loss", "val_Area", "val_LogitRange"):
        assert theirs[name] == pytest.approx(alone[name], rel=1e-3)


def test_alone_nothing_changes():
    loader = DataLoader(range(5))
    with process_group():
        assert (
            shard_loader(loader) is loader and is_main_process() and all_reduce_sum([2.0, 3.0], torch.device("cpu")) == [2.0, 3.0]
        )
