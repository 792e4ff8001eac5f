"""Checkpoint files: written atomically, read by their checksums and without running anything.

README.md lists the files of a run's folder, docs/architecture.md what one holds.
"""

import argparse
import contextlib
import errno
import hashlib
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from utils.errors import InputError
from utils.files import replacing, sync_folder

FORMAT = 3
LAST = "checkpoint.pth"
PREVIOUS = "checkpoint_previous.pth"
BEST = "checkpoint_best.pth"
WEIGHTS = "model.safetensors"  # in a folder for timm
ENDINGS = (".pth", ".pt", ".bin", ".safetensors")  # of files of weights, ours and others'
_KEPT = re.compile(r"checkpoint(\d{4,})\.pth")
# What rebuilds the networks, and what a run needs to go on (resume.py).
_OF_NETWORKS = ("config", "model", "student", "teacher")
_OF_A_RUN = (
    *_OF_NETWORKS,
    *("step", "steps_per_epoch", "images_per_step"),
    *("optimizer", "scaler", "carried", "processes", "guard", "window", "watch", "bad_images"),
    "log_lines",
)
_FOLDER = 0x10  # in a zip record's attributes


class NotIntact(InputError):
    """A file that is damaged, foreign or malicious: another may be taken in its place.

    `reason` is the sentence without the path and the full stop.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path} {reason}.")
        self.reason = reason


# torch.load(weights_only=True) runs nothing but what it knows. The reference's files need
# these besides: their options are an argparse.Namespace, and their optimizer state holds
# NumPy scalars (learning rates), under NumPy 1's or NumPy 2's module name.

_NUMBERS = {name: np.dtype(name) for name in ("f8", "f4", "i8", "i4", "b1")}
_SCALAR = np.float64(0).__reduce__()[0]


def _dtype(name: str, *_: bool) -> np.dtype:
    """np.dtype for numbers alone: one of objects takes a file's bytes for addresses."""
    if name not in _NUMBERS:
        raise pickle.UnpicklingError(f"Unsupported GLOBAL numpy.dtype:{name}")
    return _NUMBERS[name]


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    if dtype not in _NUMBERS.values():
        raise pickle.UnpicklingError("Unsupported GLOBAL numpy.scalar of no number")
    return _SCALAR(dtype, data)


_ALLOWED = [
    argparse.Namespace,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (_dtype, "numpy.dtype"),
    *map(type, _NUMBERS.values()),
]


# Reading


