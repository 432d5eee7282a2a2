"""Save and load checkpoints: dictionaries of tensors and plain values.

save_checkpoint({"format": 1, "state_dict": model.state_dict()}, "model.pt")
checkpoint = load_checkpoint("model.pt", required=("state_dict",))
load_state(model, checkpoint["state_dict"], "model.pt")
"""

import contextlib
import os
import time
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STALE_AFTER = 600.0  # seconds without a change; such an unfinished file belongs to a run that was killed


def check_writable(path: str | os.PathLike) -> None:
    """Make the parent folders of a file. Raises OSError if a file cannot be written there, so that no work is lost later."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        probe = _name_temporary(path)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{path} cannot be written ({reason}); give a file in a folder that you may write to") from error


def save_checkpoint(content: dict, path: str | os.PathLike) -> Path:
    """Write a checkpoint so that ``path`` always holds a whole one: the old one until the new one is complete.

    Parent folders are created. If several threads or processes write to one path, the last one wins. Returns the path. Raises
    OSError if the disk is full or the folder cannot be written to; the old file is then unchanged.
    """
    path = Path(path)
    check_writable(path)
    _remove_stale(path)
    temporary = _name_temporary(path)
    try:
        with open(temporary, "xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # atomic within one folder
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "unexpected pos" not in str(error) and "StreamWriter" not in str(error):
            raise  # not about the disk
        reason = "the disk is full" if isinstance(error, RuntimeError) else error.strerror or str(error)
        raise OSError(f"{path} could not be written ({reason}); a file that was there is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _name_temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _remove_stale(path: Path) -> None:
    """Remove unfinished files that killed runs have left beside ``path``."""
    for stale in path.parent.iterdir():
        if stale.name.startswith(f".{path.name}.") and stale.suffix == ".tmp":
            with contextlib.suppress(OSError):  # another process was faster
                if time.time() - stale.stat().st_mtime > STALE_AFTER:
                    stale.unlink()


def load_checkpoint(path: str | os.PathLike, required: Sequence[str] = (), device="cpu") -> dict:
    """Read a checkpoint with ``weights_only=True``, which runs no code of the file. Tensors are loaded to ``device``.

    Raises FileNotFoundError, and ValueError if the file is damaged, even in a single bit, holds pickled code, or lacks a key of
    ``required``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; save one there first, or correct the path")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # compares checksums, which torch.load does not
                    raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise different errors for a damaged file
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is damaged or not a plain checkpoint (tensors and plain values only), so it was not loaded: {reason}"
        ) from error
    missing = [key for key in required if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is a checkpoint of another kind: it lacks {', '.join(missing)}")
    return content


def load_state(module: nn.Module, state: Any, source: object) -> None:
    """Load a state dict into a module. ``source`` names it in messages.

    Raises ValueError, and leaves the module as it is, for a state dict of another module and for NaN or infinite values.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} must hold a state dict, got {type(state).__name__}")
    for name, value in state.items():
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{source} must hold finite weights, got NaN or infinite values in {name}; train again")
    before = {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    try:
        module.load_state_dict(state)
    except BaseException as error:
        module.load_state_dict(before, strict=False)
        if not isinstance(error, (RuntimeError, ValueError, TypeError, AttributeError, KeyError)):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{source} is of another model: {(lines[1:] or lines or [type(error).__name__])[0][:160]}") from error


def is_plain(value: object) -> bool:
    """Return whether a value consists of numbers, strings, booleans, None, lists, tuples and dictionaries."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(each) for key, each in value.items())
    return value is None or isinstance(value, (int, float, str))


def is_same(a: object, b: object) -> bool:
    """Return whether two plain values are equal; a tensor from a file is equal to nothing."""
    return is_plain(a) and is_plain(b) and a == b
