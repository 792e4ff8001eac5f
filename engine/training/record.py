"""What a run keeps beside its step: figures of an unfinished line, warnings, bad images."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.training.bad_images import BadImages
from engine.training.health import CollapseWatch
from engine.training.standing import Standing
from utils import distributed
from utils.distributed import World


class Window:
    """Means of device scalars over the good steps since the last line, without host syncs.

    Where no step was good they are NaN. A window that a checkpoint falls into is kept in it.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None  # of the figures, and the number of good steps

    def add(self, figures: Mapping[str, Tensor], good: Tensor) -> None:
        """Add one step's figures, the same names every time, where `good` (bool, on the device)."""
        self._names = list(figures)
        ones = torch.ones_like(good, dtype=torch.float32)
        values = torch.stack([*(value.detach().float() for value in figures.values()), ones])
        values = torch.where(good, values, 0.0)  # not a product: 0 * NaN is NaN
        self._sums = values if self._sums is None else self._sums + values

    def fetch(self, extra: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over window and processes, and `extra` meant over processes; starts anew.

        The one host sync of a log line.
        """
        names = [*self._names, *extra]
        values = [self._sums[:-1] / self._sums[-1]]
        if extra:
            values.append(torch.stack([value.float() for value in extra.values()]))
        means = (distributed.total(torch.cat(values)) / distributed.size()).tolist()
        self._sums = None
        return dict(zip(names, means, strict=True))

    def state_dict(self) -> dict[str, list[str] | Tensor | None]:
        """The names, and the sums of all processes, float32 [processes, F + 1]; a collective."""
        if self._sums is None:
            return {"names": [], "sums": None}
        return {"names": self._names, "sums": distributed.gather(self._sums[None])}

    def load_state_dict(self, state: Mapping[str, list[str] | Tensor | None], world: World) -> None:
        """Take this process's sums; with another number of processes, the mean of all."""
        self._names, self._sums = list(state["names"]), None
        if (sums := state["sums"]) is not None:
            mine = sums[world.rank] if len(sums) == world.size else sums.mean(0)
            self._sums = mine.to(world.device)


@dataclass
class Record:
    """What a run keeps beside its step, and a checkpoint with it.

    window: figures since the last line of the log; watch: how long they have looked bad;
    standing: the features' figures at the start and at their best;
    log_lines: lines of log.txt as of the last checkpoint; log_step: the step, as the log numbers
    it, at which a resumed run goes on; images: the fingerprint of the training images.
    """

    bad_images: BadImages
    images: str
    window: Window = field(default_factory=Window)
    watch: CollapseWatch = field(default_factory=CollapseWatch)
    standing: Standing = field(default_factory=Standing)
    log_lines: int = 0
    log_step: int = 0

    def state(self) -> dict:
        """Tensors and plain data; all processes ask together."""
        return {
            "window": self.window.state_dict(),
            "watch": self.watch.state_dict(),
            "standing": self.standing.state_dict(),
            "bad_images": dict(self.bad_images.known),
            "images": self.images,
            "log_lines": self.log_lines,
        }
