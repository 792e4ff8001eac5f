"""How much of a run's time its devices wait for data, and what would change that (ours)."""

import torch

from datasets.ahead import Wait
from datasets.loader import usable_workers
from utils import distributed
from utils.config import Node, crops_on_device
from utils.distributed import World

MUCH = 10.0  # percent of the time, above which it is said what to change
STEPS = 50  # that are judged together: loader processes bring batches in bursts


class DataWaits:
    """The waits for batches since the last line of the log; one sentence where they are long."""

    def __init__(self, cfg: Node, world: World) -> None:
        self._cfg, self._world = cfg, world
        self._waits: list[Wait] = []
        self._steps, self._waited, self._time = 0, 0.0, 0.0  # that are judged next
        self._said = False

    def add(self, wait: Wait) -> None:
        """Count one batch's; nobody waits."""
        self._waits.append(wait)

    def share(self, steps: int, seconds: float) -> float:
        """Percent of the last `seconds`, in which so many steps were made, that a device waited.

        That of the process that waited most, for the others wait for it in every step. All
        processes ask together, when their devices have come to the end of the steps.
        """
        waited = torch.tensor([sum((wait.seconds() for wait in self._waits), 0.0)])
        self._waits.clear()
        most = distributed.gather(waited.to(self._world.device)).max().item()
        self._steps, self._time = self._steps + steps, self._time + seconds
        self._waited += most
        return 100 * most / seconds

    def advice(self) -> str | None:
        """What to do about the waiting: once, when it was long for STEPS steps; None else."""
        if self._said or self._steps < STEPS:
            return None
        share = 100 * self._waited / self._time
        self._steps, self._waited, self._time = 0, 0.0, 0.0
        if share <= MUCH:
            return None
        self._said = True
        return f"{share:.0f} % of the time the {self._world.device.type} waits for data: " + faster(
            self._cfg, self._world.device.type, usable_workers(10**9), distributed.processes_here()
        )


def faster(cfg: Node, device: str, cores: int, processes: int) -> str:
    """What would bring data faster, of what this run leaves open.

    device: "cuda" or "cpu". cores: that this process may use, perhaps together with others of
    the `processes` on its machine.
    """
    data, workers = cfg.DATA, usable_workers(cfg.DATA.WORKERS)
    going_on, anew = [], []
    if processes * (workers + 1) < cores:
        going_on.append(f"raise DATA.WORKERS (now {workers}; processes {processes}, cores {cores})")
    if data.CACHE == "none":
        kept = "DATA.CACHE ram (or device)" if device == "cuda" else "DATA.CACHE ram"
        if crops_on_device(cfg):
            going_on.append(f"set {kept}, if the decoded images fit")
        else:
            anew.append(f"{kept} or DATA.CROPS device" if device == "cuda" else kept)
        going_on.append("put the images on a faster disk")
        anew.append("smaller copies of the images")
    elif data.CACHE == "ram" and device == "cuda":
        going_on.append("set DATA.CACHE device, if the images fit there")
    if not going_on:
        going_on.append("give each process more cores")
    ways = f"stop the run, {', or '.join(going_on)}, and the same command goes on"
    return ways + (f"; a new run can have {', or '.join(anew)}" if anew else "")
