"""Save and load checkpoints: dictionaries of tensors and plain values.

save_checkpoint({"format": 1, "state_dict": model.state_dict()}, "model.pt")
checkpoint = load_checkpoint("model.pt", required=("state_dict",))
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch


def save_checkpoint(content: dict, path: str | os.PathLike) -> Path:
    """Write a checkpoint so that ``path`` always holds a whole one: the old one until the new one is complete.

    Parent folders are created. Returns the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # atomic within one folder
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_checkpoint(path: str | os.PathLike, required: Sequence[str] = (), device="cpu") -> dict:
    """Read a checkpoint with ``weights_only=True``, which runs no code of the file. Tensors are loaded to ``device``.

    Raises FileNotFoundError, and ValueError if the file is truncated, holds pickled code, or lacks a key of ``required``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; save one there first, or correct the path")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise different errors for a damaged file
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is truncated or not a plain checkpoint (tensors and plain values only), so it was not loaded: {reason}"
        ) from error
    missing = [key for key in required if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is a checkpoint of another kind: it lacks {', '.join(missing)}")
    return content
