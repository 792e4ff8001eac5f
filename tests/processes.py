"""Scripts as processes of their own; functions called by several gloo processes at once."""

import atexit
import datetime
import multiprocessing
import multiprocessing.forkserver
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from utils.distributed import World
from utils.errors import run_script

ROOT = Path(__file__).parents[1]
TIMEOUT = datetime.timedelta(minutes=5)
PATIENCE = 600.0  # seconds; a loaded machine is no failure
_STARTING = threading.Lock()
PRELOADED = (
    "tests.processes",
    "main_cmd",
    "eval_knn",
    "eval_linear",
    "eval_retrieval",
    "evaluate",
    "compare",
    "report",
    "visualize",
    "export",
    "datasets.synthetic",
    "utils.config_docs",
)


class Script:
    """A script in a process of its own, with the methods of a subprocess.Popen."""

    def __init__(self, words: tuple, environment: Mapping[str, str], merged: bool, **how) -> None:
        start_fork_server()
        self.args, self.merged = [str(word) for word in words], merged
        self._folder = tempfile.TemporaryDirectory()
        self.out = Path(self._folder.name) / "out.txt"
        self.err = self.out if merged else Path(self._folder.name) / "err.txt"
        for path in (self.out, self.err):
            path.touch()
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run_words,
            args=(self.args, dict(environment), self.out, self.err),
            kwargs=how,
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code (-9: ended by SIGKILL); None as long as it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = PATIENCE) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout, self.said())
        return self.returncode

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """What it wrote to stdout and to stderr, once it has ended."""
        self.wait(timeout)
        return self.out.read_text(), "" if self.merged else self.err.read_text()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def said(self) -> str:
        """What it has written up to now, stdout before stderr."""
        paths = [self.out] if self.merged else [self.out, self.err]
        return "".join(path.read_text(errors="replace") for path in paths)

    def wait_for(self, words: str) -> None:
        """Until it has written these words; it must not end before."""
        deadline = time.monotonic() + PATIENCE
        while words not in self.said():
            ended = self.returncode is not None
            assert words in self.said() or not ended, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)


def start_python(
    *words,
    environment: Mapping[str, str] = os.environ,
    folder: Path = ROOT,
    merged: bool = False,
    new_session: bool = False,
    limits: dict[int, int] | None = None,
) -> Script:
    """`python WORDS` (a script, -m MODULE or -c CODE) with this working folder.

    A child of a fork server that has imported all scripts: it skips the seven seconds of imports
    that a new interpreter needs and is otherwise like one: its own arguments, exactly this
    environment, one thread, /dev/null as stdin, the default signal handlers, and the script's own
    last lines. What reads the environment at import, and the order of sets, is the server's: where
    these matter, or the launch itself, use launch_python.

    merged: stderr goes where stdout goes. new_session: as of setsid. limits: of resource.RLIMIT_*.
    """
    how = {"folder": folder, "new_session": new_session, "limits": limits or {}}
    return Script(words, environment, merged, **how)


def run_python(
    *words, environment: Mapping[str, str] = os.environ, code: int | None = 0, **how
) -> subprocess.CompletedProcess[str]:
    """start_python(WORDS) to its end, which must have this exit code (None: any)."""
    script = start_python(*words, environment=environment, **how)
    try:
        out, err = script.communicate()
    finally:
        script.kill()
    assert code in (None, script.returncode), out + err
    return subprocess.CompletedProcess(script.args, script.returncode, out, err)


def start_group(size: int, *words, environment: Mapping[str, str], **how) -> list[Script]:
    """start_python(WORDS) by `size` processes at once, each told its place as by a launcher."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    place["TORCHELASTIC_ERROR_FILE"] = os.devnull  # what they report is not looked at
    return [
        start_python(
            *words,
            environment={**environment, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **how,
        )
        for rank in range(size)
    ]


def run_group(
    size: int, *words, environment: Mapping[str, str], code: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """start_group to its end: each must have this exit code (None: any); all that they wrote."""
    scripts = start_group(size, *words, environment=environment)
    try:
        said = [script.communicate() for script in scripts]
    finally:
        for script in scripts:
            script.kill()
    out, err = ("".join(parts) for parts in zip(*said, strict=True))
    codes = [script.returncode for script in scripts]
    assert code is None or codes == [code] * size, f"{codes}\n{out}{err}"
    return subprocess.CompletedProcess(words, max(codes), out, err)


def launch_python(
    *words, environment: Mapping[str, str] = os.environ, code: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """`python WORDS` by a new interpreter, which must end with this exit code (None: any)."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert code in (None, done.returncode), done.stdout + done.stderr
    return done


def start_fork_server() -> None:
    """Once in each test process; whoever forks from it first must ask for it here."""
    with _STARTING:
        multiprocessing.set_forkserver_preload(list(PRELOADED))
        before = os.getcwd()
        os.chdir(ROOT)  # where the server looks for modules
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            os.chdir(before)


def _run_words(
    words: list[str],
    environment: dict[str, str],
    out: Path,
    err: Path,
    folder: Path,
    new_session: bool,
    limits: dict[int, int],
) -> None:
    """In the forked process: make it what a new interpreter is, run the words, and end."""
    if new_session:
        os.setsid()
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=False)
    os.chdir(folder)
    others = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [str(ROOT), *filter(None, others)]
    multiprocessing.set_start_method(None, force=True)
    # Folders for temporary files: where this environment says, and none of the test process's,
    # into which other users may not write.
    tempfile.tempdir = None
    multiprocessing.current_process()._config.pop("tempdir", None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    # As a new interpreter, which draws the seeds of all three.
    torch.seed()
    random.seed()
    np.random.seed()  # noqa: NPY002
    os._exit(_exit_code(words))


def _exit_code(words: list[str]) -> int:
    """The end of an interpreter, in its order: the script, its threads, what it registered."""
    code = 0
    try:
        _execute(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _execute(words: list[str]) -> None:
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def found_by_each(size: int, function: Callable[..., Any], *arguments) -> list[Any]:
    """function(World, *arguments), a module's own, in `size` processes; their results by rank."""
    start_fork_server()
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            _work,
            (size, folder, function, arguments),
            nprocs=size,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + PATIENCE
        try:
            while not context.join(timeout=5):
                assert time.monotonic() < deadline, "the processes hang"
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _work(rank: int, size: int, folder: str, function: Callable, arguments: tuple) -> None:
    multiprocessing.set_start_method(None, force=True)  # else each starts a fork server of its own
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
    start_fork_server()
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
                assert time.monotonic() - started < PATIENCE, "the processes hang"
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
