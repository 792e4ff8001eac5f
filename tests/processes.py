"""Scripts as processes of their own; functions called by several gloo processes at once."""

import datetime
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from utils.distributed import World
from utils.errors import run_script

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


@dataclass
class Ended:
    """How a process ended: its exit code (-9: by SIGKILL), its lines, seconds since the start."""

    code: int
    said: list[str]
    seconds: float


def ended_ranks(
    size: int, function: Callable[..., None], *arguments, absent: int | None = None
) -> list[Ended]:
    """`run_script` of function(*arguments), a module's own, in `size` processes as of a launcher.

    function calls utils.distributed.start itself. absent: a rank that is never started.
    """
    multiprocessing.set_forkserver_preload([function.__module__])
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{rank}.txt" for rank in range(size)]
        port, started = free_port(), time.monotonic()
        processes = {
            rank: context.Process(
                target=_script, args=(rank, size, port, paths[rank], function, arguments)
            )
            for rank in range(size)
            if rank != absent
        }
        ends = {}
        try:
            for process in processes.values():
                process.start()
            while len(ends) < len(processes):
                assert time.monotonic() - started < TIMEOUT.seconds, "the processes hang"
                for rank, process in processes.items():
                    if rank not in ends and not process.is_alive():
                        ends[rank] = time.monotonic() - started
                time.sleep(0.05)
        finally:
            for process in processes.values():
                process.kill()
        return [
            Ended(process.exitcode, paths[rank].read_text().splitlines(), ends[rank])
            for rank, process in processes.items()
        ]


def _script(
    rank: int, size: int, port: int, path: Path, function: Callable, arguments: tuple
) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    run_script(lambda: function(*arguments))


def free_port() -> int:
    """A TCP port that nobody listens at just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def workers_of(launcher: subprocess.Popen) -> list[int]:
    """The process numbers of what a launcher has started, as /proc tells; rising."""
    folder = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return sorted(map(int, folder.read_text().split()))
