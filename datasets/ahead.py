"""Batches on their way to the device: copied one ahead of the step, and how long it waits for them.

(Ours.)
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")
Moment = float | torch.cuda.Event


@dataclass(frozen=True)
class Wait:
    """The time in which a device had nothing to do but to wait for its batch.

    On a CPU between two readings of the host's clock. On a GPU between two events in its own queue,
    one before and one after the batch was asked for: while the queue holds work, the GPU passes
    them at once, however long the host has waited; if it has run dry, it waits from one to the
    other.
    """

    began: Moment
    ended: Moment

    def seconds(self) -> float:
        """Its length; the host waits until the GPU has come so far."""
        if isinstance(self.began, float):
            return self.ended - self.began
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1e3


def now(device: torch.device) -> Moment:
    """The end of what the device has been given to do so far."""
    if device.type != "cuda":
        return time.perf_counter()
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items in order; when one is handed out the next has been taken, and it is not held."""
    items = iter(items)
    waiting = list(islice(items, 1))
    while waiting:
        waiting += islice(items, 1)
        yield waiting.pop(0)


def transferred(items: Iterable[S], move: Callable[[S], T], device: torch.device) -> Iterator[T]:
    """move(item), which copies to the device, of each item; on a GPU one ahead and beside the step.

    move: copies from pinned memory without waiting. What it gives may be read by what is queued
    before the next is asked for, and no later: the copy after next may take its memory.
    """
    if device.type != "cuda":
        return map(move, items)
    copies = torch.cuda.Stream(device)

    def begin(item: S) -> tuple[T, torch.cuda.Event]:
        # Memory that comes back to this stream was read on the other one, by what is queued there.
        copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            return move(item), copies.record_event()

    def arrived(begun: tuple[T, torch.cuda.Event]) -> T:
        result, done = begun
        # Not for the whole stream, in which the next copy is under way.
        torch.cuda.current_stream(device).wait_event(done)
        return result

    return map(arrived, ahead(map(begin, items)))
