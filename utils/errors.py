"""The one exception that speaks to the user.

Entry scripts turn it into one plain line on stderr and exit code 2; anything else
that escapes is a bug of ours and keeps its traceback.
"""

import os
import sys
import traceback
from collections.abc import Callable

from utils import failure
from utils.signals import EXIT_PREEMPTED, Preempted

LONGEST_MESSAGE = 1500  # characters


class InputError(Exception):
    """The user's input cannot be worked with: what is wrong, where, and what to do.

    One line of printable text, whatever the message quotes; of a long one the middle is left out.
    everywhere: all processes raise it together, so that one of each machine speaks for them.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        super().__init__(_one_line(message))
        self.everywhere = everywhere


def _one_line(text: str) -> str:
    if not text.isprintable():
        escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        text = "".join(escaped)
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE // 2]} [...] {text[-LONGEST_MESSAGE // 2 :]}"
    return text


def run_script(main: Callable[[], None], if_interrupted: str = "nothing was changed") -> None:
    """Run an entry script; the exit code tells how it ended:

    ====  ==========================================================================
       0  done
       2  the run cannot go on as asked (`InputError`: bad input, a full disk, numbers
          that went wrong): one line on stderr
      75  preempted (`Preempted`): nothing was lost, the same command goes on
     130  Ctrl-C
       1  anything else: a bug of ours with its traceback, too little memory, or, with
          several processes, the end of another one, which a line names
    ====  ==========================================================================

    With several processes each ends by `os._exit`, one of each machine speaks for them, and
    the others are told why (utils/failure.py). A launcher may have exit codes of its own:
    torchrun ends with 1 whatever its processes' codes.
    """
    try:
        main()
    except InputError as error:
        other = failure.gone(str(error)) if error.everywhere else failure.failed(str(error))
        _say(f"error: {error}", _is_first_here() or not error.everywhere)
        _leave(2, other)
    except Preempted as stopped:
        other = failure.gone(str(stopped))
        # Of a group that does not stand yet one may have failed, which must not start again.
        is_sure = _alone() or failure.is_watched() or not stopped.perhaps_of_launcher
        _say(f"{'preempted' if is_sure else 'error'}: {stopped}", _is_first_here() and not other)
        _leave(1 if other or not is_sure else EXIT_PREEMPTED, other)
    except KeyboardInterrupt:
        failure.gone("Ctrl-C")
        _say(f"interrupted: {if_interrupted}", _is_first_here())
        _leave(130)
    except Exception as error:
        _leave_after(error)
        raise
    failure.end()


def _leave_after(error: Exception) -> None:
    """End with exit code 1 for what is neither the user's fault nor their wish.

    Returns for a bug in a process that is alone: there Python does the same.
    """
    text = _one_line(f"{type(error).__name__}: {error}")
    sentence = _short_of_memory(error)
    if _is_broken_collective(error):
        other = failure.broken(text)
        if not other and not failure.is_watched():
            place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            sentence = f"the processes did not all come together at {place}: {text}"
        if not other:
            _say(f"error: {sentence}") if sentence else traceback.print_exc()
        _leave(1, other)
    other = failure.failed(sentence or text)
    if sentence:
        _say(f"error: {sentence}")
    elif _alone():
        return
    elif other:
        # What came after the first failure may well be its consequence.
        _say(f"error: rank {os.environ.get('RANK', '?')} failed later: {text}")
    else:
        traceback.print_exception(error)
    _leave(1, other)


def _is_broken_collective(error: Exception) -> bool:
    """Whether others had a part in it; gloo raises RuntimeError, c10d and nccl their own kinds."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or ("RuntimeError" in kinds and "gloo" in str(error))


def _short_of_memory(error: Exception) -> str:
    """One sentence for the failures that only tell of too little memory; else empty."""
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"the GPU's memory is too small for these options: lower TRAIN.BATCH_SIZE_PER_GPU and "
            f"raise TRAIN.ACCUM_STEPS by the same factor, or set TRAIN.CHECKPOINTING true "
            f"({_one_line('. '.join(str(error).split('. ')[:2]))})"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return (
            f"this machine's memory is too small for these options: lower "
            f"TRAIN.BATCH_SIZE_PER_GPU, HEAD.OUT_DIM or DATA.WORKERS ({_one_line(str(error))})"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
        return (
            f"a loader process was killed, most often for want of memory: lower DATA.WORKERS "
            f"({_one_line(str(error))})"
        )
    return ""


def _alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _is_first_here() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _say(line: str, is_mine: bool = True) -> None:
    if is_mine:
        print(line, file=sys.stderr, flush=True)


def _leave(code: int, other: str = "") -> None:
    """End the process with this exit code; other: which process failed before it, and why."""
    if other and failure.speaks():
        _say(f"error: {other}")
    if not _alone():
        # A process group in which others still wait cannot be taken apart in order: at the
        # interpreter's exit gloo's threads may abort the process, which hides the code.
        sys.stdout.flush()
        sys.stderr.flush()
        failure.drain()
        os._exit(code)
    sys.exit(code)
