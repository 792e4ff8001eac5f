"""The pretraining loop: steps, lines of the log, k-NN tests, checkpoints, and reasons to stop."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from datasets.loader import Batch, usable_workers
from engine.evaluation.features import extract
from engine.evaluation.knn import knn_accuracy
from engine.training import guard
from engine.training.saving import CheckpointWriter
from engine.training.step import Pretraining
from utils import distributed
from utils.distributed import Ballot
from utils.errors import InputError
from utils.logging import RunLog, logger, on_terminal
from utils.signals import Preempted, StopSignals


def train(
    run: Pretraining, batches: Iterable[Batch], folder: Path, signals: StopSignals | None = None
) -> None:
    """Train from `run.step` to the end, with log, k-NN and checkpoints in `folder`.

    batches: micro-batches of crops on the device.

    Raises, on all processes: Preempted where one of them got a signal to stop, with a checkpoint
    written; InputError where a file cannot be written, too many images cannot be read or too
    many steps in a row were not finite.
    """
    cfg, is_main = run.cfg, run.world.is_main
    go_on = cfg.CKPT.ON_ERROR == "go_on"
    log = None
    if is_main:
        log = RunLog(folder, run.logged_step, go_on=go_on, lines=run.logged_lines)
    bar = tqdm(
        total=run.total_steps,
        initial=run.step,
        unit="step",
        disable=not (is_main and on_terminal()),
    )
    with contextlib.ExitStack() as at_end:
        at_end.callback(bar.close)
        if log:
            at_end.callback(log.close)
        checkpoints = Checkpoints(run, folder, log)
        at_end.callback(checkpoints.close)
        _steps(run, batches, folder, signals, log, bar, checkpoints)
        run.bad_images.exchange(folder)
        checkpoints.wait()


def _steps(
    run: Pretraining,
    batches: Iterable[Batch],
    folder: Path,
    signals: StopSignals | None,
    log: RunLog | None,
    bar: tqdm,
    checkpoints: "Checkpoints",
) -> None:
    """The steps from `run.step` to the end, and after each what is due."""
    ballot = Ballot(run.world, run.cfg.TRAIN.TIMEOUT_MINUTES)
    batches = iter(batches)
    speed = Speed(run)
    while run.step < run.total_steps:
        epoch_ends = (run.step + 1) % run.steps_per_epoch == 0
        # The very first step too: people want to see that it runs.
        line_due = (run.step + 1) % run.cfg.PRINT_FREQ == 0 or epoch_ends or run.step == 0
        figures, health, good = run.train_step(batches, measure=line_due)
        run.window.add(figures, good)
        bar.update()
        if line_due:
            _line(run, health, speed, log, bar, checkpoints)
        with speed.paused():
            if epoch_ends:
                _test_by_knn(run, log)
            received = signals.received if signals else None
            asked = ballot.cast(
                {
                    "stop": int(received is not None),
                    "clock": int(checkpoints.clock_is_due()),
                    "failed": int(checkpoints.failed),
                    "bad images": run.bad_images.pending,
                }
            )
            if asked["bad images"]:
                run.bad_images.exchange(folder)
            if asked["failed"]:
                checkpoints.wait()
            if asked["stop"] or checkpoints.wanted(epoch_ends, bool(asked["clock"])):
                checkpoints.save(epoch_ends)
            if asked["stop"]:
                checkpoints.wait()
                names = distributed.gather_objects(received)
                raise Preempted(
                    f"stopped by {next(name for name in names if name)} after step {run.step}; "
                    f"{folder} holds a checkpoint of it, from which the same command goes on"
                )
    ballot.close()


class Speed:
    """Images a second since the last line; pauses for tests and checkpoints do not count."""

    def __init__(self, run: Pretraining) -> None:
        self._run, self._since, self._step = run, time.perf_counter(), run.step

    def fetch(self) -> float:
        """Images a second over all processes; starts anew."""
        now, steps = time.perf_counter(), self._run.step - self._step
        seconds, self._since, self._step = now - self._since, now, self._run.step
        return steps * self._run.images_per_step / seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands while the block runs."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


class Checkpoints:
    """When a run's checkpoints are due, and writing them: all processes together, by rank 0."""

    def __init__(self, run: Pretraining, folder: Path, log: RunLog | None) -> None:
        self._run, self.folder, self._log = run, folder, log
        self._writer = None
        if run.world.is_main:
            self._writer = CheckpointWriter(folder, run.cfg.CKPT.ON_ERROR == "go_on")
        self._saved_step, self._saved_at = -1, time.monotonic()
        self._clock_told = False

    @property
    def failed(self) -> bool:
        """Whether a write failed of which nobody was told; on rank 0."""
        return self._writer is not None and self._writer.failed

    def clock_is_due(self) -> bool:
        """Whether CKPT.EVERY_MINUTES have passed by rank 0's clock; told once a checkpoint."""
        minutes = self._run.cfg.CKPT.EVERY_MINUTES
        passed = time.monotonic() - self._saved_at
        due = self._run.world.is_main and passed > 60 * minutes
        due, self._clock_told = due and not self._clock_told, self._clock_told or due
        return due

    def wanted(self, epoch_ends: bool, clock: bool) -> bool:
        """Whether to write one: it is due by the clock.

        Not in a row of bad steps, though, which may not be the run's first sign of going wrong:
        they would push out what was written before. The run's last one and those kept for good
        are written even then.
        """
        run = self._run
        if run.step == run.total_steps or self._kept_as(epoch_ends):
            return True
        # 0 minutes is every step, though several processes learn of the clock one step later.
        if not (clock or run.cfg.CKPT.EVERY_MINUTES == 0):
            return False
        self._clock_told = False
        return not run.guard.in_row()

    def save(self, epoch_ends: bool) -> None:
        """Hand the state to the writer, unless this step's was; raises InputError on all."""
        run = self._run
        if self._saved_step == run.step:
            return
        if not run.is_finite():
            raise InputError(
                f"the weights after step {run.step} are not finite, so they are not written: a "
                f"checkpoint in {self.folder}, if there is one, is from before. To go on from "
                f"it with a lower learning rate: --lr and --resume force."
            )
        run.bad_images.exchange(self.folder)  # what the checkpoint knows must be told
        if self._log:
            run.logged_lines = self._log.lines
        state = run.state()

        def hand_over() -> None:
            self._log.sync()
            self._writer.save(state, self._kept_as(epoch_ends))

        distributed.on_main(hand_over)
        self._saved_step, self._saved_at = run.step, time.monotonic()
        self._clock_told = False

    def wait(self) -> None:
        """Until all is written; raises InputError on all processes where it was not."""
        distributed.on_main(lambda: self._writer.wait())

    def close(self) -> None:
        """End the writer, whatever became of the run."""
        if self._writer:
            self._writer.close()

    def _kept_as(self, epoch_ends: bool) -> str:
        """The name under which this epoch's checkpoint is kept for good; empty if it is not."""
        run, every = self._run, self._run.cfg.CKPT.KEEP_EVERY
        epoch = run.step // run.steps_per_epoch
        return f"checkpoint{epoch:04d}.pth" if every and epoch_ends and epoch % every == 0 else ""