def load_file(path: str | Path) -> Any:
    """The contents of a torch or safetensors file, on the CPU; only tensors and plain data.

    Raises InputError when the file cannot be read, and NotIntact when it is no checkpoint, is
    damaged (by the checksums of torch's zip; its old format and safetensors have none), or holds
    anything beyond tensors, plain data and what the reference's files are known to hold.
    """
    path = Path(path)
    try:
        if path.is_dir():
            held = sorted(file.name for file in path.iterdir() if file.suffix in ENDINGS)[:4]
            hint = f"name a file in it ({', '.join(held)})" if held else "name the file"
            raise InputError(f"{path} is a folder, not a checkpoint: {hint}.")
        if not path.is_file():
            raise InputError(f"there is no checkpoint at {path}.")
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        _verify(path)
        return _unpickle(path)
    except PermissionError:
        raise InputError(f"{path} may not be read: check its permissions.") from None
    except MemoryError:
        raise InputError(f"{path} does not fit into this machine's memory.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from None


def weights_file(path: str | Path) -> Path:
    """The file of weights in a folder of timm's or the Hugging Face hub's form; any other path."""
    names = (Path(path) / name for name in (WEIGHTS, "pytorch_model.bin"))
    return next((file for file in names if file.is_file()), Path(path))


def _verify(path: Path) -> None:
    """NotIntact where a record of a torch zip misfits its checksum; torch.load does not look."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # by which torch tells its zip from its old format
            return
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                if not any(info.CRC for info in records):
                    return  # torch.serialization.set_crc32_options(False) leaves them out
                if sum(info.compress_size for info in records) > path.stat().st_size:
                    raise zipfile.BadZipFile("records overlap")
                if any(info.external_attr & _FOLDER and info.file_size for info in records):
                    # torch's reader reads nothing of it, and calls what was there its data.
                    raise zipfile.BadZipFile("a folder with contents")
                damaged = archive.testzip()
        except Exception as error:  # whatever altered bytes make the parser do
            _raise_if_of_the_machine(error)
            reason = "is damaged, or is not a checkpoint: it is no whole zip file"
            raise NotIntact(path, reason) from None
    if damaged:
        raise NotIntact(path, f"is damaged: its record {damaged[:80]!r} does not fit its checksum")


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "is not a checkpoint (it is no torch file)"
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            name = "".join(str(error).split("GLOBAL ", 1)[-1].split()[:1]).rstrip(".,")
            reason = (
                f"is refused: it wants to run {name[:80]!a} while loading, and a checkpoint may "
                f"hold only tensors and plain data: have its weights saved alone, as a state_dict "
                f"or a .safetensors file"
            )
        raise NotIntact(path, reason) from None
    except Exception as error:  # whatever foreign or altered bytes make the unpickler do
        _raise_if_of_the_machine(error)
        reason = "is not a checkpoint, or is damaged (is it a complete torch file?)"
        raise NotIntact(path, reason) from None


def _raise_if_of_the_machine(error: Exception) -> None:
    """Let through what says nothing about the file: no memory, a disk that does not answer."""
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):
        raise MemoryError from None
    # A seek to nowhere, which altered sizes ask for, is EINVAL.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise error


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        _raise_if_of_the_machine(error)
        raise NotIntact(path, "is not a safetensors file, or is damaged") from None


def metadata(path: str | Path) -> dict[str, str]:
    """What a safetensors file, which `load_file` takes, says beside its tensors; of others {}."""
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


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


def load_own(path: str | Path, needed: tuple[str, ...] = _OF_NETWORKS) -> dict:
    """A checkpoint that this project wrote, of this format; else InputError."""
    contents = load_file(path)
    if not is_own(contents):
        raise NotIntact(path, "is not a checkpoint of this project")
    check_format(contents, path, needed)
    return contents


def check_format(
    checkpoint: dict, path: str | Path, needed: tuple[str, ...] = _OF_NETWORKS
) -> None:
    """InputError for one of ours in another format or with an attention of an earlier version;
    NotIntact for one that lacks entries."""
    if checkpoint["format"] != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {checkpoint['format']}; this version reads format "
            f"{FORMAT} alone. Use the version of the code that wrote it."
        )
    stored = checkpoint.get("config"), checkpoint.get("model")
    if all(isinstance(part, dict) for part in stored):
        options = stored[0].get("CMD")
        # Of the version whose attention read the region head's embeddings.
        if isinstance(options, dict) and "LS_GRAD" in options and stored[1].get("pooling"):
            raise InputError(
                f"{path} is a run of cmd by an earlier version, with another attention, L_S and "
                f"L_T. Use the version of the code that wrote it."
            )
    missing = [name for name in needed if name not in checkpoint]
    if missing:
        raise NotIntact(path, f"is not a whole checkpoint: it lacks {', '.join(missing)}")


def newest_intact(folder: Path) -> tuple[Path, dict, list[tuple[Path, str]]] | None:
    """The checkpoint to go on from: its path, its contents, and the (path, reason) refused.

    LAST where it is intact; else the one of most steps among PREVIOUS and the newest kept one that
    is intact. None where the folder holds no checkpoint. Raises InputError when it holds some and
    none is intact, and at once for one of another format or that cannot be read: it is not lost.
    """
    try:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}).") from None
    kept = sorted((int(match[1]), name) for name in names if (match := _KEPT.fullmatch(name)))
    refused: list[tuple[Path, str]] = []

    def first_intact(*candidates: str) -> list[tuple[Path, dict]]:
        for path in (folder / name for name in candidates if name in names):
            try:
                state = load_own(path, _OF_A_RUN)
                if type(state["step"]) is not int:
                    raise NotIntact(path, "is not a checkpoint of this project")
                return [(path, state)]
            except NotIntact as error:
                refused.append((path, error.reason))
        return []

    found = first_intact(LAST)
    if not found:
        found = first_intact(PREVIOUS) + first_intact(*(name for _, name in reversed(kept)))
    if found:
        path, state = max(found, key=lambda item: item[1]["step"])  # PREVIOUS of equal ones
        return path, state, refused
    if not refused:
        return None
    tried = "; ".join(f"{path} {reason}" for path, reason in refused)
    raise InputError(
        f"no checkpoint in {folder} is intact: {tried}. Nothing was changed: use another "
        f"--output_dir, or move these files away to start anew.",
    )


# Writing


def save(checkpoint: dict, path: str | Path) -> None:
    """Write under a temporary name, flush to the disk, rename: never a half file at `path`.

    Raises InputError when the disk refuses; whatever was at `path` is still there then.
    """
    with replacing(path, "checkpoint") as temporary:
        _write(checkpoint, temporary)


def save_last(checkpoint: dict, folder: Path, kept_as: Sequence[str] = ()) -> None:
    """Write a run's last checkpoint; the one that was the last becomes PREVIOUS.

    kept_as: further names for it, which later calls leave alone. Whatever kills the process, as
    many whole checkpoints stand under their names as before or more: the new one is complete on the
    disk before it takes a name, and the old LAST is held by a link (a copy, where the file system
    has none) until it is PREVIOUS. Raises InputError when the disk refuses; LAST and PREVIOUS are
    what they were then.
    """
    last, written = folder / LAST, None
    with contextlib.ExitStack() as stack:
        for name in (*kept_as, LAST):
            if name == LAST and last.exists():
                _link(last, stack.enter_context(replacing(folder / PREVIOUS, "checkpoint")))
            with replacing(folder / name, "checkpoint") as temporary:
                if written is None:
                    _write(checkpoint, temporary)
                else:
                    _link(written, temporary)
            written = folder / name


def set_aside(path: Path) -> Path:
    """Rename a refused file to NAME.refused, .refused2, ..., the first that is free.

    Raises InputError when the disk refuses.
    """
    names = (path.with_name(f"{path.name}.refused{number}") for number in ("", *range(2, 10**6)))
    target = next(name for name in names if not os.path.lexists(name))
    try:
        path.rename(target)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path} could not be set aside: {error.strerror}.") from None
    return target


def _write(checkpoint: dict, path: Path) -> None:
    """Raises OSError when the disk refuses."""
    try:
        # Through a file: torch's own, by path, was slower and keeps the interpreter no freer.
        with open(path, "wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        # A full disk reaches us as a RuntimeError of torch's zip writer; others are bugs.
        if not re.search("Writer|enforce fail", str(error)):
            raise
        # What the disk itself said came before it.
        cause = error.__context__
        raise (cause if isinstance(cause, OSError) else OSError(str(error))) from None


def _link(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def save_safetensors(
    tensors: dict[str, torch.Tensor], facts: dict[str, str], path: str | Path, what: str = "file"
) -> None:
    """Write tensors with facts beside them, whole; see `replacing` for `what` and errors."""
    with replacing(path, what) as temporary:
        try:
            safetensors.torch.save_file(
                {k: v.contiguous() for k, v in tensors.items()}, temporary, facts
            )
        except SafetensorError as error:
            raise OSError(str(error)) from None
