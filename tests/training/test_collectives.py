"""What processes exchange: rows to their places, word of a bad step, and how often in a step.

Three gloo processes compute every case and write it down; the tests read.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine import build
from engine.training.step import Pretraining
from losses.contrastive import KeyQueue
from losses.targets import Centres
from tests.processes import found_by_each
from tests.runs import SWIN, batch_of, crops_for, small_config
from utils import distributed
from utils.distributed import ALONE, World
from utils.errors import InputError
from utils.views import Views

WORLD, BATCH, CLASSES = 3, 4, 64
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64)
# The first, the second and the last without rows; a batch and a half each.
COUNTS = ([0, 5, 2], [3, 0, 0], [6, 6, 6])
CONTRAST = {"LOSS__OBJECTIVE": "moco_v2", "AUG__LOCAL_CROPS_NUMBER": [], "MOCO__QUEUE": 16}
# What a step exchanges beside the gradient, and how many numbers a process gives to it.
STEPS = {
    "dino": ({"LOSS__OBJECTIVE": "dino"}, [("allreduce", CLASSES + 1)]),
    "esvit": (
        {"LOSS__OBJECTIVE": "esvit", "TRAIN__ACCUM_STEPS": 2},
        [("allreduce", 2 * CLASSES + 1)],
    ),
    # The teacher's images and bags of both global crops.
    "cmd": ({}, [*[("allgather", 2 * BATCH * 32)] * 2, ("allreduce", 2 * CLASSES + 1)]),
    "cmd, no L_T": (
        {"CMD__LT": False},
        [("allgather", 2 * BATCH * 32), ("allreduce", 2 * CLASSES + 1)],
    ),
    # Crops to the groups of BatchNorm, features and embeddings back, keys for the queue.
    "moco_v2": (
        CONTRAST | SWIN | {"HEAD__USE_BN": True},
        [
            ("alltoall_base", BATCH * 3 * 32 * 32),
            ("alltoall_base", BATCH * (32 + 32)),
            ("allgather", (BATCH + 1) * 32),
        ],
    ),
}


class Exchanges(TorchDispatchMode):
    """Notes every collective and the numbers that this process gives to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_")
            given = args[0] if name == "allreduce" else args[1]
            while isinstance(given, list | tuple):
                given = given[0]
            self.found.append((name, given.numel()))
        return func(*args, **(kwargs or {}))


def exchanged(world: World, options: dict) -> tuple[list[tuple[str, int]], int]:
    """The collectives of a run's third step, and the numbers in its gradient."""
    cfg = small_config(TRAIN__BATCH_SIZE_PER_GPU=BATCH, **options)
    run = Pretraining.build(cfg, world, *build.networks(cfg), 4)
    batches = [batch_of(crops_for(run, seed)) for seed in range(2)]
    for _ in range(2):
        run.train_step(iter(batches))  # after the first the gradient's buckets are made anew
    with Exchanges() as mode:
        run.train_step(iter(batches))
    return mode.found, sum(p.numel() for p in run.student.parameters() if p.requires_grad)


