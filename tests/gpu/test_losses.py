"""The losses on the accelerator beside sums in float64 on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.cross_entropy import Targets, soft_cross_entropy
from tests.losses.loss_cases import (
    GOALS,
    TEACHER_TEMP,
    assert_near,
    assert_same_gradients,
    gradients,
    make,
    plain_objective,
)

pytestmark = pytest.mark.gpu
ROWS, WIDTH, PROTOTYPES, STUDENT_TEMP, TARGET_TEMP = 70, 64, 3000, 0.1, 0.04


@pytest.mark.parametrize("name", GOALS)
def test_the_objective_is_the_plain_sum_in_float64(accelerator, name):
    case, goal = make("two local sizes", 3, seed=1), GOALS[name]
    wanted, wanted_terms = plain_objective(case, goal)
    there = case.to(torch.float32, device=accelerator)
    total, terms, _ = goal(*there.views(), there.centres, TEACHER_TEMP)
    assert {value.device for value in (total, *terms.values())} == {accelerator}
    for term, value in (*terms.items(), ("total", total.detach())):
        assert_near(value.cpu(), {**wanted_terms, "total": wanted}[term].detach(), 1e-5, term)
    found = gradients(total, there.leaves("student"))
    found = {k: None if g is None else g.cpu() for k, g in found.items()}
    assert_same_gradients(found, gradients(wanted, case.leaves("student")), 1e-5)


def rows(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, WIDTH, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=str)
def test_soft_cross_entropy_is_the_plain_one_in_float64(accelerator, precision, monkeypatch):
    """Over several chunks, values and both gradients; under autocast with rounded products."""
    elements = dict.fromkeys(("cpu", "accelerator"), 32 * PROTOTYPES)
    monkeypatch.setattr("losses.cross_entropy.CHUNK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(9)
    matches = torch.randint(ROWS, (ROWS, 2), generator=generator)
    weights = torch.rand(ROWS, 2, generator=generator, dtype=torch.float64) / ROWS
    centre = torch.randn(PROTOTYPES, generator=generator, dtype=torch.float64) / 50
    students, prototypes = rows(ROWS, 0).requires_grad_(), rows(PROTOTYPES, 1).requires_grad_()
    teachers, others = rows(ROWS, 2), rows(PROTOTYPES, 3)
    q = F.softmax((teachers @ others.T - centre) / TARGET_TEMP, dim=-1)
    log_p = F.log_softmax(students @ prototypes.T / STUDENT_TEMP, dim=-1)
    wanted = -(weights[..., None] * q[matches] * log_p[:, None]).sum()
    wanted_gradients = torch.autograd.grad(wanted, (students, prototypes))
    wanted_entropies = -(q * q.log()).sum(-1)

    def there(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(accelerator)
        return tensor.float() if tensor.is_floating_point() else tensor

    leaves = [there(students).requires_grad_(), there(prototypes).requires_grad_()]
    targets = Targets(there(teachers), there(others), TARGET_TEMP, there(centre))
    with torch.autocast(accelerator.type, precision, enabled=precision is not None):
        loss, entropies = soft_cross_entropy(
            *leaves, STUDENT_TEMP, targets, there(matches), there(weights)
        )
    assert loss.dtype == torch.float32
    tolerance = 1e-5 if precision is None else 1e-2
    assert_near(loss.detach().cpu(), wanted.detach(), tolerance, "loss")
    assert_near(entropies.cpu(), wanted_entropies, tolerance, "entropies")
    for name, found, value in zip(
        ("d/d students", "d/d prototypes"),
        torch.autograd.grad(loss, leaves),
        wanted_gradients,
        strict=True,
    ):
        assert_near(found.cpu(), value, tolerance, name)
