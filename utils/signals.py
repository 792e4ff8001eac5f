"""SIGTERM and SIGUSR1, which schedulers send before they kill, end a run in order. (Ours.)"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """The run was asked to stop and has lost nothing; str() is one sentence, `code` the exit code.

    Like KeyboardInterrupt it is no Exception, which would pass for a broken image or checkpoint.
    """

    def __init__(self, message: str, code: int = EXIT_PREEMPTED) -> None:
        super().__init__(message)
        self.code = code


class StopSignals:
    """In its block SIGTERM and SIGUSR1 stop the run; only in the main thread.

    Until `defer` is called a signal raises `Preempted` at once: there is nothing to save yet. After
    it a signal only sets `received`. The first signal counts; later ones, of either kind, change
    nothing, nor do any after a `Preempted` has left the block.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # the signal's name
        self._deferred = False
        self._owner = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        self._owner = os.getpid()
        for number in STOP_SIGNALS:
            # None: what was there was not set from Python and cannot be set again.
            self._before[number] = signal.signal(number, self._handle) or signal.SIG_DFL
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The way out of a preempted process is not to be cut short: a launcher that sees the
        # first process of a group leave sends SIGTERM to those that are leaving too.
        is_stopping = kind is not None and issubclass(kind, Preempted)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if is_stopping else handler)

    def defer(self) -> None:
        """From now on a signal only sets `received`."""
        self._deferred = True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked child has the handler. SIGTERM ends it, as its parent's terminate() expects;
            # SIGUSR1 is not meant for it.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif self.received is None:
            self.received = signal.Signals(number).name
            if not self._deferred:
                # To one of several processes SIGTERM may come from a launcher because another has
                # failed: as a preemption, the job would be started again and again.
                is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
                raise Preempted(
                    f"stopped by {self.received} before the first step: nothing was lost; the "
                    f"same command starts again.",
                    EXIT_PREEMPTED if is_alone or number == signal.SIGUSR1 else 1,
                )


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Processes that are forked in the block are born with the stop signals held back.

    For loader workers: none is hit before `outlive_signals` runs in it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_if_orphaned(worker_id: int) -> None:
    """A loader's worker_init_fn: a worker whose parent died while it was started ends at once.

    torch's own watch begins later, takes whoever is the parent then for the one that started it,
    and so would wait for ever.
    """
    parent = multiprocessing.parent_process()
    if multiprocessing.get_start_method() == "fork" and parent and os.getppid() != parent.pid:
        os._exit(1)


def outlive_signals(worker_id: int) -> None:
    """A loader's worker_init_fn: signals to all processes of a job leave this one alive.

    Its batches are still needed for the steps before the run stops. SIGTERM ends it only where its
    own parent sends it, as multiprocessing does at exit. (macOS does not say who sends.)
    """
    end_if_orphaned(worker_id)
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)
