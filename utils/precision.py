"""Mixed precision: what an option's word means on a device, and torch's autocast for it."""

import torch

from utils import config
from utils.config import Node
from utils.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(cfg: Node, device: torch.device, option: str = "TRAIN.PRECISION") -> str:
    """fp32, bf16 or fp16: what TRAIN.PRECISION or EVAL.PRECISION means on this device.

    Raises InputError for fp16 without a GPU.
    """
    wanted = config.get(cfg, option)
    if wanted == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if wanted == "fp16" and device.type != "cuda":
        raise InputError(f"{option} fp16 needs a GPU; on the CPU use fp32 or bf16.")
    return wanted


def cpu_has_bfloat16() -> bool:
    """Whether oneDNN takes bfloat16 on this CPU, or else torch emulates it; True where torch does
    not say, as in a build without oneDNN."""
    names = ("mkldnn", "onednn")
    asked = (getattr(getattr(torch.ops, n), f"_is_{n}_bf16_supported", None) for n in names)
    known = next(filter(None, asked), None)
    return known is None or known()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Autocast for networks and the products in losses; what needs float32 keeps it by itself."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")
