"""Compiled and checkpointed steps; what a step costs in operator calls and host syncs."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from engine import build
from engine.training.acceleration import compile_network
from engine.training.resume import Found, resume
from engine.training.step import Pretraining
from tests import runs
from tests.processes import found_by_each
from tests.runs import (
    RESNET,
    Calls,
    batch_of,
    checkpoint_of,
    crops_for,
    pretraining,
    record_of,
    small_config,
)
from utils.distributed import ALONE, World
from utils.errors import InputError

SWIN = runs.SWIN | {
    "MODEL__EMBED_DIM": 24,
    "MODEL__DEPTHS": [2, 2],
    # A map of 12: the second stage's 6 is padded to the window.
    "AUG__GLOBAL_CROPS_SIZE": 48,
    "AUG__LOCAL_CROPS_SIZE": 24,
    "MODEL__IMG_SIZE": 48,
}
ARCHITECTURES = {"vit": {}, "swin": SWIN, "resnet": RESNET}
OBJECTIVES = {
    "dino": {"LOSS__OBJECTIVE": "dino"},
    "esvit": {"LOSS__OBJECTIVE": "esvit"},
    "released": {"LOSS__OBJECTIVE": "released"},
    "cmd": {},
    "lcr": {"LOSS__OBJECTIVE": "lcr", "AUG__LOCAL_CROPS_NUMBER": [], "MOCO__QUEUE": 8},
    "cmd bn": {"HEAD__USE_BN": True},
}


def step(run: Pretraining, seed: int = 0, **options) -> dict[str, Tensor]:
    return run.train_step(iter([batch_of(crops_for(run, seed))]), **options)[0]


def assert_same_run(found: Pretraining, wanted: Pretraining, tolerance: float) -> None:
    for name, value in wanted.student.state_dict().items():
        error = (found.student.state_dict()[name] - value).abs().max()
        assert error <= tolerance * (value.abs().max() + 1e-4), f"{name}: differs by {error}"


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(run: Pretraining, backend: str) -> Pretraining:
    compile_network(run.student, backend)
    compile_network(run.teacher, backend)
    return run


@pytest.mark.parametrize(
    ("arch", "objective"),
    [
        # Every part that the other objectives' networks have: regions, pooling.
        ("vit", "cmd bn"),
        # Windows of padded maps, LCR's branch.
        pytest.param("swin", "lcr", marks=pytest.mark.slow),
        *(
            pytest.param("vit", name, marks=pytest.mark.slow)
            for name in sorted(set(OBJECTIVES) - {"lcr", "cmd bn"})
        ),
        pytest.param("swin", "dino", marks=pytest.mark.slow),
        pytest.param("swin", "cmd", marks=pytest.mark.slow),
        pytest.param("resnet", "cmd", marks=pytest.mark.slow),
    ],
)
def test_graphs_are_whole_made_once_and_compute_the_same(arch, objective, fresh_compiler):
    """fullgraph turns a break into an error; a recompilation shows as one more graph."""
    options = {**ARCHITECTURES[arch], **OBJECTIVES[objective], "MODEL__DROP_PATH": 0.0}
    # Adam would blow up the rounding in gradients that are zero, such as those of key biases.
    options["TRAIN__OPTIMIZER"] = "sgd"
    if arch != "resnet":
        options["MODEL__DEPTHS"] = [1] if arch == "vit" else [2, 1]
    plain, run = (pretraining(small_config(**options)) for _ in range(2))
    compiled(run, backend="aot_eager")
    for index in range(3):
        figures = step(run, seed=index)
        wanted = step(plain, seed=index)
        for name, value in wanted.items():
            torch.testing.assert_close(figures[name], value, rtol=1e-4, atol=1e-5)
        if index == 0:
            graphs = counters["stats"]["unique_graphs"]
    # Each size of crop through the student's backbone, one through the teacher's; the heads,
    # which share a graph where images and patches are equally many. lcr: one crop each.
    least, most = (3, 4) if objective == "lcr" else (5, 5 if objective == "dino" else 7)
    assert least <= graphs <= most
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert_same_run(run, plain, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit", "swin"])
def test_inductor_s_step_is_the_plain_one(arch, fresh_compiler):
    options = {**ARCHITECTURES[arch], "MODEL__DROP_PATH": 0.0, "TRAIN__OPTIMIZER": "sgd"}
    plain = pretraining(small_config(**options))
    run = pretraining(small_config(**options, TRAIN__COMPILE=True))
    for index in range(2):
        figures, wanted = step(run, seed=index), step(plain, seed=index)
        torch.testing.assert_close(figures["loss"], wanted["loss"], rtol=1e-4, atol=1e-4)
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]
    assert_same_run(run, plain, 1e-3)


def test_without_a_compiler_a_sentence_says_so(monkeypatch):
    for variable in ("CXX", "CC"):
        monkeypatch.setenv(variable, "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"TRAIN\.COMPILE.*C\+\+ compiler"):
        pretraining(small_config(TRAIN__COMPILE=True))


# Activation checkpointing


@pytest.mark.parametrize("arch", ["vit", "swin"])
def test_checkpointing_changes_no_bit(arch):
    """Drop path is drawn again as it was."""
    options = {**ARCHITECTURES[arch], "MODEL__DROP_PATH": 0.5}
    plain = pretraining(small_config(**options))
    run = pretraining(small_config(**options, TRAIN__CHECKPOINTING=True))
    for index in range(2):
        assert torch.equal(step(run, index)["loss"], step(plain, index)["loss"])
    assert_same_run(run, plain, 0.0)
    assert list(run.state()["student"]) == list(plain.state()["student"])


def test_checkpointing_keeps_less_for_the_backward_pass():
    kept = {}
    for on in (False, True):
        run = pretraining(small_config(MODEL__DEPTHS=[8], TRAIN__CHECKPOINTING=on))
        sizes = []

        def note(tensor: Tensor, sizes: list = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run.student.backbone(torch.randn(4, 3, 32, 32))
        kept[on] = sum(sizes)
    assert kept[True] < kept[False] / 4


def test_checkpointing_a_network_with_batchnorm_is_refused():
    with pytest.raises(InputError, match="BatchNorm"):
        pretraining(small_config(**RESNET, TRAIN__CHECKPOINTING=True))


# Both, and several processes


def steps_of(world: World, options: dict, backend: str) -> dict[str, Tensor]:
    """Two steps over this process's share of the images: the student's weights, and the loss.

    backend: of the compiler, "" for none.
    """
    torch._dynamo.reset()
    cfg = small_config(**options, TRAIN__BATCH_SIZE_PER_GPU=4 // world.size)
    networks = build.networks(cfg)
    if backend:
        # Before the student is wrapped, as TRAIN.COMPILE does, but by a compiler of choice.
        for network in networks:
            compile_network(network, backend)
    run = Pretraining.build(cfg, world, *networks, steps_per_epoch=4)
    for seed in range(2):
        figures = step(run, seed)
    assert isinstance(run.wrapped, DistributedDataParallel) == (world.size > 1)
    broken = counters["graph_break"]
    assert not broken, broken
    assert counters["stats"]["unique_graphs"] >= 3 or not backend
    return {**run.student.state_dict(), "loss": figures["loss"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "backend"),
    [
        # What is dear is the tracing: of one block, one size of crops and one head.
        (
            {"MODEL__DEPTHS": [1], "AUG__LOCAL_CROPS_NUMBER": [], "LOSS__OBJECTIVE": "dino"},
            "aot_eager",
        ),
        (runs.SWIN, "aot_eager"),
        ({}, "inductor"),
        (runs.SWIN, "inductor"),
    ],
    ids=["one block", "swin", "vit by inductor", "swin by inductor"],
)
def test_compiled_checkpointed_and_by_two_processes_a_run_is_the_plain_one(
    options, backend, fresh_compiler
):
    options = {**options, "TRAIN__OPTIMIZER": "sgd", "MODEL__DROP_PATH": 0.0}
    wanted = steps_of(ALONE, options, "")
    checkpointed = {**options, "TRAIN__CHECKPOINTING": True}
    first, second = found_by_each(2, steps_of, checkpointed, backend)
    loss = (first.pop("loss") + second.pop("loss")) / 2
    torch.testing.assert_close(loss, wanted.pop("loss"), rtol=1e-4, atol=1e-5)
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), name
        error = (first[name] - value).abs().max()
        assert error <= 1e-4 * (value.abs().max() + 1e-4), f"{name}: differs by {error}"


# Moments of a run whose parameters had another memory layout


def test_moments_of_another_layout_go_on_as_they_were():
    """A ResNet's weights are channels last; in a checkpoint from elsewhere they may not be."""
    options = {**RESNET, "LOSS__OBJECTIVE": "dino", "TRAIN__BATCH_SIZE_PER_GPU": 2}
    options["AUG__LOCAL_CROPS_NUMBER"] = []
    run, other = (pretraining(small_config(**options)) for _ in range(2))
    step(run)
    state = copy.deepcopy(checkpoint_of(run))
    for moments in state["optimizer"]["state"].values():
        for name, value in moments.items():
            moments[name] = value.clone(memory_format=torch.contiguous_format)
    resume(other, record_of(), Found(Path("run"), state, [], forced=False))
    step(run, seed=1)
    step(other, seed=1)
    assert_same_run(other, run, 1e-6)


