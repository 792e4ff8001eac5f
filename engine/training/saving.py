"""A run's checkpoints: when they are due, a copy of the state, and a thread that writes it."""

import copy
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.training.record import Record
from engine.training.step import Pretraining
from utils import checkpoint, distributed
from utils.errors import InputError
from utils.logging import RunLog, logger


class Checkpoints:
    """When a run's checkpoints are due, and writing them: all processes together, by rank 0.

    saved_step: of the last one, -1 before the first.
    """

    def __init__(self, run: Pretraining, record: Record, folder: Path, log: RunLog | None) -> None:
        self._run, self._record, self.folder, self._log = run, record, folder, log
        self._writer = None
        if run.world.is_main:
            self._writer = CheckpointWriter(folder)
        self.saved_step, self._saved_at = -1, time.monotonic()

    @property
    def failed(self) -> bool:
        """Whether a write failed; on rank 0."""
        return self._writer is not None and self._writer.failed

    def time_is_up(self) -> bool:
        """Whether CKPT.EVERY_MINUTES have passed since the last one, by rank 0's clock."""
        minutes = self._run.cfg.CKPT.EVERY_MINUTES
        passed = time.monotonic() - self._saved_at
        return self._run.world.is_main and passed > 60 * minutes

    def due(self, time_is_up: bool) -> bool:
        """Whether to write one; time_is_up: what rank 0's clock said up to a step ago.

        Not in a row of bad steps, though, which may not be the run's first sign of going wrong:
        they would push out what was written before. The run's last one and those kept for good
        are written even then.
        """
        run = self._run
        if run.step == run.total_steps or self.kept_as():
            return True
        every_step = run.cfg.CKPT.EVERY_MINUTES == 0
        # What the clock said a step ago does not know of a checkpoint that was written then.
        by_clock = time_is_up and run.step > self.saved_step + 1
        return (every_step or by_clock) and not run.guard.in_row()

    def save(self) -> None:
        """Hand the state to the writer, unless this step's was; raises InputError on all."""
        run, record = self._run, self._record
        if self.saved_step == run.step:
            return
        if not run.is_finite():
            raise InputError(
                f"the weights after step {run.step} are not finite, so they are not written: a "
                f"checkpoint in {self.folder}, if there is one, is from before. To go on from "
                f"it with a lower learning rate: --lr and --resume force."
            )
        record.bad_images.exchange(self.folder)  # a checkpoint holds none that was not listed
        if self._log:
            record.log_lines = self._log.lines
        state = run.state() | record.state()

        def hand_over() -> None:
            self._log.sync()
            self._writer.save(state, self.kept_as())

        distributed.on_main(hand_over)
        self.saved_step, self._saved_at = run.step, time.monotonic()

    def wait(self) -> None:
        """Until all is written; raises InputError on all processes where it was not."""
        distributed.on_main(lambda: self._writer.wait())

    def close(self) -> None:
        """End the writer, whatever became of the run."""
        if self._writer:
            self._writer.close()

    def kept_as(self) -> list[str]:
        """The names under which this step's checkpoint is kept; none if it is not."""
        run, options, names = self._run, self._run.cfg.CKPT, []
        every = options.KEEP_EVERY * run.steps_per_epoch
        if every and run.step and run.step % every == 0:
            names.append(f"checkpoint{run.epoch:04d}.pth")
        if options.KEEP == "best" and run.step == self._record.standing.best_step:
            names.append(checkpoint.BEST)
        return names


class CheckpointWriter:
    """Writes a run's last checkpoint in a thread, one at a time; on rank 0 alone.

    One that cannot be written is an InputError of the next `save` or `wait`, and leaves the files
    of before. However the interpreter ends, a checkpoint that was begun is finished first;
    os._exit and SIGKILL leave the files of before.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future | None = None  # the last one, until its error was raised

    @property
    def failed(self) -> bool:
        """Whether the last write is over and failed."""
        written = self._written
        return written is not None and written.done() and written.exception() is not None

    @property
    def busy(self) -> bool:
        """Whether a file is being written."""
        return self._written is not None and not self._written.done()

    def save(self, state: dict, kept_as: Sequence[str] = ()) -> None:
        """Copy the state and begin to write it, once the one before is written.

        See `utils.checkpoint.save_last` for the files and kept_as. The state may change as soon as
        this returns. Raises InputError where the one before could not be written.
        """
        self.wait()
        copied = on_host(state)
        self._written = self._executor.submit(checkpoint.save_last, copied, self._folder, kept_as)

    def wait(self) -> None:
        """Until all is written; raises InputError where the last write failed."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Until all is written, for good; an error that was not raised yet is a warning."""
        try:
            self.wait()
        except Exception as error:  # the run ends by another one
            logger.warning(str(error))
        self._executor.shutdown()


def on_host(state: Any) -> Any:
    """A copy of nested dicts, lists and tuples, with each tensor on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # of its own type: a state_dict carries versions
        copied.update({key: on_host(value) for key, value in state.items()})
        return copied
    if isinstance(state, list | tuple):
        return type(state)(on_host(value) for value in state)
    return state  # immutable: text, numbers, None
