"""What every measurement reports: the machine, the versions, the command; and a device's peak."""

import datetime
import platform
import shlex
import sys
import time
from pathlib import Path

import torch

from utils.files import write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def processor() -> str:
    """The CPU's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def device_name(device: str, threads: int) -> str:
    """What a figure was measured on, for a report."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, host {processor()}"
    return f"{processor()}, {threads} threads, no GPU"


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version()}


def matmul_peak(device: str, precision: str, threads: int) -> float:
    """The fastest square product of this precision on this device, in FLOP/s."""
    torch.set_num_threads(threads)
    size, repeats = (8192, 20) if device == "cuda" else (3072, 5)
    left, right = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def write_report(path: Path | None, module: str, threads: int, report: dict) -> None:
    """Write a measurement as JSON, with what benchmarks/README.md asks of each; None: nowhere.

    report: "what", "device", "seconds", "figures" and "remarks".
    """
    if path is None:
        return
    command = shlex.join(sys.argv[1:])
    head = {
        "what": report.pop("what"),
        "date": datetime.date.today().isoformat(),
        "device": report.pop("device"),
        "versions": versions() | report.pop("versions", {}),
        "commands": [f"OMP_NUM_THREADS={threads} python -m benchmarks.{module} {command}"],
    }
    write_json(path, head | report, "report")
