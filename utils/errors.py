"""The one exception that speaks to the user.

Entry scripts turn it into one plain line on stderr and exit code 2; anything else
that escapes is a bug of ours and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable


class InputError(Exception):
    """The user's input cannot be worked with: what is wrong, where, and what to do.

    everywhere: all processes raise it together, so that one of each machine speaks for them.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def run_script(main: Callable[[], None], if_interrupted: str = "nothing was changed") -> None:
    """Run an entry script: an `InputError` becomes one line and exit code 2, Ctrl-C 130."""
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        main()
    except InputError as error:
        if speaks or not error.everywhere:
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(2)
    except KeyboardInterrupt:
        if speaks:
            print(f"interrupted: {if_interrupted}", file=sys.stderr, flush=True)
        _leave(130)


def _leave(code: int) -> None:
    """End the process with this exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A process group in which others still wait cannot be taken apart in order: at the
        # interpreter's exit gloo's threads may abort the process, which hides the code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
