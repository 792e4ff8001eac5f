"""One optimizer step of pretraining, and all that it reads and changes.

docs/step.md walks through `Pretraining.train_step` with the equations of docs/method.md.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets.loader import Batch
from engine import build
from engine.training import health, optim
from engine.training.acceleration import checkpoint_blocks, compile_network
from engine.training.freezing import Freezing
from engine.training.guard import StepGuard, all_finite
from engine.training.schedules import Schedules
from engine.training.shuffling import shuffled, shuffling_seed
from losses.contrastive import KeyQueue
from losses.objective import Contrastive, Objective
from losses.targets import Centres
from models.grouped_norm import GroupedBatchNorm
from models.network import Network, student_only
from utils import checkpoint, config, distributed
from utils.config import Node
from utils.distributed import World
from utils.logging import logger
from utils.precision import autocast, precision_of
from utils.seeding import STEPS, derive_seed
from utils.views import Views


@dataclass
class Pretraining:
    """What one optimizer step reads and changes.

    wrapped: the student, from the first step on in DistributedDataParallel where there are several
    processes. freezing: which parameters train, by the epoch. carried:
    what the objective keeps from step to step, centres or a queue of keys. step: optimizer steps
    done.
    """

    cfg: Node
    world: World
    student: Network
    wrapped: nn.Module
    teacher: Network
    freezing: Freezing
    objective: Objective | Contrastive
    carried: Centres | KeyQueue
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedules: Schedules
    steps_per_epoch: int
    images_per_step: int
    precision: str
    step: int = 0

    def __post_init__(self) -> None:
        self.ema = optim.TeacherEMA(self.student, self.teacher)
        self.guard = StepGuard([self.student, self.teacher], self.world.device)
        # Statistics that stay as they came tell nobody's key, and need no shuffling.
        self.shuffles = any(
            isinstance(m, GroupedBatchNorm) and m.training for m in self.teacher.modules()
        )

    @classmethod
    def build(
        cls, cfg: Node, world: World, student: Network, teacher: Network, steps_per_epoch: int
    ) -> "Pretraining":
        """Networks, objective, optimizer and schedules of a run at its first step.

        student, teacher: as `build.networks` gives them; they are moved to the device.
        """
        objective, precision = build.objective(cfg), precision_of(cfg, world.device)
        # Contrast normalises groups of a batch in their place (models/grouped_norm.py).
        if world.size > 1 and world.device.type == "cuda" and not objective.projects:
            student, teacher = map(convert_sync_batchnorm, (student, teacher))
        student, teacher = student.to(world.device), teacher.to(world.device)
        freezing = Freezing(cfg, student, teacher)
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
            wrapped=student,
            teacher=teacher,
            freezing=freezing,
            objective=objective,
            carried=build.carried(cfg, objective).to(world.device),
            optimizer=optim.build_optimizer(
                cfg.TRAIN.OPTIMIZER,
                student,
                cfg.INIT.LAYER_DECAY or 1.0,
                cfg.CMD.ATTENTION_RATE,
            ),
            scaler=torch.amp.GradScaler(world.device.type, enabled=precision == "fp16"),
            schedules=Schedules.build(cfg, steps_per_epoch, images_per_step),
            steps_per_epoch=steps_per_epoch,
            images_per_step=images_per_step,
            precision=precision,
        )

    @property
    def total_steps(self) -> int:
        return len(self.schedules.lr)

    @property
    def epoch(self) -> int:
        """Whole epochs done: the number, from 0, of the epoch that the next step belongs to."""
        return self.step // self.steps_per_epoch

    def autocast(self) -> torch.autocast:
        """Mixed precision: of the networks, and of the products in the losses."""
        return autocast(self.precision, self.world.device)

    def train_step(
        self, batches: Iterator[Batch], measure_health: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """One optimizer step over TRAIN.ACCUM_STEPS micro-batches of crops from `batches`.

        Returns the step's figures (loss, each term, grad_norm); with `measure_health` the last
        micro-batch's health (health.py), else nothing; and whether the step was good (bool), that
        is, loss and gradient finite on every process: all scalars on the device. A step that was
        not good changes nothing but the number of steps done (guard.py).
        """
        cfg, epoch, micros = self.cfg, self.epoch, self.cfg.TRAIN.ACCUM_STEPS
        if self.freezing.enter(epoch):
            self.wrapped = distributed.wrap(self.student, self.world)
        rates = self.schedules.at(self.step, epoch)
        optim.set_rates(self.optimizer, rates.lr, rates.weight_decay)
        statistics = self.guard.statistics.copy()
        figures: dict[str, Tensor] = {}
        measured: dict[str, Tensor] = {}
        indices: list[Tensor] = []

        for micro in range(micros):
            is_last = micro == micros - 1
            batch = next(batches)
            indices.append(batch.indices)
            # Each process draws its own drop path.
            torch.manual_seed(derive_seed(cfg.SEED, STEPS, self.step, micro, self.world.rank))
            with self._gradients_synced(is_last):
                # Views of the crops by both networks.
                student, teacher = self.forward(batch.data, micro)
                # The objective, against the centres (or keys) of the step before.
                with self.autocast():
                    loss, terms, per_image = self.objective(
                        student, teacher, self.carried, rates.teacher_temp
                    )
                self.carried.collect(teacher)
                if measure_health and is_last:
                    measured = health.measure(teacher, self.carried, per_image, rates.teacher_temp)
                # Their memory is wanted for the backward pass and the next forward.
                del batch, student, teacher, per_image
                # The gradient, summed over micro-batches and averaged over processes.
                self.scaler.scale(loss / micros).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                share = value / micros
                figures[name] = figures[name] + share if name in figures else share
            del loss, terms

        # Each parameter's gradient is clipped on its own.
        self.scaler.unscale_(self.optimizer)
        norms = optim.clip(self.student.parameters(), cfg.TRAIN.CLIP_GRAD)
        if epoch < cfg.TRAIN.FREEZE_LAST_LAYER:
            optim.cancel_last_layer(self.student)
        figures["grad_norm"] = norms.norm()
        # Centres (or the queue), with word from every process whether loss and gradient are finite.
        good = self.carried.update(figures["loss"].isfinite() & figures["grad_norm"].isfinite())
        self.guard.note(self.step, indices, figures, norms, good)
        # The student's step, and the teacher's average.
        optim.step_if(good, self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(rates.momentum, good)
        self.guard.statistics.keep_if(good, statistics)
        self.step += 1
        return figures, measured, good

    def forward(self, crops: list[Tensor], micro: int = 0) -> tuple[Views, Views]:
        """Views of the student and of the teacher, each of the crops that its objective gives it.

        crops: V float32 [B, 3, S, S]; micro: which micro-batch of the step they are.
        """
        seen, keys = crops[self.objective.student_crops], crops[self.objective.teacher_crops]
        with self.autocast():
            with torch.no_grad():
                if self.shuffles:
                    seed = shuffling_seed(self.cfg.SEED, self.step, micro)
                    teacher = shuffled(self.teacher, keys[0], seed)
                else:
                    teacher = self.teacher(keys)
            return self.wrapped(seen), teacher

    def _gradients_synced(self, now: bool) -> contextlib.AbstractContextManager:
        """In its block gradients are averaged over processes if `now`, else only added up."""
        if now or not isinstance(self.wrapped, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.wrapped.no_sync()

    def is_finite(self) -> bool:
        """Whether all that a checkpoint would keep is; all processes ask together, and wait."""
        kept = (self.student, self.teacher, self.carried)
        return all_finite([t for part in kept for t in part.state_dict().values()])

    def state(self) -> dict:
        """What a checkpoint holds of it: tensors and plain data only.

        No random state: data order, augmentation and drop path are functions of (SEED, step).
        """
        student = self.student.state_dict()
        return {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "epoch": self.epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "images_per_step": self.images_per_step,
            "processes": self.world.size,
            "student": student,
            "teacher": {**self.teacher.state_dict(), **student_only(student)},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "carried": self.carried.state_dict(),
            "guard": self.guard.state_dict(),
            "config": config.to_dict(self.cfg),
            "model": build.model_description(self.cfg),
            "versions": {"torch": str(torch.__version__)},
        }
