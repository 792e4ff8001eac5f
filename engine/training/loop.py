"""The pretraining loop: steps, lines of the log, k-NN tests, checkpoints, and reasons to stop."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from datasets.folder import LabelledImages
from datasets.loader import Batch, usable_workers
from engine.evaluation.features import extract
from engine.evaluation.knn import knn_accuracy
from engine.training import guard
from engine.training.record import Record
from engine.training.saving import Checkpoints
from engine.training.step import Pretraining
from utils import distributed
from utils.distributed import Ballot
from utils.logging import RunLog, logger, on_terminal
from utils.signals import Preempted, StopSignals


def train(
    run: Pretraining,
    record: Record,
    batches: Iterable[Batch],
    folder: Path,
    held_out: tuple[LabelledImages, LabelledImages] | None = None,
    signals: StopSignals | None = None,
) -> None:
    """Train from `run.step` to the end, with log, k-NN and checkpoints in `folder`.

    batches: micro-batches of crops on the device. held_out: gallery and queries of the k-NN test.
    Raises, on all processes: Preempted where one of them got a signal to stop, with a checkpoint
    written; InputError where a file cannot be written, too many images cannot be read or too
    many steps in a row were not finite.
    """
    with contextlib.ExitStack() as at_end:
        loop = Loop(run, record, folder, held_out, at_end)
        ballot = Ballot(run.world, run.cfg.TRAIN.TIMEOUT_MINUTES)
        batches = map(record.bad_images.noted, batches)
        while run.step < run.total_steps:
            loop.step(batches)
            with loop.speed.paused():
                loop.after_step(ballot, signals)
        ballot.close()
        record.bad_images.exchange(folder)
        loop.checkpoints.wait()


class Loop:
    """A run in its folder: what is done around a step."""

    def __init__(
        self,
        run: Pretraining,
        record: Record,
        folder: Path,
        held_out: tuple[LabelledImages, LabelledImages] | None,
        at_end: contextlib.ExitStack,
    ) -> None:
        self.run, self.record, self.folder, self.held_out = run, record, folder, held_out
        is_main = run.world.is_main
        self.log = None
        if is_main:
            go_on = run.cfg.CKPT.ON_ERROR == "go_on"
            self.log = RunLog(folder, record.log_lines, record.log_step, go_on=go_on)
            at_end.callback(self.log.close)
        is_hidden = not (is_main and on_terminal())
        self.bar = tqdm(total=run.total_steps, initial=run.step, unit="step", disable=is_hidden)
        at_end.callback(self.bar.close)
        self.checkpoints = Checkpoints(run, record, folder, self.log)
        at_end.callback(self.checkpoints.close)
        self.speed = Speed(run)

    @property
    def epoch_ends(self) -> bool:
        """Whether the step that was done last was an epoch's last one."""
        return self.run.step % self.run.steps_per_epoch == 0

    def step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step, and a line of the log where it is due."""
        run, number = self.run, self.run.step + 1
        # The very first step too: people want to see that it runs.
        line_due = number % run.cfg.PRINT_FREQ == 0 or number % run.steps_per_epoch == 0
        line_due = line_due or number == 1
        figures, health, good = run.train_step(batches, measure_health=line_due)
        self.record.window.add(figures, good)
        self.bar.update()
        if line_due:
            self.write_line(health)

    def after_step(self, ballot: Ballot, signals: StopSignals | None) -> None:
        """What all processes do together after a step: k-NN, bad images, checkpoints, a stop."""
        run, record, checkpoints = self.run, self.record, self.checkpoints
        if self.epoch_ends:
            self.test_by_knn()
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
            record.bad_images.exchange(self.folder)
        if asked["failed"]:
            checkpoints.wait()
        if asked["stop"] or checkpoints.due(self.epoch_ends, bool(asked["time"])):
            checkpoints.save(self.epoch_ends)
        if asked["stop"]:
            checkpoints.wait()
            names = distributed.gather_objects(received)
            raise Preempted(
                f"stopped by {next(name for name in names if name)} after step {run.step}; "
                f"{self.folder} holds a checkpoint of it, from which the same command goes on"
            )

    def write_line(self, health: dict[str, Tensor]) -> None:
        """Fetch the figures since the last line; write, warn, and stop where all went wrong."""
        run, record, cfg = self.run, self.record, self.run.cfg
        line = self.fetch_figures(health)
        longest = line.pop("longest_row")
        skipped = line["skipped_steps"] = int(line["skipped_steps"])
        new, run.guard.reported = skipped - run.guard.reported, skipped
        if self.log:
            self.log.write(run.step, line)
        if longest >= cfg.TRAIN.MAX_BAD_STEPS:
            self.stop_for_bad_steps(int(longest))
        # fp16 finds its scale by steps that overflow: those are no reason to worry.
        if new and run.precision != "fp16":
            logger.warning(
                f"{new} steps up to step {run.step} were skipped: their loss or "
                f"gradient was not finite (in all {skipped}; {cfg.TRAIN.MAX_BAD_STEPS} in a row "
                f"stop the run)"
            )
        for warning in record.watch.update(line, cfg.TRAIN.BATCH_SIZE_PER_GPU):
            logger.warning(warning)
        done, speed = f"epoch {line['epoch']:.2f}/{cfg.TRAIN.EPOCHS}", line["images_per_second"]
        short = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {speed:.0f} img/s"
        self.bar.set_postfix_str(f"{done}  {short}")
        # On a terminal the bar shows the rest; an epoch's end stays to be read.
        if self.bar.disable or self.epoch_ends:
            logger.info(f"{done}  step {run.step}/{run.total_steps}  {short}")

    def fetch_figures(self, health: dict[str, Tensor]) -> dict[str, float]:
        """One line: means over the steps since the last one, this step's health and rates."""
        run = self.run
        last = run.step - 1
        return {
            "epoch": run.step / run.steps_per_epoch,
            **self.record.window.fetch(health | run.guard.counts()),
            **run.schedules.at(last, last // run.steps_per_epoch)._asdict(),
            "images_per_second": self.speed.fetch(),
        }

    def stop_for_bad_steps(self, row: int) -> None:
        """Write a dump and the last good state, then raise InputError; all processes together."""
        run = self.run
        names = [name for name, p in run.student.named_parameters() if p.requires_grad]
        dump = run.guard.dump(self.folder, names)
        is_finite = run.is_finite()
        if is_finite:
            # What was skipped changed nothing, so the state now is that of the last good step. Who
            # goes on from it begins a new row.
            run.guard.forget_row()
            self.checkpoints.save()
            self.checkpoints.wait()
        raise guard.stop_sentence(row, self.folder, dump, is_finite)

    def test_by_knn(self) -> None:
        """k-NN of the teacher by all processes, at the end of an epoch where it is due."""
        run, every = self.run, self.run.cfg.EVAL.KNN_EVERY
        if not every or (run.epoch % every and run.step < run.total_steps):
            return
        top1, top5 = held_out_knn(run, self.held_out)
        logger.info(
            f"epoch {run.epoch}: k-NN of the teacher: top-1 {top1:.2f} %, top-5 {top5:.2f} %"
        )
        if self.log:
            self.log.write(run.step, {"epoch": run.epoch, "knn_top1": top1, "knn_top5": top5})


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


def held_out_knn(
    run: Pretraining, held_out: tuple[LabelledImages, LabelledImages]
) -> tuple[float, float]:
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
        for folder in held_out
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
