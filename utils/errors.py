"""The one exception that speaks to the user, and how an entry script ends.

Entry scripts turn an InputError into one plain line on stderr and exit code 2; anything else
that escapes is a bug of ours and keeps its traceback.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable

from utils.signals import EXIT_PREEMPTED, Preempted

LONGEST_MESSAGE = 1500  # characters
# After a broken collective, so that a launcher first meets the process that broke it. torchrun
# looks at its processes ten times a second.
SECONDS_AFTER_THE_FIRST = 1.0
# What failures for want of memory or files say -> what can be done.
SHORT = {
    ("OutOfMemoryError",): "the GPU's memory is too small for these options: lower "
    "--batch_size_per_gpu; pretraining can raise --accum_steps by the same factor and, without "
    "BatchNorm in the backbone, set TRAIN.CHECKPOINTING true",
    ("DataLoader worker (pid",): "a loader process was killed, most often for want of memory or of "
    "/dev/shm (docker run --shm-size): lower --num_workers",
    ("allocate shared memory",): "/dev/shm, by which loader processes hand over their images, is "
    "full: make it larger (docker run --shm-size), or lower --num_workers or --batch_size_per_gpu",
    ("Too many open files", "received 0 items of ancdata"): "no more files may be opened: raise "
    "the limit (ulimit -n), or lower --num_workers",
    ("MemoryError", "can't allocate memory"): "this machine's memory is too small for these "
    "options: lower --batch_size_per_gpu or --num_workers; a new pretraining can lower --out_dim",
}


class InputError(Exception):
    """The user's input cannot be worked with: what is wrong, where, and what to do.

    One line of printable text, whatever the message quotes; of a long one the middle is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def _one_line(text: str) -> str:
    if not text.isprintable():
        escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        text = "".join(escaped)
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE // 2]} [...] {text[-LONGEST_MESSAGE // 2 :]}"
    return text


def run_script(main: Callable[[], None], if_interrupted: str = "nothing was changed") -> None:
    """Run an entry script; how it ended its exit code tells (docs/reliability.md).

    Under torchrun and torch.distributed.launch the failure also goes into the file from which
    they report the first one.
    """
    try:
        main()
    except InputError as error:
        _record(error.with_traceback(None))
        # Processes often refuse alike. A launcher reports the sentence of one that does so alone;
        # without a launcher each says it.
        _leave(2, f"error: {error}", once="TORCHELASTIC_ERROR_FILE" in os.environ)
    except Preempted as stopped:
        kind = "preempted" if stopped.code == EXIT_PREEMPTED else "error"
        _leave(stopped.code, f"{kind}: {stopped}", once=True)
    except KeyboardInterrupt:
        _leave(130, f"interrupted: {if_interrupted}", once=True)
    except Exception as error:
        if sentence := _end_of_another(error):
            # Not recorded: it is a consequence, and the first failure is to be reported.
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            time.sleep(SECONDS_AFTER_THE_FIRST)
            _leave(1)
        _record(error)
        if sentence := _short_of_memory(error):
            _leave(1, f"error: {sentence}")
        if _is_alone():
            raise
        traceback.print_exc()
        _leave(1)


def _record(error: Exception) -> None:
    """Write the exception to the launcher's error file, if any, as torch's `record` does."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _end_of_another(error: Exception) -> str:
    """One sentence where an exchange between the processes broke; else empty.

    gloo raises RuntimeError, c10d and nccl kinds of DistError.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    # "enforce fail" is gloo's way to say that it was called wrongly: a bug of ours.
    of_gloo = "RuntimeError" in kinds and "gloo" in text and "enforce fail" not in text
    if not of_gloo and "DistError" not in kinds:
        return ""
    reason = _one_line(f"{type(error).__name__}: {text.split('. ')[0]}")
    if not sys.modules["torch.distributed"].is_initialized():
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        return f"the processes did not all come together at {place} ({reason})"
    return (
        f"rank {os.environ.get('RANK', '?')}: another process has ended, or did not come within "
        f"TRAIN.TIMEOUT_MINUTES, and the exchange with it failed ({reason})"
    )


def _short_of_memory(error: Exception) -> str:
    """One sentence for the failures that only tell of too little memory or files; else empty."""
    text = f"{type(error).__name__}: {error}"
    found = (advice for words, advice in SHORT.items() if any(word in text for word in words))
    advice = next(found, "")
    # A loader process's traceback is before the last line, CUDA's figures behind two sentences.
    reason = ". ".join(text.strip().splitlines()[-1].split(". ")[:2])
    return advice and f"{advice} ({_one_line(reason)})"


def _is_alone() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"


def _leave(code: int, line: str = "", once: bool = False) -> None:
    """End the process with this exit code and a last line; once: of a machine's first process."""
    if line and not (once and os.environ.get("LOCAL_RANK", "0") != "0"):
        print(line, file=sys.stderr)
    if not _is_alone():
        # A process group in which others still wait cannot be taken apart in order: at the
        # interpreter's exit gloo's threads may abort the process, which hides the code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
