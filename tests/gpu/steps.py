"""Training steps on a device at a precision, beside the CPU's in float32."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from engine.training.step import Pretraining
from tests.runs import SWIN, batch_of, crops_for, pretraining, small_config

PRECISIONS = ("fp32", "bf16", "fp16")
# A network for each objective, so that every family is there.
NETWORKS = {
    "dino": {},
    "esvit": SWIN,
    "cmd": SWIN,
    "released": {},
    "moco_v2": SWIN,
    "lcr": SWIN,
}


def options_of(objective: str) -> dict:
    """Options of a small run of this objective, without what is drawn on the device."""
    options = {**NETWORKS[objective], "LOSS__OBJECTIVE": objective, "MODEL__DROP_PATH": 0.0}
    if objective in ("moco_v2", "lcr"):
        # With a BatchNorm in the head, for which keys are shuffled; of few images it would blow up
        # rounding.
        options |= {"AUG__LOCAL_CROPS_NUMBER": [], "MOCO__QUEUE": 32, "HEAD__USE_BN": True}
        options |= {"TRAIN__BATCH_SIZE_PER_GPU": 16}
    # Adam would blow up the rounding of gradients that are zero.
    return {**options, "TRAIN__OPTIMIZER": "sgd"}


def run_on(device: torch.device, precision: str, **options) -> Pretraining:
    """A run on a device; float16, which the product refuses on a CPU, in a rehearsal too."""
    rehearsed = precision == "fp16" and device.type == "cpu"
    cfg = small_config(**options, TRAIN__PRECISION="fp32" if rehearsed else precision)
    run = pretraining(cfg, device=device)
    if rehearsed:
        run.precision = precision
    if precision == "fp16":
        # At the default 2^16 the first steps of so small a network overflow, and are skipped.
        run.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**4)
    return run


def step(run: Pretraining, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """One step over `crops_for(run, seed)`: its figures, and whether it was good."""
    figures, _, good = run.train_step(iter([batch_of(crops_for(run, seed))]))
    return figures, good


@contextlib.contextmanager
def unwaited(device: torch.device) -> Iterator[None]:
    """Within it the host may not wait for the device, where that is a GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
