import errno
import io
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from scanlib.training.checkpoint import check_writable, is_plain, is_same, load_checkpoint, load_state, save_checkpoint


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_save_keeps_the_old_checkpoint(tmp_path, monkeypatch, error):
    path = save_checkpoint({"a": torch.ones(2)}, tmp_path / "new" / "c.pt")

    def write_half(content, file):
        file.write(b"half")
        raise error("disk full")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(error, match="disk full"):
        save_checkpoint({"a": torch.zeros(2)}, path)
    assert torch.equal(load_checkpoint(path)["a"], torch.ones(2)) and list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not replace an open file")
def test_save_does_not_write_into_the_file_that_a_reader_has_open(tmp_path):
    path = save_checkpoint({"a": torch.ones(300_000)}, tmp_path / "c.pt")
    with open(path, "rb") as reader:
        start = reader.read(1000)
        save_checkpoint({"a": torch.zeros(300_000)}, path)
        content = io.BytesIO(start + reader.read())  # a plain write to the path would mix old and new here
    assert torch.equal(torch.load(content, weights_only=True)["a"], torch.ones(300_000))
    assert torch.equal(load_checkpoint(path)["a"], torch.zeros(300_000))


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))


def test_load_checkpoint_raises_for_bad_files(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.pt")
    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match="hostile.pt is damaged or not a plain checkpoint"):
        load_checkpoint(tmp_path / "hostile.pt")
    assert "code ran" not in capsys.readouterr().out
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    (tmp_path / "empty.pt").touch()
    for name in ("cut.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="checkpoint of another kind: it lacks state_dict"):
        load_checkpoint(tmp_path / "whole.pt", required=("state_dict",))


def test_any_flipped_bit_is_refused_or_harmless(tmp_path):
    torch.manual_seed(0)
    content = {"state_dict": {"a": torch.randn(50, 40), "b": torch.randn(7)}, "note": "text"}
    whole = save_checkpoint(content, tmp_path / "c.pt").read_bytes()
    generator, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (tmp_path / "d.pt").write_bytes(damaged)
        try:
            loaded = load_checkpoint(tmp_path / "d.pt")
        except ValueError as error:
            assert "d.pt is damaged" in str(error) and "\n" not in str(error)
            refused += 1
        else:  # a bit of the archive that nothing reads
            assert loaded["note"] == "text"
            assert all(torch.equal(loaded["state_dict"][key], value) for key, value in content["state_dict"].items())
    assert refused > 100
    (tmp_path / "d.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="d.pt is damaged"):
        load_checkpoint(tmp_path / "d.pt")


def test_refused_weights_leave_the_module_unchanged():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6), nn.BatchNorm1d(6))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.BatchNorm1d(8)).state_dict()
    broken = {name: value * torch.nan if value.is_floating_point() else value for name, value in before.items()}
    lacking = dict(list(before.items())[:2]) | {"0.weight": torch.zeros(4, 4)}
    for state, message in (
        (other, "file is of another model: size mismatch for 1.weight"),
        (broken, "file must hold finite weights, got NaN or infinite values in 0.weight"),
        (lacking, "file is of another model: Missing key"),
        (3, "file must hold a state dict, got int"),
        ({"0.weight": "text"}, "file is of another model"),
    ):
        with pytest.raises(ValueError, match=message):
            load_state(module, state, "file")
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    load_state(module, before, "file")


def test_two_threads_may_save_to_one_path(tmp_path):
    contents = [{"values": torch.full((20_000,), float(i))} for i in range(4)]

    def save(content):
        for _ in range(10):
            save_checkpoint(content, tmp_path / "c.pt")
            assert len(load_checkpoint(tmp_path / "c.pt")["values"].unique()) == 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, contents))
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_full_disk_and_stale_files(tmp_path, monkeypatch):
    path = save_checkpoint({"a": 1}, tmp_path / "c.pt")
    old, new = tmp_path / ".c.pt.1234.tmp", tmp_path / ".c.pt.5678.tmp"
    old.touch(), new.touch()
    os.utime(old, (0, 0))

    def fill_disk(content, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill_disk)
        with pytest.raises(
            OSError, match=r"c.pt could not be written \(No space left on device\); a file that was there is unchanged"
        ):
            save_checkpoint({"a": 2}, path)
    assert load_checkpoint(path) == {"a": 1}
    assert sorted(each.name for each in tmp_path.iterdir()) == [new.name, "c.pt"]  # the new one may belong to a running process


def test_impossible_paths_are_noticed(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "c.pt", tmp_path):
        with pytest.raises(OSError, match="cannot be written .*; give a file"):
            check_writable(path)
        with pytest.raises(OSError, match="cannot be written"):
            save_checkpoint({}, path)
    check_writable(tmp_path / "new" / "folder" / "c.pt")
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_tensors_are_not_plain_values():
    assert is_plain({"a": [1, 2.5, None, ("b", True)]}) and not is_plain({"a": [torch.zeros(2)]})
    assert is_same([1, "a"], [1, "a"]) and not is_same(torch.zeros(2), torch.zeros(2)) and not is_same([torch.ones(1)], [1])
