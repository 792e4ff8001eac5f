"""What a run reports: a summary, then lines of figures, and warnings where they are bad."""

import contextlib
import time
from collections.abc import Iterator

from torch import Tensor
from tqdm import tqdm

from datasets.feed import Feed
from datasets.loader import Batch, usable_workers
from engine.training.freezing import recipe
from engine.training.record import Record
from engine.training.schedules import scaled_lr
from engine.training.standing import Measured
from engine.training.step import Pretraining
from engine.training.waiting import DataWaits
from models.pretrained import count_parameters
from utils.logging import RunLog, logger, on_terminal

# Share of the starting weights in the teacher's average at the end of a run, the product of its
# momenta, above which this is said.
LAGGING = 0.1


def lag(run: Pretraining) -> str:
    """Of a run from weights too short for its teacher's momentum, else empty."""
    alone = max(0, run.cfg.INIT.HEADS_EPOCHS) * run.steps_per_epoch
    kept = run.schedules.momentum[alone:].prod()
    if not run.cfg.INIT.WEIGHTS or kept <= LAGGING:
        return ""
    return (
        f"the run is short: at its end the teacher is still {100 * kept:.0f} % the weights that it "
        f"began with, so evaluate the student too (--checkpoint_key student)"
    )


def summary(run: Pretraining, images: int, feed: Feed) -> str:
    """What is going to run, for people. images: of the data set."""
    cfg, student, processes = run.cfg, run.student, run.world.size
    parts = "; ".join(filter(None, (recipe(cfg, student.backbone), lag(run))))
    workers = usable_workers(cfg.DATA.WORKERS)
    return (
        f"{images} images in {cfg.DATA.PATH}; "
        f"processes {processes} on {run.world.device.type}, {run.precision}\n"
        f"{feed.description} (loader processes {workers} x {processes})\n"
        f"{cfg.MODEL.ARCH}: backbone {count_parameters(student.backbone) / 1e6:.2f} M parameters, "
        f"student in all {count_parameters(student) / 1e6:.2f} M; "
        f"objective {run.objective.name}\n"
        f"images per step {run.images_per_step} (batch {cfg.TRAIN.BATCH_SIZE_PER_GPU} x processes "
        f"{processes} x accumulation {cfg.TRAIN.ACCUM_STEPS}); steps per epoch "
        f"{run.steps_per_epoch}, in all {run.total_steps}; "
        f"images left over each epoch {images - run.steps_per_epoch * run.images_per_step}\n"
        f"base lr {cfg.TRAIN.BASE_LR:.3g} at 256 images, "
        f"peak lr {scaled_lr(cfg, run.images_per_step):.3g}"
        + (f"\nfrom weights: {parts}" if parts else "")
    )


class Lines:
    """Lines of figures: into the log (on rank 0), for people, and on a terminal's progress bar."""

    def __init__(self, run: Pretraining, record: Record, log: RunLog | None) -> None:
        self._run, self._record, self._log = run, record, log
        is_hidden = not (run.world.is_main and on_terminal())
        self._bar = tqdm(total=run.total_steps, initial=run.step, unit="step", disable=is_hidden)
        self._since, self._step = time.perf_counter(), run.step  # of the last line
        self._waits, self._begun = DataWaits(run.cfg, run.world), False

    def due(self, step: int) -> bool:
        """Whether a line follows optimizer step `step`, from 1."""
        # The very first step too: people want to see that it runs.
        by_number = step == 1 or step % self._run.cfg.PRINT_FREQ == 0
        return by_number or step % self._run.steps_per_epoch == 0

    def noted(self, batch: Batch) -> Batch:
        """The batch as it is, after its bad images and its waiting were noted.

        Time counts from the first batch on, for which the loader's processes have to start.
        """
        self._record.bad_images.note(batch.bad)
        if not self._begun:
            self._begun, self._since = True, time.perf_counter()
        elif batch.waited is not None:
            self._waits.add(batch.waited)
        return batch

    def add(self, figures: dict[str, Tensor], good: Tensor) -> None:
        """One step's figures; the host does not wait for them."""
        self._record.window.add(figures, good)
        self._bar.update()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time that the block takes does not count in images a second."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def write(self, health: dict[str, Tensor]) -> int:
        """Fetch the figures since the last line, write them, and warn where they are bad.

        Returns the longest row of bad steps since then.
        """
        run, cfg = self._run, self._run.cfg
        line = self._fetch(health)
        longest = int(line.pop("longest_row"))
        skipped = line["skipped_steps"] = int(line["skipped_steps"])
        new, run.guard.reported = skipped - run.guard.reported, skipped
        if self._log:
            self._log.write(run.step, line)
        # fp16 finds its scale by steps that overflow: those are no reason to worry.
        if new and run.precision != "fp16":
            logger.warning(
                f"steps skipped up to step {run.step}: {new}, whose loss or gradient was not "
                f"finite (in all {skipped}; {cfg.TRAIN.MAX_BAD_STEPS} in a row stop the run)"
            )
        for warning in self._record.watch.update(line, cfg.TRAIN.BATCH_SIZE_PER_GPU):
            logger.warning(warning)
        if advice := self._waits.advice():
            logger.warning(advice)
        done, speed = f"epoch {line['epoch']:.2f}/{cfg.TRAIN.EPOCHS}", line["images_per_second"]
        short = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {speed:.0f} img/s"
        short += f"  waiting for data {line['data_wait']:.0f} %"
        self._bar.set_postfix_str(f"{done}  {short}")
        # On a terminal the bar shows the rest; an epoch's end stays to be read.
        if self._bar.disable or run.step % run.steps_per_epoch == 0:
            logger.info(f"{done}  step {run.step}/{run.total_steps}  {short}")
        return longest

    def write_measured(self, measured: Measured) -> None:
        """The figures of the features at an epoch's end, or at the start (epoch 0)."""
        run, standing = self._run, self._record.standing
        from_weights = bool(run.cfg.INIT.WEIGHTS)
        warnings = standing.update(measured, run.epoch, run.step, from_weights)
        start = standing.start if run.step else None
        logger.info(f"epoch {run.epoch}: features of the teacher: {measured.line(start)}")
        for warning in warnings:
            logger.warning(warning)
        if self._log:
            self._log.write(run.step, {"epoch": run.epoch, **measured.figures})

    def write_best(self) -> None:
        """At a run's end: when its features were at their best."""
        if verdict := self._record.standing.verdict(self._run.cfg.CKPT.KEEP == "best"):
            logger.info(verdict)

    def close(self) -> None:
        self._bar.close()

    def _fetch(self, health: dict[str, Tensor]) -> dict[str, float]:
        """Means over the steps since the last line; this step's health, rates and speed."""
        run, last = self._run, self._run.step - 1
        means = self._record.window.fetch(health | run.guard.counts())  # waits for the device
        now, steps = time.perf_counter(), run.step - self._step
        seconds, self._since, self._step = now - self._since, now, run.step
        return {
            "epoch": run.step / run.steps_per_epoch,
            **means,
            **run.schedules.at(last, last // run.steps_per_epoch)._asdict(),
            "images_per_second": steps * run.images_per_step / seconds,
            "data_wait": self._waits.share(steps, seconds),
        }
