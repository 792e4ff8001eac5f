"""The pretraining loop: steps, lines of the log, checkpoints, and reasons to stop."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from datasets.loader import Batch
from engine.training import guard
from engine.training.lines import Lines
from engine.training.record import Record
from engine.training.saving import Checkpoints
from engine.training.step import Pretraining
from engine.training.validation import Validation
from utils import distributed
from utils.distributed import Ballot
from utils.logging import RunLog
from utils.signals import Preempted, StopSignals


def train(
    run: Pretraining,
    record: Record,
    batches: Iterable[Batch],
    folder: Path,
    validation: Validation | None = None,
    signals: StopSignals | None = None,
) -> None:
    """Train from `run.step` to the end, with log and checkpoints in `folder`.

    batches: micro-batches of crops on the device. validation: what the features are measured on.
    Raises, on all processes: Preempted where one of them got a signal to stop, with a checkpoint
    written; InputError where a file cannot be written, too many images cannot be read or too
    many steps in a row were not finite.
    """
    with contextlib.ExitStack() as at_end:
        log = None
        if run.world.is_main:
            log = RunLog(folder, record.log_lines, record.log_step)
            at_end.callback(log.close)
        lines = Lines(run, record, log)
        at_end.callback(lines.close)
        checkpoints = Checkpoints(run, record, folder, log)
        at_end.callback(checkpoints.close)
        ballot = Ballot()
        batches = map(lines.noted, batches)
        if validation and run.step == 0 and record.standing.start is None:
            lines.write_measured(validation.measure(run))
            if checkpoints.kept_as():
                checkpoints.save()
        while run.step < run.total_steps:
            line_due = lines.due(run.step + 1)
            figures, health, good = run.train_step(batches, measure_health=line_due)
            lines.add(figures, good)
            if line_due:
                bad_row = lines.write(health)
                if bad_row >= run.cfg.TRAIN.MAX_BAD_STEPS:
                    stop_for_bad_steps(run, checkpoints, bad_row)
            with lines.paused():
                if validation and validation.due(run):
                    lines.write_measured(validation.measure(run))
                after_step(record, checkpoints, ballot, signals)
        ballot.close()
        record.bad_images.exchange(folder)
        checkpoints.wait()
        lines.write_best()


def after_step(
    record: Record, checkpoints: Checkpoints, ballot: Ballot, signals: StopSignals | None
) -> None:
    """What all processes decide together: to list bad images, to write a checkpoint, to stop."""
    received = signals.received if signals else None
    asked = ballot.cast(
        {
            "stop": int(received is not None),
            "time": int(checkpoints.time_is_up()),
            "failed": int(checkpoints.failed),
            "bad images": record.bad_images.pending,
        }
    )
    if asked["bad images"]:
        record.bad_images.exchange(checkpoints.folder)
    if asked["failed"]:
        checkpoints.wait()
    if asked["stop"] or checkpoints.due(bool(asked["time"])):
        checkpoints.save()
    if asked["stop"]:
        checkpoints.wait()
        names = distributed.gather_objects(received)
        raise Preempted(
            f"stopped by {next(name for name in names if name)} after step "
            f"{checkpoints.saved_step}; {checkpoints.folder} holds a checkpoint of it, from which "
            f"the same command goes on"
        )


def stop_for_bad_steps(run: Pretraining, checkpoints: Checkpoints, row: int) -> None:
    """Write a dump and the last good state, then raise InputError; all processes together."""
    names = [name for name, p in run.student.named_parameters() if p.requires_grad]
    dump = run.guard.dump(checkpoints.folder, names)
    is_finite, ever_good = run.is_finite(), int(run.guard.skipped) < run.step
    if is_finite:
        # What was skipped changed nothing, so the state now is that of the last good step. Who
        # goes on from it begins a new row.
        run.guard.forget_row()
        checkpoints.save()
        checkpoints.wait()
    folder, precision = checkpoints.folder, run.precision
    raise guard.stop_sentence(row, folder, dump, is_finite, precision, ever_good)
