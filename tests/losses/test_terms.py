"""Every term and the weighted sum of them against plain_losses: values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import inter
from losses.objective import Contrastive, Objective
from tests.losses import plain_losses as plain
from tests.losses.loss_cases import (
    GOALS,
    LAYOUTS,
    STUDENT_TEMP,
    TEACHER_TEMP,
    TERMS,
    assert_near,
    assert_same_gradients,
    gradients,
    make,
    plain_objective,
    plain_term,
    wide_case,
)
from utils.views import Views

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_the_plain_sum_and_so_are_its_gradients(term, layout, batch, dtype):
    case, wanted, wanted_gradients = plain_term(term, layout, batch)
    typed = case.to(dtype)
    value = TERMS[term][0](*typed.views(), typed.centres)
    assert value.dtype == dtype
    assert_near(value.detach(), wanted.detach(), TOLERANCE[dtype], term)
    assert_same_gradients(gradients(value, typed.leaves()), wanted_gradients, TOLERANCE[dtype])


@pytest.mark.parametrize("term", TERMS)
def test_under_autocast_a_term_of_float32_embeddings_stays_float32(term):
    """Products may round their inputs (fast_products); values, matches and results do not."""
    case, ours = wide_case(), TERMS[term][0]
    wanted = ours(*case.views(), case.centres)
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(*case.views(), case.centres)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5)
    leaves = case.leaves("student")
    found, reference = gradients(value, leaves), gradients(wanted, leaves)
    for name, gradient in reference.items():
        if gradient is not None:
            assert_near(found[name], gradient, 1e-2, name)


@pytest.mark.parametrize(("layout", "batch"), [("two local sizes", 3), ("no local crops", 2)])
@pytest.mark.parametrize("name", GOALS)
def test_the_objective_is_the_weighted_sum_of_its_terms(name, layout, batch):
    case, goal = make(layout, batch, seed=1), GOALS[name]
    wanted, wanted_terms = plain_objective(case, goal)
    total, terms, entropy = goal(*case.views(), case.centres, TEACHER_TEMP)
    assert_near(total.detach(), wanted.detach(), 1e-9, "total")
    assert list(terms) == list(wanted_terms)
    for term, value in terms.items():
        assert not value.requires_grad
        assert_near(value, wanted_terms[term].detach(), 1e-9, term)
    assert not entropy.requires_grad
    entropies = plain.image_entropies(case.teacher, case.centres.image, TEACHER_TEMP)
    assert_near(entropy, entropies.T.flatten(), 1e-9, "entropy of the teacher")
    leaves = case.leaves("student")
    assert_same_gradients(gradients(total, leaves), gradients(wanted, leaves), tolerance=1e-9)


@pytest.mark.parametrize(
    ("kind", "wrong"), [(Objective, "CMD"), (Objective, "moco_v2"), (Contrastive, "cmd")]
)
def test_an_objective_of_another_name_is_refused(kind, wrong):
    with pytest.raises(ValueError, match=r"LOSS\.OBJECTIVE must be one of"):
        kind(wrong)


def test_attention_goes_to_the_instance_that_only_its_own_image_has():
    """Of a bag's five, one is in the teacher's embedding of its own image alone, two are in every
    image's, two in none's."""
    axes = torch.eye(6)
    instances = axes[torch.tensor([[2, 3, own, 4, 5] for own in (0, 1, 0, 1)])]
    teacher = Views(2, F.normalize(axes[[0, 1, 0, 1]] + axes[[2]] + axes[[3]], dim=1))
    log_attention = torch.full((4, 5), 0.2).log().requires_grad_()
    student = Views(2, axes[:4], log_attention=[log_attention], instance_embeddings=[instances])
    inter.student_loss(student, teacher, STUDENT_TEMP).backward()
    asked = -log_attention.grad
    assert (asked[:, 2] > 0).all()
    assert (asked[:, [0, 1, 3, 4]] < 0).all()


def test_what_recognises_its_image_loses_nothing_and_what_confuses_two_loses_the_most():
    axes, shares = torch.eye(4), torch.zeros(4, 1)
    teacher = Views(2, axes[[0, 1, 0, 1]])

    def loss(rows: list[int]) -> float:
        bags = axes[rows][:, None]
        student = Views(2, axes, log_attention=[shares], instance_embeddings=[bags])
        return float(inter.student_loss(student, teacher, 0.01))

    assert loss([0, 1, 0, 1]) == 0
    assert loss([2, 2, 3, 3]) == pytest.approx(math.log(2))
    assert loss([1, 0, 1, 0]) == pytest.approx(100)
