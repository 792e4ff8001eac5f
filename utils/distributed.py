"""Processes: joining a group, and the collectives that losses and logs need.

In one process every collective is the identity, so nothing above needs to know.
"""

import inspect
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import launch
from utils.errors import InputError

T = TypeVar("T")
PATIENCE = 20.0  # seconds of waiting for other processes after which a line says so
# For what goes from host to host, past the devices: gloo's group beside nccl's. None: gloo's is the
# only one.
_hosts: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """This process's place: rank of world processes, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = World(0, 1, torch.device("cpu"))  # this process by itself, whatever others there are


def start(device: str = "auto", timeout_minutes: float = 30.0) -> World:
    """Join the process group that a launcher describes (utils/launch.py), if any.

    device: auto (a GPU where there is one) | cpu | cuda. nccl on GPUs, gloo on the CPU.
    Raises InputError when a GPU is asked for and there is none for this process, and when the
    launcher's variables are not as they should be.
    """
    global _hosts
    rank, size, local_rank = launch.place()
    device = kind_of_device(device)
    place = _gpu(local_rank) if device == "cuda" else torch.device("cpu")
    if size == 1:
        return World(rank, size, place)
    timeout = timedelta(minutes=timeout_minutes)
    store = _meet(rank, size, timeout)
    store.set_timeout(timeout)
    # torchrun keeps one store over its restarts, with the addresses of those who died.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        # Where nccl gives up it aborts without a word; gloo is to do so before.
        timeout=timeout * 1.2 if device == "cuda" else timeout,
        device_id=place if device == "cuda" else None,
    )
    if device == "cuda":
        _hosts = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, size, place)


def kind_of_device(device: str) -> str:
    """DEVICE as "cuda" or "cpu"."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _gpu(local_rank: int) -> torch.device:
    """This process's GPU; the only one that it sees, where each sees one of its own."""
    count = torch.cuda.device_count()
    if not count:
        raise InputError("DEVICE cuda: no GPU was found on this machine. Set DEVICE cpu (or auto).")
    if local_rank >= count > 1:
        raise InputError(
            f"DEVICE cuda: process {local_rank} of this machine has no GPU ({count} found). Start "
            f"at most {count} processes here, or set DEVICE cpu."
        )
    place = torch.device("cuda", local_rank if count > 1 else 0)
    torch.cuda.set_device(place)
    return place


