"""What --check has found: plain data, of which check.json is made, and the same in words."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from utils.errors import InputError

SHOWN = 10  # entries of each list, in words; the JSON has all
T = TypeVar("T")


@dataclass
class Findings:
    """Sections are dicts of plain data, None where there was nothing to look at.

    A value whose name ends in _bytes is a number of bytes. warnings: what is unwise; problems:
    what would stop the run, each a sentence.
    """

    images: dict | None = None
    validation: dict | None = None
    crops: dict | None = None
    batch: dict | None = None
    memory: dict | None = None
    disk: dict | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, function: Callable[[], T]) -> T | None:
        """What the function gives; None where it raised an InputError, which is a problem."""
        try:
            return function()
        except InputError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def as_dict(self) -> dict:
        """All of it, and whether the run can work, for JSON."""
        return {"works": not self.problems, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """The sections in words: one line for each value, and the first entries of each list."""
        for title, section in vars(self).items():
            if isinstance(section, dict):
                yield title
                for name, value in section.items():
                    yield from _in_words(name, value)


def size_in_words(size: int) -> str:
    """Bytes as GiB, few ones as MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _in_words(name: str, value: Any) -> Iterator[str]:
    """One value's line, and below it the entries of a list, or of a dict by name."""
    label = f"  {name.removesuffix('_bytes').replace('_', ' ')}"
    if value is None:
        yield f"{label}: unknown"
    elif isinstance(value, dict | list):
        yield f"{label}: {len(value):,}"
        if isinstance(value, dict):
            entries = [f"{key}: {entry}" for key, entry in value.items()]
        else:
            entries = [" = ".join(group) for group in value]
        yield from (f"    {entry}" for entry in entries[:SHOWN])
        if len(entries) > SHOWN:
            yield f"    and {len(entries) - SHOWN:,} more"
    elif name.endswith("_bytes"):
        yield f"{label}: {size_in_words(value)}"
    elif isinstance(value, float):
        yield f"{label}: {value:.3g}"
    else:
        yield f"{label}: {value}"
