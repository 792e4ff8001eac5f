"""SIGTERM and SIGUSR1: what they do before a loop begins, in it, after it, and in children."""

import os
import signal
import time

import pytest
import torch.distributed as dist

from tests.processes import ended_ranks, launch_python
from utils import distributed
from utils.signals import (
    EXIT_PREEMPTED,
    STOP_SIGNALS,
    Preempted,
    StopSignals,
    held,
    outlive_signals,
)

pytestmark = pytest.mark.usefixtures("own_handlers")


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_before_the_loop_raises_at_once(number):
    with pytest.raises(Preempted, match=f"by {signal.Signals(number).name} before"), StopSignals():
        send(number)


def test_preempted_is_not_taken_for_a_broken_file():
    def read_a_file() -> None:
        try:
            send(signal.SIGTERM)
        except Exception:
            pytest.fail("it was swallowed")

    with StopSignals(), pytest.raises(Preempted):
        read_a_file()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_in_the_loop_the_first_signal_is_noted_and_the_others_change_nothing(number):
    (other,) = {*STOP_SIGNALS} - {number}
    with StopSignals() as signals:
        signals.defer()
        assert signals.received is None
        send(number, other, number)
        assert signals.received == signal.Signals(number).name


def test_after_the_block_the_handlers_of_before_are_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_preempted_process_on_its_way_out_is_not_cut_short():
    def loop() -> None:
        with StopSignals() as signals:
            signals.defer()
            raise Preempted("all is saved")

    with pytest.raises(Preempted):
        loop()
    send(*STOP_SIGNALS)  # a launcher ends the others as soon as one has left


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ([signal.SIGTERM], -signal.SIGTERM),
        ([signal.SIGUSR1], 7),
        ([signal.SIGUSR1, signal.SIGTERM], -signal.SIGTERM),
    ],
)
def test_a_forked_child_takes_sigterm_as_the_end_and_sigusr1_as_nothing(numbers, status):
    with StopSignals() as signals:
        child = os.fork()
        if child == 0:
            send(*numbers)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
        assert signals.received is None


def ends_by_its_parents_sigterm(child: int, reading: int) -> bool:
    """Whether a child that has told that it is alive does."""
    assert os.read(reading, 5) == b"alive"
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def tell_when_taken(writing: int) -> None:
    """In a child: once its own SIGTERM is taken, with which another would be merged; then wait."""
    while signal.SIGTERM in signal.sigpending():
        time.sleep(0.001)
    os.write(writing, b"alive")
    signal.pause()


def test_only_its_parents_sigterm_ends_a_loader_worker():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        outlive_signals(0)
        send(signal.SIGTERM, signal.SIGUSR1)
        tell_when_taken(writing)
    assert ends_by_its_parents_sigterm(child, reading)


def test_a_signal_at_the_birth_of_a_loader_worker_does_not_hit_it():
    reading, writing = os.pipe()
    with StopSignals() as signals, held():
        child = os.fork()
        if child == 0:
            send(signal.SIGTERM, signal.SIGUSR1)
            outlive_signals(0)
            tell_when_taken(writing)
    assert ends_by_its_parents_sigterm(child, reading)
    assert signals.received is None


CODES = [(signal.SIGUSR1, EXIT_PREEMPTED), (signal.SIGTERM, 1)]


def signalled(number: int) -> None:
    """All processes get a signal before they meet, as from a scheduler or a launcher."""
    with StopSignals():
        send(number)


@pytest.mark.parametrize(
    ("size", "number", "code"),
    [(1, signal.SIGTERM, EXIT_PREEMPTED), *((2, *signal_and_code) for signal_and_code in CODES)],
)
def test_at_start_up_a_launchers_sigterm_to_a_group_is_no_preemption(size, number, code):
    """It may come because another process was refused, and would be for ever."""
    first, *others = ended_ranks(size, signalled, number)
    assert {end.code for end in (first, *others)} == {code}
    (line,) = first.said
    kind = "preempted" if code == EXIT_PREEMPTED else "error"
    sentence = f"stopped by {number.name} before the first step: nothing was lost"
    assert line.startswith(f"{kind}: {sentence}")
    assert [end.said for end in others] == [[]] * (size - 1)


def first_is_signalled(number: int) -> None:
    with StopSignals():
        world = distributed.start("cpu", 1)
        if world.is_main:
            send(number)
        dist.barrier()


@pytest.mark.parametrize(("number", "code"), CODES)
def test_before_the_first_step_one_process_ends_at_once_and_the_others_after_it(number, code):
    ended = ended_ranks(2, first_is_signalled, number)
    assert [end.code for end in ended] == [code, 1]


def test_a_loader_worker_whose_parent_died_while_it_was_started_ends(environment):
    """It would have said that it stays."""
    code = """
import multiprocessing, os, time
from utils.signals import end_if_orphaned

def work(parent):
    while os.getppid() == parent:
        time.sleep(0.01)
    end_if_orphaned(0)
    print("stays", flush=True)

multiprocessing.set_start_method("fork")
end_if_orphaned(0)
multiprocessing.Process(target=work, args=(os.getpid(),)).start()
print("begun", flush=True)
os._exit(0)
"""
    # Its output ends when the worker does.
    assert launch_python("-c", code, environment=environment).stdout == "begun\n"
