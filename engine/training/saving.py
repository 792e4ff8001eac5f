"""Writing a run's checkpoints beside the training: a snapshot is taken, a thread writes it."""

import copy
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from utils import checkpoint
from utils.errors import InputError
from utils.logging import logger


class Snapshots:
    """Copies on the host of states of the same shape, all in the same memory.

    The memory is kept: fresh pages cost more than the copy itself.
    """

    def __init__(self) -> None:
        self._held: list[UntypedStorage] = []

    def take(self, state: Any) -> Any:
        """`state` with each tensor on the CPU, apart from the original; plain data copied too.

        state: nested dicts, lists and tuples of tensors and plain data. Tensors that share their
        memory share it in the copy, so that the same file is written. The copy stands until the
        next call.
        """
        copies: dict[int, UntypedStorage] = {}
        before, self._held = self._held, []

        def storage_of(tensor: Tensor) -> UntypedStorage:
            original = tensor.untyped_storage()
            address = original.data_ptr()
            if address not in copies:
                place, size = len(self._held), original.nbytes()
                fits = place < len(before) and before[place].nbytes() == size
                held = before[place] if fits else UntypedStorage(size, device="cpu")
                self._held.append(held.copy_(original))
                copies[address] = held
            return copies[address]

        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                empty = torch.empty(0, dtype=value.dtype)
                shape = value.storage_offset(), value.shape, value.stride()
                return empty.set_(storage_of(value), *shape)
            if isinstance(value, dict):
                apart = copy.copy(value)  # of its own type: a state_dict carries versions
                apart.update({key: copied(item) for key, item in value.items()})
                return apart
            if isinstance(value, list | tuple):
                return type(value)(copied(item) for item in value)
            return value  # immutable: text, numbers, None

        with torch.no_grad():
            return copied(state)


class CheckpointWriter:
    """Writes a run's last checkpoint in a thread, one at a time; on rank 0 alone.

    go_on: a checkpoint that cannot be written is a warning, and the next one is tried; else an
    InputError of the next `save` or `wait`. The files of before stand in both cases.
    """

    # The thread is no daemon: however the interpreter ends, a checkpoint that was begun is
    # finished first. os._exit and SIGKILL end it too; then the new file has not taken its name.

    def __init__(self, folder: Path, go_on: bool) -> None:
        self._folder, self._go_on = folder, go_on
        self._snapshots = Snapshots()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._told = True

    @property
    def failed(self) -> bool:
        """Whether a write failed of which nobody was told (with go_on a warning has told it)."""
        return self._error is not None and not self._told

    @property
    def busy(self) -> bool:
        """Whether a file is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, state: dict, kept_as: str = "") -> None:
        """Take a snapshot and begin to write it, once the one before is written.

        See `utils.checkpoint.save_last` for the files and kept_as. The state may change as soon as
        this returns. Raises InputError where the one before could not be written, unless go_on.
        """
        self._join()
        if self.failed:
            self._raise()
        snapshot = self._snapshots.take(state)
        self._error = None
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, kept_as), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until all is written; raises InputError where the last write failed."""
        self._join()
        if self._error is not None:
            self._raise()

    def close(self) -> None:
        """Until all is written, for good; a failure that nobody was told of is a warning."""
        self._join()
        if self.failed:
            logger.warning(str(self._error))
        self._error, self._snapshots = None, Snapshots()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _raise(self) -> None:
        error, self._error = self._error, None
        raise error

    def _write(self, snapshot: dict, kept_as: str) -> None:
        try:
            checkpoint.save_last(snapshot, self._folder, kept_as)
        except Exception as error:  # raised where the training asks
            self._told = self._go_on and isinstance(error, InputError)
            self._error = error
            if self._told:
                logger.warning(f"{error} The run goes on, and what was written before stands.")
