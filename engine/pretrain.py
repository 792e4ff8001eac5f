"""The pretraining loop: one step, one epoch's ends, and the state that a resume needs."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.folder import ImageFolder
from datasets.loader import Batch
from datasets.multicrop import GLOBAL_CROPS
from engine import build, diagnostics
from engine.acceleration import checkpoint_blocks, compile_network
from engine.build import autocast, loader_workers, model_description, step_seed
from engine.features import extract
from engine.knn import knn_accuracy
from losses.objective import Objective
from losses.targets import Centres
from models.network import Network, TeacherEMA
from utils import checkpoint, config, distributed
from utils.config import Node
from utils.distributed import World
from utils.errors import InputError
from utils.logging import RunLog, Window, logger, on_terminal
from utils.optim import build_optimizer, cancel_last_layer, clip_each, set_rates
from utils.schedules import cosine, teacher_temperature
from utils.views import Views


@dataclass(frozen=True)
class Schedules:
    """Values for every optimizer step, and the teacher's temperature for every epoch."""

    lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray
    teacher_temp: np.ndarray

    @classmethod
    def build(cls, cfg: Node, steps_per_epoch: int, images_per_step: int) -> "Schedules":
        """The recipe's schedules: lr = BASE_LR * images / 256, all by the global step [esvit]."""
        train, epochs = cfg.TRAIN, cfg.TRAIN.EPOCHS
        return cls(
            lr=cosine(
                scaled_lr(cfg, images_per_step),
                train.MIN_LR,
                epochs,
                steps_per_epoch,
                train.WARMUP_EPOCHS,
            ),
            weight_decay=cosine(
                train.WEIGHT_DECAY, train.WEIGHT_DECAY_END, epochs, steps_per_epoch
            ),
            momentum=cosine(train.MOMENTUM_TEACHER, 1.0, epochs, steps_per_epoch),
            teacher_temp=teacher_temperature(
                cfg.LOSS.WARMUP_TEACHER_TEMP,
                cfg.LOSS.TEACHER_TEMP,
                cfg.LOSS.WARMUP_TEACHER_TEMP_EPOCHS,
                epochs,
            ),
        )


def scaled_lr(cfg: Node, images_per_step: int) -> float:
    """The peak learning rate: BASE_LR at 256 images a step, in proportion otherwise."""
    return cfg.TRAIN.BASE_LR * images_per_step / 256


