"""Who started this process and its peers: torchrun, Slurm's srun, or nobody.

torchrun and torch.distributed.launch say a process's place in the environment. What srun says is
put into the same variables, which torch and everything here read.
"""

import os
import re

from utils.errors import InputError


def place() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) of this process.

    Raises InputError where what a launcher says is missing or cannot be.
    """
    if "RANK" not in os.environ:
        _adopt()
    rank, size, local_rank = number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0)
    if "WORLD_SIZE" in os.environ and rank >= size:
        raise InputError(
            f"the launcher's variables say RANK {rank} of WORLD_SIZE {size}: ranks go from 0 to "
            f"{size - 1}."
        )
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK") if rank or local_rank or size > 1 else ()
    needed += ("MASTER_ADDR", "MASTER_PORT") if size > 1 else ()
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise InputError(
            f"of a launcher's variables some are set, but {', '.join(missing)} are not: start the "
            f"processes by torchrun or srun, or say each its place (RANK, WORLD_SIZE, LOCAL_RANK) "
            f"and all where they meet (MASTER_ADDR, MASTER_PORT)."
        )
    for name in ("MASTER_PORT", "LOCAL_WORLD_SIZE"):
        number(name, 1)
    return rank, size, local_rank


def number(name: str, default: int | None = None) -> int:
    """A whole number that a launcher sets, or `default` where it does not."""
    text = os.environ.get(name, default)
    if text is None:
        raise InputError(f"the launcher's variable {name} is not set.")
    if not str(text).isascii() or not str(text).isdigit():
        raise InputError(f"the launcher's variable {name} is '{text}', not a whole number.")
    return int(text)


def _adopt() -> None:
    """Put what srun says into torch's variables."""
    # Of srun alone: a batch script, which runs once, has SLURM_PROCID and SLURM_NTASKS too.
    if number("SLURM_STEP_NUM_TASKS", 1) == 1:
        return
    rank, size = number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS")
    if number("WORLD_SIZE", size) != size:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {size} processes were started."
        )
    nodes = _slurm("NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    address, local_size = first_node(nodes), _tasks_of_node(_slurm("TASKS_PER_NODE"))
    if address == nodes:
        address, local_size = "127.0.0.1", size
    local_rank = number("SLURM_LOCALID", rank if local_size == size else None)
    job = number("SLURM_JOB_ID", 0) + number("SLURM_STEP_ID", 0)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    if local_size:
        os.environ["LOCAL_WORLD_SIZE"] = str(local_size)
    os.environ.setdefault("MASTER_ADDR", address)
    # Below 32768, from where the system gives ports to whoever asks.
    os.environ.setdefault("MASTER_PORT", str(20000 + job % 12000))


def _slurm(name: str) -> str:
    """What Slurm says of the step, else of the job; "" where it says neither."""
    return os.environ.get(f"SLURM_STEP_{name}") or os.environ.get(f"SLURM_{name}", "")


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes: gpu003 of "gpu[003-007,9],login1"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _tasks_of_node(counts: str) -> int:
    """This node's number of processes in Slurm's "4(x2),3"; 0 where it is not said."""
    each = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
        for _ in range(int(times or 1))
    ]
    node = number("SLURM_NODEID", 0)
    return each[node] if node < len(each) else 0
