"""Contestants in processes of their own that take turns, so that nothing runs beside a step.

Each process builds its step, says so, and then waits: a line "step" on its standard input runs
one and answers its time, "peak" answers the peak memory since the process was "reset", and
"profile" runs one more step and answers where its time went. Apart, because two projects may use
the same module names, and because peak memory is a process's. This file imports nothing of the
project, for the reference's process has other modules.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

ROOT = Path(__file__).resolve().parents[1]


def take_stdout() -> TextIO:
    """The way to the parent, first of all: what the contestant prints from here on is no answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(step: Callable[[], None], device: str, answers: TextIO) -> None:
    """Answer the parent's lines until it closes the pipe; called by a contestant's process."""

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer("ready")
    for line in sys.stdin:
        if line.strip() == "step":
            synchronize(device)
            began = time.perf_counter()
            step()
            synchronize(device)
            answer(time.perf_counter() - began)
        elif line.strip() == "reset":
            reset_peak(device)
            answer("reset")
        elif line.strip() == "profile":
            answer(profile(step, device))
        else:
            answer(peak(device))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Forget the peak so far: building, compiling and warming up are not the step."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> float:
    """Peak memory in GiB: allocated on the GPU, or the process's resident set on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    (high,) = (line for line in lines if line.startswith("VmHWM"))
    return int(high.split()[1]) / 2**20


def profile(step: Callable[[], None], device: str, most: int = 20) -> list[dict]:
    """The operators that take most time of a step, by their own time on the device."""
    with torch.profiler.profile() as profiler:
        step()
        synchronize(device)
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, own), reverse=True)
    whole = sum(getattr(event, own) for event in events)
    return [
        {
            "operator": event.key,
            "calls": event.count,
            "milliseconds": getattr(event, own) / 1e3,
            "share": getattr(event, own) / whole,
        }
        for event in events[:most]
    ]


class Contestant:
    """The parent's end of one process that was started with `command`."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name, self.seconds = name, []
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def _read(self) -> object:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: the process of '{self.name}' ended; what it said stands above.")
        return json.loads(line)

    def _ask(self, word: str) -> object:
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._read()

    def step(self, counts: bool) -> None:
        seconds = self._ask("step")
        if counts:
            self.seconds.append(seconds)

    def reset_peak(self) -> None:
        self._ask("reset")

    def profile(self) -> list[dict]:
        """Where the time of one more step goes; see the function of this name."""
        return self._ask("profile")

    def finish(self) -> float:
        """Peak memory in GiB; ends the process."""
        memory = self._ask("peak")
        self._process.stdin.close()
        self._process.wait()
        return memory


def take_turns(contestants: list[Contestant], warm_up: int, steps: int) -> None:
    """`warm_up` steps that do not count, then `steps` that do, one of each in turn."""
    for turn in range(warm_up + steps):
        for contestant in contestants:
            if turn == warm_up:
                contestant.reset_peak()
            contestant.step(counts=turn >= warm_up)