def _meet(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, once all processes have reached it.

    By a thread: Python runs signal handlers in the main thread alone, and not while that waits in
    C++ code.
    """
    pool = ThreadPoolExecutor(1)
    meeting = pool.submit(lambda: next(dist.rendezvous("env://", rank, size, timeout=timeout)))
    try:
        if not wait([meeting], PATIENCE).done:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            print(f"rank {rank} of {size} waits for the others at {place}", file=sys.stderr)
        store, _, _ = meeting.result()
    finally:
        pool.shutdown(wait=False)
    return store


def wrap(module: nn.Module, world: World) -> nn.Module:
    """The module in DistributedDataParallel; itself in one process.

    Its buffers are constants or BatchNorm's statistics, which GPUs share by SyncBatchNorm:
    none is sent around at every forward.
    """
    if world.size == 1:
        return module
    # torch 2.15 renamed the argument.
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(
        module,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{sync: False},
    )


def stop() -> None:
    """Leave the process group, if one was joined; all processes together."""
    global _hosts
    if dist.is_available() and dist.is_initialized():
        gather_objects(None)  # a barrier between hosts
        # gloo's thread frees the last collective's tensors under Python's lock. Were the group
        # destroyed meanwhile, which joins that thread under the same lock, both would wait for
        # ever (seen with torch 2.11, once in a few hundred runs). Asleep we do not hold it.
        time.sleep(0.2)
        dist.destroy_process_group()
        _hosts = None


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def processes_here() -> int:
    """Processes of the run on this machine, by the launcher's variable (utils/launch.py)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def gather(tensor: Tensor) -> Tensor:
    """Equally shaped tensors [B, ...] of all processes, concatenated by rank; no gradient."""
    if size() == 1:
        return tensor.detach()
    found = tensor.new_empty(size() * len(tensor), *tensor.shape[1:])
    dist.all_gather(list(found.chunk(size())), tensor.detach().contiguous())
    return found


def permuted(tensor: Tensor, order: Tensor) -> Tensor:
    """This process's B rows of gather(tensor)[order], sent without the others; no gradient.

    tensor: [B, ...], equally shaped on all processes; order: int64 [P * B] on the CPU, the same
    permutation on all.
    """
    own, asked = position(), order.view(size(), -1)  # by each process, B rows
    holders = asked // len(tensor)
    sent = (asked[holders == own] - own * len(tensor)).to(tensor.device, non_blocking=True)
    rows = tensor.detach()[sent].contiguous()
    if size() == 1:
        return rows
    found, counts = torch.empty_like(rows), holders[own].bincount(minlength=size())
    dist.all_to_all_single(found, rows, counts.tolist(), (holders == own).sum(1).tolist())
    # They came by holder, each one's in the order in which they were asked for.
    places = holders[own].argsort(stable=True).argsort()
    return found[places.to(tensor.device, non_blocking=True)]


@torch.no_grad()
def gather_rows(batches: Sequence[Tensor]) -> Tensor:
    """Rows [n, ...] of all processes by rank, on every process; each has its own in batches.

    batches: [b, ...] each, on the CPU; none where a process has no row, but not on all. Each
    process's rows go straight to their place in the result: nothing is held twice.
    """
    kind = (batches[0].shape[1:], batches[0].dtype) if batches else None
    found = gather_objects((sum(map(len, batches)), kind))
    shape, dtype = next(kind for _, kind in found if kind)
    counts = [count for count, _ in found]
    rows = torch.empty(sum(counts), *shape, dtype=dtype)
    parts = rows.split(counts)
    if batches:
        torch.cat(batches, out=parts[position()])
    for rank, part in enumerate(parts):
        if size() > 1 and len(part):
            dist.broadcast(part, rank, group=_hosts)
    return rows


def gather_objects(value: object, on_all: bool = True) -> list:
    """Each process's value (plain data, small), by rank, on every process; between hosts.

    Unless `on_all`, values may be large: they come to rank 0 alone, and None for each elsewhere.
    """
    if size() == 1:
        return [value]
    values: list = [None] * size()
    if on_all:
        dist.all_gather_object(values, value, group=_hosts)
    else:
        dist.gather_object(value, values if position() == 0 else None, 0, group=_hosts)
    return values


def of_main(value: T) -> T:
    """Rank 0's value (plain data, tensors on the CPU) on every process; between hosts."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values, 0, group=_hosts)
    return values[0]


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes; no gradient."""
    result = tensor.detach().clone()
    if size() > 1:
        dist.all_reduce(result)
    return result


def totals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of several tensors, by one exchange, in the widest of their types; no gradient."""
    sums = total(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = sums.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def share(items: int, world: World) -> range:
    """This process's contiguous share of 0 .. items - 1; shares differ by at most one."""
    return range(items * world.rank // world.size, items * (world.rank + 1) // world.size)


def agree(facts: dict[str, object], advice: str) -> None:
    """Raise InputError on all processes unless all have the same facts (plain data)."""
    everyone = gather_objects(facts)
    for name in facts:
        values = [theirs[name] for theirs in everyone]
        if any(value != values[0] for value in values):
            raise InputError(f"the processes differ in {name} ({values}): {advice}.")


def on_main(function: Callable[[], T]) -> T:
    """What `function` gives on rank 0, which calls it alone while the others wait, on all.

    What it gives can be pickled and may be large. Its InputError is raised on all. Of any other
    exception, which rank 0 raises, the others are told by a DistError, as of a broken exchange.
    """
    value = said = failed = None
    if position() == 0:
        try:
            value = function()
        except InputError as error:
            said = str(error)
        except Exception as error:
            failed = error
    value, said, told = of_main((value, said, failed and f"on rank 0 {failed!r}"))
    if failed is not None:
        raise failed
    if told is not None:
        raise dist.DistError(told)
    if said is not None:
        raise InputError(said)
    return value


def on_all(function: Callable[[], T]) -> T:
    """What `function` gives here; where it raises InputError on one process, on all the first's."""
    value = said = None
    try:
        value = function()
    except InputError as error:
        said = str(error)
    for other in gather_objects(said):
        if other is not None:
            raise InputError(other)
    return value


class Ballot:
    """Small counts that all processes cast at every step, and whose sums all learn alike.

    So they decide the same at the same step, such as to stop for a signal. With several processes
    the sums come one call later: nobody waits for those who are a little behind, and no device.
    """

    def __init__(self) -> None:
        self._cast: tuple[Tensor, dist.Work] | None = None

    def cast(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The sums over processes of what was cast at the call before; alone: of this one.

        counts: the same names on all processes at every call.
        """
        if size() == 1:
            return dict(counts)
        before = self._cast
        mine = torch.tensor(list(counts.values()))
        self._cast = mine, dist.all_reduce(mine, group=_hosts, async_op=True)
        if before is None:
            return dict.fromkeys(counts, 0)
        sums, work = before
        work.wait()
        return dict(zip(counts, sums.tolist(), strict=True))

    def close(self) -> None:
        """Wait for what was cast last, of which nobody will ask; all processes together."""
        if self._cast is not None:
            self._cast[1].wait()


def position() -> int:
    """This process's rank, which is where its rows stand in what `gather` returns."""
    return dist.get_rank() if size() > 1 else 0
