"""Scripts as processes of their own; functions called by several gloo processes at once."""

import datetime
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from utils.distributed import World

ROOT = Path(__file__).parents[1]
TIMEOUT = datetime.timedelta(seconds=60)


def run_python(
    *words, environment: dict[str, str], code: int = 0
) -> subprocess.CompletedProcess[str]:
    """`python WORDS`, which must end with this exit code."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def found_by_each(size: int, function: Callable[..., Any], *arguments) -> list[Any]:
    """function(World, *arguments), a module's own, in `size` processes; their results by rank."""
    # Each is forked from a process that has imported the tests' module once.
    multiprocessing.set_forkserver_preload([function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            _work,
            (size, folder, function, arguments),
            nprocs=size,
            join=False,
            start_method="forkserver",
        )
        deadline = datetime.datetime.now() + 2 * TIMEOUT
        try:
            while not context.join(timeout=5):
                assert datetime.datetime.now() < deadline, "the processes hang"
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _work(rank: int, size: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
    )
    found = function(World(rank, size, torch.device("cpu")), *arguments)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
