"""A list of a million strings that costs a process their bytes alone."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


class Strings(Sequence[str]):
    """Strings without zero bytes, as paths are, in one tensor; each is made when it is asked for.

    A list of strings is copied into every loader process, for Python writes into each string how
    often it is referred to. Forked processes share this one's memory, and others that
    multiprocessing starts are handed it in shared memory.

    packed: uint8, in UTF-8 with a zero byte between two; bytes that are none of UTF-8, which names
    of files may hold, as Python has them in strings ("surrogateescape").
    """

    def __init__(self, packed: Tensor) -> None:
        ends = np.flatnonzero(packed.numpy() == 0)
        # No view of their memory is kept: it moves when multiprocessing shares a tensor.
        self.packed = packed
        self._ends = torch.from_numpy(np.append(ends, len(packed)) if len(packed) else ends)

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        """These strings, in this order."""
        if isinstance(strings, Strings):
            return strings
        packed = bytearray("\0".join(strings).encode(errors="surrogateescape"))
        return cls(torch.from_numpy(np.frombuffer(packed, np.uint8)))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int | slice) -> "str | Strings":
        if isinstance(index, slice):
            return Strings.of([self[i] for i in range(len(self))[index]])
        index = range(len(self))[index]
        start = self._ends[index - 1].item() + 1 if index else 0
        return self._text(start, self._ends[index].item())

    def __iter__(self) -> Iterator[str]:
        return iter(self._text(0, len(self.packed)).split("\0") if len(self) else ())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    def _text(self, start: int, end: int) -> str:
        return str(self.packed[start:end].numpy(), "utf-8", "surrogateescape")
