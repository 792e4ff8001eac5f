"""Checkpoint files: written atomically, read without running anything.

A run's folder holds
    checkpoint.pth        the last one; the same command resumes from it
    checkpoint0040.pth    kept every CKPT.KEEP_EVERY epochs
A file is a dict of tensors and plain data: format, step, epoch, student, teacher, optimizer,
scaler, centres, config, model (what rebuilds the networks) and versions.
"""

import argparse
import hashlib
import os
import pickle
import re
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import InputError
from utils.files import replacing

FORMAT = 1
LAST = "checkpoint.pth"

# torch.load(weights_only=True) runs nothing but what it knows. The reference's files need
# these besides: their options are an argparse.Namespace, and their optimizer state holds
# NumPy scalars (learning rates), under NumPy 1's or NumPy 2's module name.
_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED = [
    argparse.Namespace,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
]


# What torch.load meets truncated and altered files with.
_DAMAGED = (
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    OSError,
    AttributeError,
    IndexError,
    AssertionError,
    TypeError,
    struct.error,
)


def load_file(path: str | Path) -> Any:
    """The contents of a torch or safetensors file, on the CPU; only tensors and plain data.

    Raises InputError when the file is missing, is no checkpoint, is damaged, or holds
    anything beyond tensors, plain data and what the reference's files are known to hold.
    """
    path = Path(path)
    if path.is_dir():
        held = sorted(file.name for file in path.glob("*.pth"))[:4]
        hint = f"name a file in it ({', '.join(held)})" if held else "name the file"
        raise InputError(f"{path} is a folder, not a checkpoint: {hint}.")
    if not path.is_file():
        raise InputError(f"there is no checkpoint at {path}.")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            name = str(error).split("GLOBAL ", 1)[-1].split(" ", 1)[0].rstrip(".,")
            raise InputError(
                f"{path} is refused: it wants to run '{name}' while loading, and a checkpoint "
                f"may hold only tensors and plain data."
            ) from None
        raise InputError(f"{path} is not a checkpoint (it is no torch file).") from None
    except PermissionError:
        raise InputError(f"{path} may not be read: check its permissions.") from None
    except _DAMAGED:
        raise InputError(
            f"{path} is not a checkpoint, or is damaged (is it a complete torch file?)."
        ) from None


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file as load_safetensors

    try:
        return load_safetensors(path)
    except (SafetensorError, OSError):
        raise InputError(f"{path} is not a safetensors file, or is damaged.") from None


def metadata(path: str | Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors; nothing for others."""
    from safetensors import SafetensorError, safe_open

    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def sha256(path: str | Path) -> str:
    """The hash of a file's bytes, by which figures name the weights behind them."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_own(checkpoint: Any) -> bool:
    """Whether the contents are a checkpoint that this project wrote."""
    return isinstance(checkpoint, dict) and isinstance(checkpoint.get("format"), int)


def load_own(path: str | Path) -> dict:
    """A checkpoint that this project wrote, of a format that it reads; else InputError."""
    contents = load_file(path)
    if not is_own(contents):
        raise InputError(
            f"{path} is not a checkpoint of this project: choose another --output_dir."
        )
    check_format(contents, path)
    return contents


def check_format(checkpoint: dict, path: str | Path) -> None:
    """Raise InputError for a checkpoint of ours written by a newer version."""
    lost = [name for name in ("config", "model", "student", "teacher") if name not in checkpoint]
    if checkpoint["format"] <= FORMAT and lost:
        raise InputError(f"{path} is not a whole checkpoint: it lacks {', '.join(lost)}.")
    if checkpoint["format"] > FORMAT:
        raise InputError(
            f"{path} has checkpoint format {checkpoint['format']}; this version reads up to "
            f"{FORMAT}. Update the code to read it."
        )


def save(checkpoint: dict, path: str | Path) -> None:
    """Write under a temporary name, flush to the disk, rename: never a half file at `path`.

    Raises InputError when the disk refuses; whatever was at `path` is still there then.
    """
    with replacing(path, "checkpoint") as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            # A full disk reaches us as a RuntimeError of torch's zip writer; others are bugs.
            if not re.search("Writer|enforce fail", str(error)):
                raise
            raise OSError(str(error)) from None


def save_safetensors(
    tensors: dict[str, torch.Tensor], facts: dict[str, str], path: str | Path, what: str = "file"
) -> None:
    """Write tensors with facts beside them, whole; see `replacing` for `what` and errors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path, what) as temporary:
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, facts)
        except SafetensorError as error:
            raise OSError(str(error)) from None


def link_copy(source: str | Path, target: str | Path) -> None:
    """Keep `source` under a second name; a hard link where the file system has them.

    Raises InputError when the disk refuses.
    """
    with replacing(target, "checkpoint") as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
