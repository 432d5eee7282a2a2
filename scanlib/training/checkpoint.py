"""Checkpoints: a dictionary of tensors and plain values, written atomically, read without running anyone's code.

save_checkpoint({"format": 1, "state_dict": model.state_dict()}, "model.pt")
checkpoint = load_checkpoint("model.pt", needs=("state_dict",))
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch


def save_checkpoint(content: dict, path: str | os.PathLike) -> Path:
    """Write to a neighbour file and move it into place, so that a killed run leaves the old checkpoint or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(scratch, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def load_checkpoint(path: str | os.PathLike, needs: Sequence[str] = (), device="cpu") -> dict:
    """Read with ``weights_only=True``: tensors and plain values, no code. Tensors arrive on ``device``.

    Raises FileNotFoundError, and ValueError when the file is truncated, holds pickled code, or lacks a key of ``needs``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; save one there first, or correct the path")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each raise their own kinds for a bad file
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is truncated or no plain checkpoint (tensors and plain values only), so it was not loaded: {reason}"
        ) from error
    missing = [key for key in needs if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is a checkpoint of another kind: it lacks {', '.join(missing)}")
    return content