# What a step costs

# Operators that hand a tensor's value to the host; on a GPU each would wait for it.
SYNCS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


def calls_of_a_step(**options) -> list[str]:
    run = pretraining(small_config(**options))
    step(run)  # the first one makes masks and optimizer state
    batches = iter([batch_of(crops_for(run, seed=1))])
    with Calls() as mode:
        run.train_step(batches)
    return mode.names


# Operator calls of one step, measured, with a tenth to spare: a loop over views, pairs of views or
# parameters where one call did before shows here.
MOST_CALLS = {("vit", "cmd"): 1870, ("swin", "cmd"): 3130, ("vit", "dino"): 850}


@pytest.mark.parametrize(
    ("arch", "objective"),
    [
        *(("vit", name) for name in OBJECTIVES if name != "lcr"),
        *itertools.product(["swin", "resnet"], ["cmd", "lcr"]),
    ],
)
def test_a_step_fetches_nothing_to_the_host_and_takes_no_more_calls_than_it_did(arch, objective):
    calls = calls_of_a_step(**ARCHITECTURES[arch], **OBJECTIVES[objective])
    assert not [name for name in calls if name in SYNCS]
    assert len(calls) <= MOST_CALLS.get((arch, objective), math.inf)


def test_calls_do_not_grow_with_the_number_of_crops_of_a_size():
    few, many = (calls_of_a_step(AUG__LOCAL_CROPS_NUMBER=[number]) for number in (2, 6))
    assert len(many) == len(few)
