import io
import os

import pytest
import torch

from scanlib.training.checkpoint import load_checkpoint, save_checkpoint


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
        with pytest.raises(ValueError, match=f"{name} is truncated"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="checkpoint of another kind: it lacks state_dict"):
        load_checkpoint(tmp_path / "whole.pt", required=("state_dict",))