def rows_of(rank: int, count: int, kind: torch.dtype, *shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(rank)
    return torch.randint(9, (count, *shape), generator=draw).to(kind)


def peak() -> int:
    """This process's largest memory since the last question, bytes."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) * 1024


def after_updates(world: World, carried: Centres | KeyQueue) -> list:
    """Whether all were good and the state, for a step that one spoils and one that nobody does."""
    found = []
    for spoilt in (1, None):
        bad = world.rank == spoilt
        value = math.nan if bad else 1.0 + world.rank
        embeddings = torch.full((2, 4), value)
        carried.collect(Views(2, embeddings, image_prototypes=torch.eye(4)))
        good = carried.update(torch.tensor(not bad))
        found.append((good, {name: v.clone() for name, v in carried.state_dict().items()}))
    return found


def found_by(world: World) -> dict:
    rank, found = world.rank, {}
    for kind in KINDS:
        for counts in COUNTS:
            own = rows_of(rank, counts[rank], kind, 2, 3)
            found["rows", kind, str(counts)] = distributed.gather_rows(
                own.split(4) if len(own) else []
            )
    found["no columns"] = distributed.gather_rows([torch.empty(rank, 0)])
    own = [torch.full((2**20,), float(rank)) for _ in range(8)]  # 32 MiB
    peak()
    before = peak()
    gathered = distributed.gather_rows(own)
    found["held"] = (peak() - before) / gathered.nbytes
    for batch in (1, 2, 5):
        order = torch.randperm(WORLD * batch, generator=torch.Generator().manual_seed(batch))
        crops = rows_of(rank, batch, torch.float32, 3, 2, 2).to(memory_format=torch.channels_last)
        moved = distributed.permuted(crops, order)
        back = distributed.permuted(moved.bfloat16(), order.argsort())
        found["permuted", batch] = moved, back, crops
    rows = torch.arange(6.0).reshape(2, 3) + 100 * rank
    found["gather"] = distributed.gather(rows.T)
    found["total"] = distributed.total(rows.requires_grad_())
    found["totals"] = distributed.totals([torch.tensor([1.0, 2.0]), torch.tensor(rank == 1)])
    found["of main"] = distributed.of_main({"rank": rank, "rows": rows.detach()})
    found["to main"] = distributed.gather_objects(rank, on_all=False)
    found["position"] = distributed.position()
    try:
        distributed.agree({"images": 8, "step": rank}, "share them")
    except InputError as error:
        found["agree"] = str(error)
    found["centres"] = after_updates(world, Centres(4, region=False))
    found["queue"] = after_updates(world, KeyQueue(7, 4, seed=0))
    for name, (options, _) in STEPS.items():
        found["step", name] = exchanged(world, options)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    """What each process found."""
    return found_by_each(WORLD, found_by)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_are_gathered_by_rank_in_any_number_and_type(ranks, kind, counts):
    wanted = torch.cat([rows_of(rank, n, kind, 2, 3) for rank, n in enumerate(counts)])
    for found in ranks:
        assert found["rows", kind, str(counts)].dtype == kind
        assert torch.equal(found["rows", kind, str(counts)], wanted)
        assert found["no columns"].shape == (3, 0)


def test_gathered_rows_are_held_once(ranks):
    """Beside the result no more than a tenth of it, for the connections."""
    for found in ranks:
        assert found["held"] < 1.1


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_permuted_rows_are_those_of_the_gathered_ones_and_come_back(ranks, batch):
    order = torch.randperm(WORLD * batch, generator=torch.Generator().manual_seed(batch))
    everyone = torch.cat([found["permuted", batch][2] for found in ranks])
    for found, wanted in zip(ranks, everyone[order].split(batch), strict=True):
        moved, back, crops = found["permuted", batch]
        assert torch.equal(moved, wanted)
        assert torch.equal(back.float(), crops)


def test_gather_is_by_rank_and_sums_have_no_gradient(ranks):
    rows = torch.arange(6.0).reshape(2, 3)
    for rank, found in enumerate(ranks):
        assert found["position"] == rank
        assert torch.equal(found["gather"], torch.cat([rows.T + 100 * r for r in range(WORLD)]))
        assert torch.equal(found["total"], 3 * rows + 300)
        assert not found["total"].requires_grad
        assert [total.tolist() for total in found["totals"]] == [[3.0, 6.0], 1.0]
        assert found["to main"] == ([None] * WORLD if rank else [*range(WORLD)])
        assert found["of main"]["rank"] == 0
        assert torch.equal(found["of main"]["rows"], rows)


def test_in_one_process_collectives_are_the_identity_without_gradient():
    rows = torch.arange(6.0).reshape(2, 3).requires_grad_()
    order = torch.tensor([1, 0])
    for out, wanted in (
        (distributed.gather(rows), rows),
        (distributed.total(rows), rows),
        (distributed.gather_rows(rows.split(1)), rows),
        (distributed.permuted(rows, order), rows[order]),
    ):
        assert torch.equal(out, wanted)
        assert not out.requires_grad
    assert distributed.position() == 0
    assert distributed.of_main("own") == "own"


def test_processes_that_see_different_files_are_told(ranks):
    for found in ranks:
        assert found["agree"] == "the processes differ in step ([0, 1, 2]): share them."


@pytest.mark.parametrize("carried", ["centres", "queue"])
def test_where_one_step_was_bad_no_process_keeps_anything_of_it(ranks, carried):
    begun = Centres(4, region=False) if carried == "centres" else KeyQueue(7, 4, seed=0)
    for found in ranks:
        (bad, untouched), (good, moved) = found[carried]
        assert (bad.item(), good.item()) == (False, True)
        assert bad.dtype == good.dtype == torch.bool
        for name, value in begun.state_dict().items():
            assert torch.equal(untouched[name], value)
            assert torch.equal(moved[name], ranks[0][carried][1][1][name])
    if carried == "centres":
        assert torch.allclose(moved["image"], torch.full((4,), 0.1 * 2))
    else:
        assert moved["keys"][:6, 0].tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
        assert moved["place"] == 6


@pytest.mark.parametrize("name", STEPS)
def test_a_step_exchanges_the_gradient_and_once_what_else_there_is(ranks, name):
    """A new collective in a step, or a larger one, shows here."""
    for found in ranks:
        (exchanges, gradient), (_, wanted) = found["step", name], STEPS[name]
        assert ("allreduce", gradient) in exchanges
        others = [each for each in exchanges if each != ("allreduce", gradient)]
        assert others == wanted


def test_alone_a_step_exchanges_nothing():
    assert exchanged(ALONE, {})[0] == []
