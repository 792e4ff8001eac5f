"""Values by global step: learning rate, weight decay, momentum; the teacher's temperature by epoch.

All are computed before the loop and indexed by the step, so a resume needs no state.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils.config import Node


class Rates(NamedTuple):
    """What the schedules give for one step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher's average
    teacher_temp: float


@dataclass(frozen=True)
class Schedules:
    """Values for every optimizer step, and the teacher's temperature for every epoch."""

    lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray
    teacher_temp: np.ndarray

    @classmethod
    def build(cls, cfg: Node, steps_per_epoch: int, images_per_step: int) -> "Schedules":
        """The recipe's schedules: lr = BASE_LR * images / 256, all by the global step [esvit].

        While heads train alone, the rate rises to its peak for them; then its warm-up begins for
        all, since a backbone's first steps by Adam are as long as the rate is high.
        """
        train, length = cfg.TRAIN, (cfg.TRAIN.EPOCHS, steps_per_epoch)
        peak, heads = scaled_lr(cfg, images_per_step), max(0, cfg.INIT.HEADS_EPOCHS)
        alone, rest = np.linspace(0, peak, heads * steps_per_epoch), train.EPOCHS - heads
        warmup = min(train.WARMUP_EPOCHS, rest)
        return cls(
            lr=np.append(alone, cosine(peak, train.MIN_LR, rest, steps_per_epoch, warmup)),
            weight_decay=cosine(train.WEIGHT_DECAY, train.WEIGHT_DECAY_END, *length),
            momentum=cosine(train.MOMENTUM_TEACHER, train.MOMENTUM_TEACHER_END, *length),
            teacher_temp=teacher_temperature(
                cfg.LOSS.WARMUP_TEACHER_TEMP,
                cfg.LOSS.TEACHER_TEMP,
                cfg.LOSS.WARMUP_TEACHER_TEMP_EPOCHS,
                train.EPOCHS,
            ),
        )

    def at(self, step: int, epoch: int) -> Rates:
        """The values for optimizer step `step`, from 0, which belongs to `epoch`, from 0."""
        by_step = (self.lr[step], self.weight_decay[step], self.momentum[step])
        return Rates(*map(float, by_step), float(self.teacher_temp[epoch]))


def scaled_lr(cfg: Node, images_per_step: int) -> float:
    """The peak learning rate: BASE_LR at 256 images a step, in proportion otherwise."""
    return cfg.TRAIN.BASE_LR * images_per_step / 256


def cosine(
    start: float, end: float, epochs: int, steps_per_epoch: int, warmup_epochs: int = 0
) -> np.ndarray:
    """float64 [epochs * steps_per_epoch]: linear warm-up from 0 to `start`, then a half cosine.

    The warm-up ends at `start` itself; the cosine's last value lies one step before `end`
    [dino]. It is no longer than the run (`config.check`).
    """
    warmup = np.linspace(0, start, warmup_epochs * steps_per_epoch)
    steps = np.arange(epochs * steps_per_epoch - len(warmup))
    decay = end + (start - end) * (1 + np.cos(np.pi * steps / max(1, len(steps)))) / 2
    return np.concatenate([warmup, decay])


def teacher_temperature(
    warmup_temp: float, temp: float, warmup_epochs: int, epochs: int
) -> np.ndarray:
    """float64 [epochs]: linear from `warmup_temp` to `temp` over the warm-up, then `temp`."""
    warmup = np.linspace(warmup_temp, temp, warmup_epochs)
    return np.concatenate([warmup, np.full(epochs - warmup_epochs, temp)])