@dataclass
class Pretraining:
    """All that one optimizer step reads and changes."""

    cfg: Node
    world: World
    student: Network
    wrapped: nn.Module  # the student, in DDP where there are several processes
    teacher: Network
    objective: Objective
    centres: Centres
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedules: Schedules
    steps_per_epoch: int
    images_per_step: int
    precision: str
    held_out: tuple[ImageFolder, ...] = ()  # gallery and queries of the k-NN test
    make_crops: build.MakeCrops = build.loaded_crops  # from what the loader brings
    step: int = 0  # optimizer steps done
    logged_step: int = 0  # the step, as the log numbers it, at which a resume goes on

    def __post_init__(self) -> None:
        self.ema = TeacherEMA(self.student, self.teacher)

    @classmethod
    def build(
        cls,
        cfg: Node,
        world: World,
        student: Network,
        teacher: Network,
        steps_per_epoch: int,
        **fields,
    ) -> "Pretraining":
        """All the rest from the options, for networks that are on the device already.

        fields: further fields of this class.
        """
        objective, precision = build.objective(cfg), build.precision(cfg, world.device)
        if cfg.TRAIN.CHECKPOINTING:
            checkpoint_blocks(student)
        if cfg.TRAIN.COMPILE:
            logger.info("the first step compiles the networks, which may take minutes")
            compile_network(student)
            compile_network(teacher)
        images_per_step = cfg.TRAIN.BATCH_SIZE_PER_GPU * world.size * cfg.TRAIN.ACCUM_STEPS
        centres = objective.make_centres(cfg.HEAD.OUT_DIM, cfg.LOSS.CENTER_MOMENTUM)
        return cls(
            cfg=cfg,
            world=world,
            student=student,
            wrapped=distributed.wrap(student, world),
            teacher=teacher,
            objective=objective,
            centres=centres.to(world.device),
            optimizer=build_optimizer(cfg.TRAIN.OPTIMIZER, student),
            scaler=torch.amp.GradScaler(world.device.type, enabled=precision == "fp16"),
            schedules=Schedules.build(cfg, steps_per_epoch, images_per_step),
            steps_per_epoch=steps_per_epoch,
            images_per_step=images_per_step,
            precision=precision,
            **fields,
        )

    @property
    def total_steps(self) -> int:
        return len(self.schedules.lr)

    def autocast(self) -> torch.autocast:
        """Mixed precision: of the networks, and of the products in the losses."""
        return autocast(self.precision, self.world.device)

    def forward(self, crops: list[Tensor]) -> tuple[Views, Views]:
        """Views of the student (all crops) and of the teacher (the two image-level ones)."""
        with self.autocast():
            with torch.no_grad():
                teacher = self.teacher(crops[:GLOBAL_CROPS])
            if self.student.pool is None:
                return self.wrapped(crops), teacher
            return self.wrapped(crops, teacher)

    def train_step(
        self, batches: Iterator, measure: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One optimizer step over TRAIN.ACCUM_STEPS micro-batches from `batches`.

        Returns the step's figures and, if `measure`, the last micro-batch's health (see
        engine/diagnostics.py): scalars on the device. The centres are held during the step.
        """
        cfg, step = self.cfg, self.step
        epoch = step // self.steps_per_epoch
        temperature = float(self.schedules.teacher_temp[epoch])
        set_rates(
            self.optimizer, float(self.schedules.lr[step]), float(self.schedules.weight_decay[step])
        )
        figures: dict[str, Tensor] = {}
        health: dict[str, Tensor] = {}
        for micro in range(cfg.TRAIN.ACCUM_STEPS):
            crops = self._next_crops(batches)
            torch.manual_seed(step_seed(cfg, step, micro, self.world.rank))
            is_last = micro == cfg.TRAIN.ACCUM_STEPS - 1
            synced = is_last or not isinstance(self.wrapped, DistributedDataParallel)
            with contextlib.nullcontext() if synced else self.wrapped.no_sync():
                student, teacher = self.forward(crops)
                with self.autocast():
                    total, terms, entropy = self.objective(
                        student, teacher, self.centres, temperature
                    )
                self.centres.collect(teacher)
                if measure and is_last:
                    health = diagnostics.measure(teacher, self.centres, entropy, temperature)
                # Their memory is wanted for the backward pass and the next forward.
                del crops, student, teacher, entropy
                self.scaler.scale(total / cfg.TRAIN.ACCUM_STEPS).backward()
            for name, value in {"loss": total.detach(), **terms}.items():
                share = value / cfg.TRAIN.ACCUM_STEPS
                figures[name] = figures[name] + share if name in figures else share
            del total, terms

        self.scaler.unscale_(self.optimizer)
        figures["grad_norm"] = clip_each(self.student.parameters(), cfg.TRAIN.CLIP_GRAD)
        if epoch < cfg.TRAIN.FREEZE_LAST_LAYER:
            cancel_last_layer(self.student)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(float(self.schedules.momentum[step]))
        self.centres.update()
        self.step += 1
        return figures, health

    def _next_crops(self, batches: Iterator[Batch]) -> list[Tensor]:
        batch = next(batches)
        if batch.bad:
            raise InputError(str(batch.bad[0]), everywhere=False)
        return self.make_crops(batch, self.world.device)

    def state(self) -> dict:
        """What a checkpoint holds: tensors and plain data only.

        No random state: data order, augmentation and drop path are functions of (SEED, step).
        """
        student = self.student.state_dict()
        pooling = {name: value for name, value in student.items() if name.startswith("pool.")}
        return {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "images_per_step": self.images_per_step,
            "student": student,
            "teacher": {**self.teacher.state_dict(), **pooling},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "centres": self.centres.state_dict(),
            "config": config.to_dict(self.cfg),
            "model": model_description(self.cfg, self.student),
            "versions": {"torch": str(torch.__version__)},
        }


def train(run: Pretraining, loader: DataLoader, folder: Path) -> None:
    """Train from `run.step` to the end: steps, log lines, k-NN, checkpoints in `folder`."""
    cfg, is_main = run.cfg, run.world.is_main
    log = RunLog(folder, run.logged_step) if is_main else None
    watch, window = diagnostics.CollapseWatch(), Window()
    batches = iter(loader)
    started, started_at = time.perf_counter(), run.step
    bar = tqdm(
        total=run.total_steps,
        initial=run.step,
        unit="step",
        disable=not (is_main and on_terminal()),
    )
    while run.step < run.total_steps:
        epoch_ends = (run.step + 1) % run.steps_per_epoch == 0
        # The very first step too: people want to see that it runs.
        line_due = (run.step + 1) % cfg.PRINT_FREQ == 0 or epoch_ends or run.step == 0
        figures, health = run.train_step(batches, measure=line_due)
        window.add(figures)
        bar.update()
        if line_due:
            line = _fetch(run, window, health)
            seconds = time.perf_counter() - started
            line["images_per_second"] = (run.step - started_at) * run.images_per_step / seconds
            started, started_at = time.perf_counter(), run.step
            _report(run, line, log, bar, watch)
        if epoch_ends:
            pause = time.perf_counter()
            _end_of_epoch(run, log, folder)
            started += time.perf_counter() - pause
    bar.close()
    if log:
        log.close()


def _fetch(run: Pretraining, window: Window, health: dict[str, Tensor]) -> dict[str, float]:
    """One line's figures: means over the steps since the last line, and this step's health."""
    done = run.step - 1
    temperature = float(run.schedules.teacher_temp[done // run.steps_per_epoch])
    return {
        "epoch": run.step / run.steps_per_epoch,
        **window.fetch(health),
        "lr": float(run.schedules.lr[done]),
        "weight_decay": float(run.schedules.weight_decay[done]),
        "momentum": float(run.schedules.momentum[done]),
        "teacher_temp": temperature,
    }


def _report(
    run: Pretraining,
    line: dict[str, float],
    log: RunLog | None,
    bar: tqdm,
    watch: diagnostics.CollapseWatch,
) -> None:
    """Stop on all ranks (InputError) for a loss of NaN or inf; else warn of collapse, write."""
    # The figures are means over processes: every rank sees the same and stops. A line comes
    # before each checkpoint, so none is written after a bad step. In fp16 the scaler skips a
    # step whose gradient overflows.
    names = ("loss",) if run.precision == "fp16" else ("loss", "grad_norm")
    for name in names:
        if not math.isfinite(line[name]):
            raise InputError(
                f"{name} is {line[name]} by step {run.step}, so the run stops; a checkpoint in "
                f"{run.cfg.OUTPUT_DIR}, if there is one, is from before. To go on from it with a "
                f"lower learning rate or another precision: --lr or --precision fp32, and "
                f"--resume force."
            )
    for warning in watch.update(line, run.cfg.TRAIN.BATCH_SIZE_PER_GPU):
        logger.warning(warning)
    if log:
        log.write(run.step, line)
    done = f"epoch {line['epoch']:.2f}/{run.cfg.TRAIN.EPOCHS}"
    short = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['images_per_second']:.0f} img/s"
    bar.set_postfix_str(f"{done}  {short}")
    # On a terminal the bar tells the rest; an epoch's end stays to be read.
    if bar.disable or run.step % run.steps_per_epoch == 0:
        logger.info(f"{done}  step {run.step}/{run.total_steps}  {short}")


def _end_of_epoch(run: Pretraining, log: RunLog | None, folder: Path) -> None:
    """k-NN by all processes and checkpoints by rank 0, where they are due."""
    cfg, epoch = run.cfg, run.step // run.steps_per_epoch
    is_last = run.step == run.total_steps
    if cfg.EVAL.KNN_EVERY and (epoch % cfg.EVAL.KNN_EVERY == 0 or is_last):
        top1, top5 = held_out_knn(run)
        logger.info(f"epoch {epoch}: k-NN of the teacher: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
        if log:
            log.write(run.step, {"epoch": epoch, "knn_top1": top1, "knn_top5": top5})
    is_kept = bool(cfg.CKPT.KEEP_EVERY) and epoch % cfg.CKPT.KEEP_EVERY == 0
    if epoch % cfg.CKPT.EVERY_EPOCHS == 0 or is_kept or is_last:
        distributed.on_main(lambda: _save(run, folder, is_kept))


def _save(run: Pretraining, folder: Path, is_kept: bool) -> None:
    """Write the last checkpoint, and under its epoch's name too where it is kept."""
    checkpoint.save(run.state(), folder / checkpoint.LAST)
    if is_kept:
        epoch = run.step // run.steps_per_epoch
        checkpoint.link_copy(folder / checkpoint.LAST, folder / f"checkpoint{epoch:04d}.pth")


def held_out_knn(run: Pretraining) -> tuple[float, float]:
    """k-NN top-1 and top-5, percent, of the teacher's image features on the held-out folders."""
    cfg = run.cfg
    backbone = run.teacher.backbone.eval()

    def features(images: Tensor) -> Tensor:
        with run.autocast():
            return backbone.forward(images)[0]  # never compiled, whatever the sizes here

    gallery, queries = (
        extract(
            features,
            folder,
            run.world,
            cfg.EVAL.BATCH_SIZE_PER_GPU,
            loader_workers(cfg),
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
