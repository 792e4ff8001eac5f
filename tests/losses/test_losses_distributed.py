"""Two processes with half of the images each give what one process with all of them gives.

One pair of gloo processes computes every case and writes it down; the tests read.
"""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine import build
from losses.objective import Objective
from losses.targets import Centres
from models.network import Network
from tests.losses.loss_cases import (
    GOALS,
    TEACHER_TEMP,
    Case,
    assert_near,
    assert_same_gradients,
    gradients,
    make,
)
from tests.processes import found_by_each
from tests.runs import random_crops, small_config
from utils.distributed import World

WORLD, BATCH = 2, 6


NAMES = ("dino", "esvit", "released 1", "cmd 0.3", "cmd, L_S alone", "cmd, L_T alone")
NAMES += ("cmd, neither",)
DTYPES = (torch.float64, torch.float32)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SHARED = ("student.W_I", "student.W_R")


def case_of(dtype: torch.dtype, images: slice) -> Case:
    return make("two local sizes", BATCH, seed=11).to(dtype, images)


def evaluate(case: Case, goal: Objective) -> dict:
    """Total, terms, entropies and gradients of one process, before any exchange of gradients."""
    total, terms, entropy = goal(*case.views(), case.centres, TEACHER_TEMP)
    found = gradients(total, case.leaves("student"))
    return {"total": total.detach(), "terms": terms, "entropy": entropy, "gradients": found}


def centres_after_two_updates(dtype: torch.dtype, images: slice, micro: int) -> dict[str, Tensor]:
    """Centres fed with two batches, each in micro-batches of `micro` images."""
    centres = Centres(7, region=True).to(dtype)
    for seed in (11, 12):
        for first in range(images.start, images.stop, micro):
            case = make("two local sizes", BATCH, seed).to(dtype, slice(first, first + micro))
            centres.collect(case.views()[1])
        centres.update()
    return {name: value.clone() for name, value in centres.state_dict().items()}


def small_networks(goal: Objective) -> tuple[Network, Network]:
    """The same on every process, with an attention that is uneven."""
    terms = {"LOSS__OBJECTIVE": goal.name, "CMD__LS": goal.ls, "CMD__LT": goal.lt}
    networks = build.networks(small_config(**terms, MODEL__DROP_PATH=0.0))
    torch.manual_seed(0)
    for network in networks:
        if network.pool is not None:
            nn.init.normal_(network.pool.score.weight)
    return networks


def network_gradients(goal: Objective, images: slice, wrap: bool) -> dict[str, Tensor]:
    """Gradients after a second backward pass, through DDP where `wrap`: it refuses unused
    parameters there."""
    student, teacher = small_networks(goal)
    module: nn.Module = DistributedDataParallel(student) if wrap else student
    centres = goal.make_centres(64)
    for seed in (3, 4):
        crops = [crop[images] for crop in random_crops(4, seed)]
        student.zero_grad(set_to_none=True)
        with torch.no_grad():
            teacher_views = teacher(crops[:2])
        total, _, _ = goal(module(crops), teacher_views, centres, TEACHER_TEMP)
        total.backward()
        centres.collect(teacher_views)
        centres.update()
    return {
        name: parameter.grad.clone()
        for name, parameter in student.named_parameters()
        if parameter.grad is not None
    }


def found_by(world: World) -> dict:
    """Everything, on one process's share of the images."""
    rank = world.rank
    share = BATCH // WORLD
    own = slice(rank * share, (rank + 1) * share)
    found: dict = {}
    for name, dtype in itertools.product(NAMES, DTYPES):
        found["losses", name, dtype] = evaluate(case_of(dtype, own), GOALS[name])
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("dino", "esvit", "cmd 0.3"):
            found["autocast", name] = evaluate(case_of(torch.float32, own), GOALS[name])
    for dtype, micro in itertools.product(DTYPES, (share, 1)):
        found["centres", dtype, micro] = centres_after_two_updates(dtype, own, micro)
    for name in NAMES:
        halves = slice(2 * rank, 2 * rank + 2)
        found["network", name] = network_gradients(GOALS[name], halves, wrap=True)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    """What each process found."""
    return found_by_each(WORLD, found_by)


def averaged(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def assert_ranks_make_up(parts: list[dict], whole: dict, tolerance: float) -> None:
    """Means over ranks of total, terms and shared gradients; rows of images rank after rank."""
    assert_near(averaged([p["total"] for p in parts]), whole["total"], tolerance, "total")
    assert parts[0]["terms"].keys() == whole["terms"].keys()
    for term, value in whole["terms"].items():
        assert_near(averaged([p["terms"][term] for p in parts]), value, tolerance, term)
    entropies = torch.cat([p["entropy"].unflatten(0, (2, -1)) for p in parts], dim=1)
    assert_near(entropies.flatten(), whole["entropy"], tolerance, "entropy")
    joined = {}
    for name in whole["gradients"]:
        found = [p["gradients"][name] for p in parts]
        if any(gradient is None for gradient in found):
            assert all(gradient is None for gradient in found), name
            joined[name] = None
        elif name in SHARED:
            joined[name] = averaged(found)
        else:
            joined[name] = torch.cat(found) / len(parts)
    assert_same_gradients(joined, whole["gradients"], tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_find_the_loss_and_gradients_of_one(ranks, name, dtype):
    whole = evaluate(case_of(dtype, slice(None)), GOALS[name])
    parts = [found["losses", name, dtype] for found in ranks]
    assert not torch.equal(parts[0]["total"], parts[1]["total"]), "the ranks see other images"
    assert_ranks_make_up(parts, whole, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["dino", "esvit", "cmd 0.3"])
def test_two_processes_under_autocast_are_within_a_hundredth_of_one_in_float32(ranks, name):
    whole = evaluate(case_of(torch.float32, slice(None)), GOALS[name])
    assert_ranks_make_up([found["autocast", name] for found in ranks], whole, 1e-2)


@pytest.mark.parametrize("micro", [BATCH // WORLD, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_processes_keep_the_centres_of_the_whole_batch(ranks, dtype, micro):
    whole = centres_after_two_updates(dtype, slice(0, BATCH), BATCH)
    parts = [found["centres", dtype, micro] for found in ranks]
    assert set(whole) == {"image", "region"}
    for kind, value in whole.items():
        assert torch.equal(parts[0][kind], parts[1][kind])
        assert_near(parts[0][kind], value, TOLERANCE[dtype] / 10, kind)


@pytest.mark.parametrize("name", NAMES)
def test_ddp_finds_the_gradients_of_the_whole_batch(ranks, name):
    """Two steps with their centres, every trainable parameter used, all ranks alike."""
    whole = network_gradients(GOALS[name], slice(None), wrap=False)
    parts = [found["network", name] for found in ranks]
    for parameter, gradient in parts[0].items():
        assert torch.equal(gradient, parts[1][parameter]), parameter
    assert parts[0].keys() == whole.keys()
    assert_same_gradients(parts[0], whole, tolerance=1e-5)