def _line(
    run: Pretraining,
    health: dict[str, Tensor],
    speed: Speed,
    log: RunLog | None,
    bar: tqdm,
    checkpoints: Checkpoints,
) -> None:
    """Fetch the figures since the last line; write them, warn, and stop where all went wrong."""
    line = _fetch(run, health)
    longest = line.pop("longest_row")
    line["images_per_second"] = speed.fetch()
    skipped = line["skipped_steps"] = int(line["skipped_steps"])
    new, run.guard.told = skipped - run.guard.told, skipped
    if log:
        log.write(run.step, line)
    if longest >= run.cfg.TRAIN.MAX_BAD_STEPS:
        _stop_for_bad_steps(run, int(longest), checkpoints)
    # fp16 finds its scale by steps that overflow: those are no reason to worry.
    if new and run.precision != "fp16":
        logger.warning(
            f"{new} steps up to step {run.step} were skipped: their loss or "
            f"gradient was not finite (in all {skipped}; {run.cfg.TRAIN.MAX_BAD_STEPS} in a row "
            f"stop the run)"
        )
    for warning in run.watch.update(line, run.cfg.TRAIN.BATCH_SIZE_PER_GPU):
        logger.warning(warning)
    done = f"epoch {line['epoch']:.2f}/{run.cfg.TRAIN.EPOCHS}"
    short = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['images_per_second']:.0f} img/s"
    bar.set_postfix_str(f"{done}  {short}")
    # On a terminal the bar tells the rest; an epoch's end stays to be read.
    if bar.disable or run.step % run.steps_per_epoch == 0:
        logger.info(f"{done}  step {run.step}/{run.total_steps}  {short}")


