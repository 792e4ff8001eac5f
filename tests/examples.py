"""How many examples hypothesis draws, the same every time."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

# Nothing is kept: a pass is a pass for ever.
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
PROFILE = {"derandomize": True, "deadline": None, "database": None}
often = settings(max_examples=200, **PROFILE)
seldom = settings(max_examples=60, **PROFILE)
