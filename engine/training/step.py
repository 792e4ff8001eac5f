"""One optimizer step of pretraining, all that it reads and changes, and a checkpoint's state."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets.folder import ImageFolder
from engine import build
from engine.build import model_description
from engine.training.acceleration import checkpoint_blocks, compile_network
from engine.training.bad_images import BadImages
from engine.training.guard import StepGuard, all_finite
from engine.training.health import CollapseWatch
from engine.training.health import measure as measure_health
from engine.training.optim import build_optimizer, cancel_last_layer, clip_each, set_rates, step_if
from engine.training.schedules import cosine, teacher_temperature
from engine.training.shuffling import shuffled, shuffling_seed
from engine.training.window import Window
from losses.contrastive import KeyQueue
from losses.objective import Contrastive, Objective
from losses.targets import Centres
from models.grouped_norm import GroupedBatchNorm
from models.network import Network, TeacherEMA, student_only
from utils import checkpoint, config, distributed
from utils.config import Node
from utils.distributed import World
from utils.logging import logger
from utils.precision import autocast, precision_of
from utils.seeding import STEPS, derive_seed
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
            momentum=cosine(
                train.MOMENTUM_TEACHER, train.MOMENTUM_TEACHER_END, epochs, steps_per_epoch
            ),
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


def step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Seed of the device-side randomness (drop path) of one micro-batch."""
    return derive_seed(seed, STEPS, step, micro, rank)


@dataclass
class Pretraining:
    """All that one optimizer step reads and changes."""

    cfg: Node
    world: World
    student: Network
    wrapped: nn.Module  # the student, in DDP where there are several processes
    teacher: Network
    objective: Objective | Contrastive
    carried: Centres | KeyQueue  # from step to step by the objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedules: Schedules
    steps_per_epoch: int
    images_per_step: int
    precision: str
    held_out: tuple[ImageFolder, ...] = ()  # gallery and queries of the k-NN test
    bad_images: BadImages = field(default_factory=lambda: BadImages(0, 0.0))
    window: Window = field(default_factory=Window)
    watch: CollapseWatch = field(default_factory=CollapseWatch)
    step: int = 0  # optimizer steps done
    logged_lines: int | None = None  # of the log, as of the last checkpoint
    logged_step: int = 0  # the step, as the log numbers it, at which a resume goes on

    def __post_init__(self) -> None:
        self.ema = TeacherEMA(self.student, self.teacher)
        self.guard = StepGuard([self.student, self.teacher], self.world.device)
        self.shuffles = any(isinstance(m, GroupedBatchNorm) for m in self.teacher.modules())

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
        objective, precision = build.objective(cfg), precision_of(cfg, world.device)
        if cfg.TRAIN.CHECKPOINTING:
            checkpoint_blocks(student)
        if cfg.TRAIN.COMPILE:
            logger.info("the first step compiles the networks, which may take minutes")
            compile_network(student)
            compile_network(teacher)
        images_per_step = cfg.TRAIN.BATCH_SIZE_PER_GPU * world.size * cfg.TRAIN.ACCUM_STEPS
        return cls(
            cfg=cfg,
            world=world,
            student=student,
            wrapped=distributed.wrap(student, world),
            teacher=teacher,
            objective=objective,
            carried=build.carried(cfg, objective).to(world.device),
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

    def forward(self, crops: list[Tensor], micro: int = 0) -> tuple[Views, Views]:
        """Views of the student and of the teacher, each of the crops that its objective gives it.

        micro: which micro-batch of the step it is.
        """
        seen = crops[self.objective.student_crops]
        with self.autocast():
            with torch.no_grad():
                if self.shuffles:
                    (keys,) = crops[self.objective.teacher_crops]
                    seed = shuffling_seed(self.cfg.SEED, self.step, micro)
                    teacher = shuffled(self.teacher, keys, seed)
                else:
                    teacher = self.teacher(crops[self.objective.teacher_crops])
            if self.student.pool is None:
                return self.wrapped(seen), teacher
            return self.wrapped(seen, teacher)

    def train_step(
        self, batches: Iterator, measure: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """One optimizer step over TRAIN.ACCUM_STEPS micro-batches of crops from `batches`.

        Returns the step's figures, if `measure` the last micro-batch's health (see
        health.py), and whether the step was good (bool; see guard.py): scalars
        on the device. What the objective carries is held during the step. A step that was not
        good changes nothing but the number of steps done.
        """
        cfg, step = self.cfg, self.step
        epoch = step // self.steps_per_epoch
        temperature = float(self.schedules.teacher_temp[epoch])
        set_rates(
            self.optimizer, float(self.schedules.lr[step]), float(self.schedules.weight_decay[step])
        )
        figures: dict[str, Tensor] = {}
        health: dict[str, Tensor] = {}
        indices: list[Tensor] = []
        statistics = self.guard.statistics.copy()
        for micro in range(cfg.TRAIN.ACCUM_STEPS):
            batch = next(batches)
            self.bad_images.note(batch.bad)
            indices.append(batch.indices)
            crops = batch.data
            torch.manual_seed(step_seed(cfg.SEED, step, micro, self.world.rank))
            is_last = micro == cfg.TRAIN.ACCUM_STEPS - 1
            synced = is_last or not isinstance(self.wrapped, DistributedDataParallel)
            with contextlib.nullcontext() if synced else self.wrapped.no_sync():
                student, teacher = self.forward(crops, micro)
                with self.autocast():
                    total, terms, told = self.objective(student, teacher, self.carried, temperature)
                self.carried.collect(teacher)
                if measure and is_last:
                    health = measure_health(teacher, self.carried, told, temperature)
                # Their memory is wanted for the backward pass and the next forward.
                del batch, crops, student, teacher, told
                self.scaler.scale(total / cfg.TRAIN.ACCUM_STEPS).backward()
            for name, value in {"loss": total.detach(), **terms}.items():
                share = value / cfg.TRAIN.ACCUM_STEPS
                figures[name] = figures[name] + share if name in figures else share
            del total, terms

        self.scaler.unscale_(self.optimizer)
        norms = clip_each(self.student.parameters(), cfg.TRAIN.CLIP_GRAD)
        figures["grad_norm"] = norms.norm()
        if epoch < cfg.TRAIN.FREEZE_LAST_LAYER:
            cancel_last_layer(self.student)
        good = self.guard.judge(step, indices, figures, norms)
        step_if(good, self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(float(self.schedules.momentum[step]), good)
        self.carried.update(good)
        self.guard.statistics.keep_if(good, statistics)
        self.step += 1
        return figures, health, good

    def is_finite(self) -> bool:
        """Whether all that a checkpoint would keep is; all processes ask together, and wait."""
        kept = (self.student, self.teacher, self.carried)
        return all_finite([t for part in kept for t in part.state_dict().values()])

    def state(self) -> dict:
        """What a checkpoint holds: tensors and plain data only. All processes ask together.

        No random state: data order, augmentation and drop path are functions of (SEED, step).
        """
        student = self.student.state_dict()
        return {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "images_per_step": self.images_per_step,
            "processes": self.world.size,
            "student": student,
            "teacher": {**self.teacher.state_dict(), **student_only(student)},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "carried": self.carried.state_dict(),
            "guard": self.guard.state_dict(),
            "window": self.window.state_dict(),
            "watch": self.watch.state_dict(),
            "bad_images": dict(self.bad_images.known),
            "log_lines": self.logged_lines,
            "config": config.to_dict(self.cfg),
            "model": model_description(self.cfg, self.student),
            "versions": {"torch": str(torch.__version__)},
        }