def _fetch(run: Pretraining, health: dict[str, Tensor]) -> dict[str, float]:
    """One line's figures: means over the steps since the last line, and this step's health."""
    done = run.step - 1
    temperature = float(run.schedules.teacher_temp[done // run.steps_per_epoch])
    return {
        "epoch": run.step / run.steps_per_epoch,
        **run.window.fetch(health | run.guard.counts()),
        "lr": float(run.schedules.lr[done]),
        "weight_decay": float(run.schedules.weight_decay[done]),
        "momentum": float(run.schedules.momentum[done]),
        "teacher_temp": temperature,
    }


def _stop_for_bad_steps(run: Pretraining, row: int, checkpoints: Checkpoints) -> None:
    """Raise InputError on all processes, after a checkpoint of the last good state and a dump."""
    names = [name for name, p in run.student.named_parameters() if p.requires_grad]
    dump = run.guard.dump(checkpoints.folder, names)
    is_finite = run.is_finite()
    if is_finite:
        # What was skipped changed nothing, so the state now is that of the last good step. Who
        # goes on from it begins a new row.
        run.guard.forget_row()
        checkpoints.save(epoch_ends=False)
        checkpoints.wait()
    raise guard.stop_sentence(row, checkpoints.folder, dump, is_finite)


def _test_by_knn(run: Pretraining, log: RunLog | None) -> None:
    """k-NN of the teacher by all processes, at the end of an epoch where it is due."""
    every, epoch = run.cfg.EVAL.KNN_EVERY, run.step // run.steps_per_epoch
    if not every or (epoch % every and run.step < run.total_steps):
        return
    top1, top5 = held_out_knn(run)
    logger.info(f"epoch {epoch}: k-NN of the teacher: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
    if log:
        log.write(run.step, {"epoch": epoch, "knn_top1": top1, "knn_top5": top5})


def held_out_knn(run: Pretraining) -> tuple[float, float]:
    """k-NN top-1 and top-5, percent, of the teacher's image features on the held-out folders."""
    cfg = run.cfg
    backbone = run.teacher.backbone.eval()
    # Each CPU process has statistics of its own: what is tested is what a checkpoint holds.
    distributed.broadcast(backbone.buffers())

    def features(images: Tensor) -> Tensor:
        with run.autocast():
            return backbone.forward(images)[0]  # never compiled, whatever the sizes here

    gallery, queries = (
        extract(
            features,
            folder,
            run.world,
            cfg.EVAL.BATCH_SIZE_PER_GPU,
            usable_workers(cfg.DATA.WORKERS),
            cfg.DATA.MAX_BAD,
        )
        for folder in run.held_out
    )
    backbone.train()
    for bad in (*gallery.bad, *queries.bad):
        logger.warning(str(bad))
    return knn_accuracy(
        gallery.values,
        gallery.labels,
        queries.values,
        queries.labels,
        [cfg.EVAL.KNN_K],
        world=run.world,
    )[cfg.EVAL.KNN_K]
