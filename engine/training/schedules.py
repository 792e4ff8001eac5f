"""Values by global step: learning rate, weight decay, momentum; the teacher's temperature by epoch.

All are computed before the loop and indexed by the step, so a resume needs no state.
"""

import numpy as np

from utils.errors import InputError


def cosine(
    start: float, end: float, epochs: int, steps_per_epoch: int, warmup_epochs: int = 0
) -> np.ndarray:
    """float64 [epochs * steps_per_epoch]: linear warm-up from 0 to `start`, then a half cosine.

    The warm-up ends at `start` itself; the cosine's last value lies one step before `end`
    [dino]. Raises InputError when the warm-up is longer than the run.
    """
    if warmup_epochs > epochs:
        raise InputError(
            f"TRAIN.WARMUP_EPOCHS {warmup_epochs} is longer than the run of {epochs} epochs "
            f"(TRAIN.EPOCHS). Shorten the one or lengthen the other."
        )
    warmup = np.linspace(0, start, warmup_epochs * steps_per_epoch)
    steps = np.arange(epochs * steps_per_epoch - len(warmup))
    decay = end + (start - end) * (1 + np.cos(np.pi * steps / max(1, len(steps)))) / 2
    return np.concatenate([warmup, decay])


def teacher_temperature(
    warmup_temp: float, temp: float, warmup_epochs: int, epochs: int
) -> np.ndarray:
    """float64 [epochs]: linear from `warmup_temp` to `temp` over the warm-up epochs, then `temp`.

    Raises InputError when the warm-up is longer than the run.
    """
    if warmup_epochs > epochs:
        raise InputError(
            f"LOSS.WARMUP_TEACHER_TEMP_EPOCHS {warmup_epochs} is longer than the run of {epochs} "
            f"epochs (TRAIN.EPOCHS). Shorten the one or lengthen the other."
        )
    warmup = np.linspace(warmup_temp, temp, warmup_epochs)
    return np.concatenate([warmup, np.full(epochs - warmup_epochs, temp)])
