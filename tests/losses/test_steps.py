"""Whole steps of the objectives that distil: which parts they have, what moves, what does not."""

import pytest
import torch
from torch import Tensor, nn

from engine import build
from engine.training.step import Pretraining
from models.network import Network
from tests.runs import batch_of, pretraining, random_crops, small_config


def trained(steps: int = 4, **options) -> tuple[Pretraining, list[dict[str, Tensor]]]:
    """A run after some steps, and each step's figures."""
    run = pretraining(small_config(**options))
    batches = iter([batch_of(random_crops(3, seed)) for seed in range(steps)])
    return run, [run.train_step(batches)[0] for _ in range(steps)]


def without_inter_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """But for the parts that only inter-level terms have."""
    return {k: value for k, value in state.items() if not k.startswith(("pool.", "head_bag."))}


def figures_of(figures: list[dict[str, Tensor]], *terms: str) -> Tensor:
    return torch.stack([each[term] for each in figures for term in terms])


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def esvit() -> tuple[Pretraining, list[dict[str, Tensor]]]:
    return trained(LOSS__OBJECTIVE="esvit")


@pytest.mark.parametrize("ls", [False, True])
@pytest.mark.parametrize("lt", [False, True])
def test_lambda1_zero_is_esvit(ls, lt, esvit):
    """Bit for bit over four steps with drop path, but for the pooling: no term changes a draw."""
    reference, reference_figures = esvit
    run, figures = trained(CMD__LAMBDA1=0.0, CMD__LS=ls, CMD__LT=lt)
    for ours, theirs in ((run.student, reference.student), (run.teacher, reference.teacher)):
        assert differing(without_inter_parts(ours.state_dict()), theirs.state_dict()) == []
    for kind in ("image", "region"):
        assert torch.equal(getattr(run.carried, kind), getattr(reference.carried, kind))
    both = ("loss", "L_I", "L_R")
    assert torch.equal(figures_of(figures, *both), figures_of(reference_figures, *both))
    assert (run.student.pool is None) == (run.teacher.pool is None) == (not ls and not lt)


@pytest.mark.parametrize("on", ["LS", "LT"])
def test_each_inter_level_term_moves_the_networks(on, esvit):
    """The counterpart of the test above; without L_S the attention stays even."""
    run, _ = trained(**{"CMD__LS": on == "LS", "CMD__LT": on == "LT"})
    moved = differing(without_inter_parts(run.student.state_dict()), esvit[0].student.state_dict())
    assert any(name.startswith("backbone.") for name in moved)
    assert any(name.startswith("head.") for name in moved)
    assert bool(run.student.pool.score.weight.any()) == (on == "LS")


def test_dino_is_l_i_alone_with_weight_one(esvit):
    run, figures = trained(1, LOSS__OBJECTIVE="dino")
    assert run.objective(*run.forward(random_crops(3, 7)), run.carried, 0.04)[1].keys() == {"L_I"}
    assert torch.equal(figures[0]["loss"], figures[0]["L_I"])
    assert torch.equal(figures[0]["L_I"], esvit[1][0]["L_I"])


SETTINGS = {
    "dino": {"LOSS__OBJECTIVE": "dino"},
    "esvit": {"LOSS__OBJECTIVE": "esvit"},
    "released": {"LOSS__OBJECTIVE": "released"},
    "cmd": {},
    "cmd, g trained": {"HEAD__NORM_LAST_LAYER": False},
    "cmd, no L_T": {"CMD__LT": False},
    "cmd, a single image": {"TRAIN__BATCH_SIZE_PER_GPU": 1},
    "cmd, no L_S": {"CMD__LS": False},
    "cmd, neither": {"CMD__LS": False, "CMD__LT": False},
    "cmd, lambda1 0": {"CMD__LAMBDA1": 0.0},
}


# Region head, pooling, bag head; all other settings have the first two.
PARTS = {
    "dino": (False, False, False),
    "esvit": (True, False, False),
    "released": (True, False, False),
    "cmd, neither": (True, False, False),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_trainable_parameter_gets_a_gradient_and_no_other(name):
    """DDP waits for each; a bias of the score alone may be zero: softmax does not see it."""
    cfg = small_config(**SETTINGS[name])
    run = pretraining(cfg)
    if run.student.pool is not None:
        nn.init.normal_(run.student.pool.score.weight)  # at zero nothing reaches what is behind it
    student, teacher = run.forward(random_crops(cfg.TRAIN.BATCH_SIZE_PER_GPU, seed=5))
    total, _, _ = run.objective(student, teacher, run.carried, 0.04)
    total.backward()
    if run.student.pool is not None:
        assert {p.requires_grad for p in run.student.pool.parameters()} == {cfg.CMD.LS}
    for parameter_name, parameter in run.student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
        # Among one image it is recognised already.
        off = cfg.CMD.LAMBDA1 == 0 or cfg.TRAIN.BATCH_SIZE_PER_GPU == 1
        silent = ("pool.", "head_bag.") if off else ("pool.score.bias",)
        if parameter.requires_grad and not parameter_name.startswith(silent):
            assert parameter.grad.any(), parameter_name
        assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name
    assert all(parameter.grad is None for parameter in run.teacher.parameters())


def test_parts_are_built_only_where_they_are_used():
    def parts(network: Network) -> tuple[bool, ...]:
        own = network.head_dense, network.pool, network.head_bag
        return tuple(part is not None for part in own)

    for name, settings in SETTINGS.items():
        wanted = PARTS.get(name, (True, True, settings.get("CMD__LT", True)))
        student, teacher = build.networks(small_config(**settings))
        assert parts(student) == wanted
        assert parts(teacher) == (*wanted[:2], False)
        assert student.embeds_instances == (wanted[1] and settings.get("CMD__LS", True))
        assert not teacher.embeds_instances


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_step_in_bfloat16_is_near_the_one_in_float32(name):
    figures = {}
    for precision in ("fp32", "bf16"):
        cfg = small_config(**SETTINGS[name], TRAIN__PRECISION=precision)
        run = pretraining(cfg)
        batches = iter([batch_of(random_crops(cfg.TRAIN.BATCH_SIZE_PER_GPU, seed=3))])
        figures[precision], *_ = run.train_step(batches)
        weights = [*run.student.parameters(), *run.teacher.parameters()]
        assert {value.dtype for value in weights} == {torch.float32}
    assert figures["bf16"].keys() == figures["fp32"].keys()
    for term, value in figures["fp32"].items():
        assert figures["bf16"][term].dtype == torch.float32
        torch.testing.assert_close(
            figures["bf16"][term], value, rtol=0.05, atol=0.02, msg=lambda m, t=term: f"{t}: {m}"
        )
