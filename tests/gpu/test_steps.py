"""Steps on the accelerator are the CPU's, at each precision, and everything stays there."""

import pytest
import torch
from torch import Tensor

from engine.training.step import Pretraining
from tests.gpu.steps import NETWORKS, PRECISIONS, options_of, run_on, step
from tests.runs import tensors

pytestmark = pytest.mark.gpu
# Of a term's value, and of the angle between two updates as 1 - cosine. float32 keeps 11 bits in
# convolutions (cuDNN's TF32), as bfloat16 keeps 8 and float16 11 in all products of the networks.
TOLERANCES = {"fp32": (2e-3, 1e-3), "bf16": (3e-2, 5e-2), "fp16": (1e-2, 1e-2)}


def places(run: Pretraining) -> set[torch.device]:
    """The devices of all that a step reads and changes, but for the crops."""
    modules = (run.student, run.teacher, run.carried)
    held = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    held += tensors(run.optimizer.state_dict()["state"]).values()
    held += [run.guard.skipped, run.guard.row, run.guard.longest]
    return {tensor.device for tensor in held}


def weights(run: Pretraining) -> Tensor:
    """The student's trained parameters in a row, float32 on the CPU."""
    trained = [p.detach().flatten() for p in run.student.parameters() if p.requires_grad]
    return torch.cat(trained).cpu()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("objective", NETWORKS)
def test_a_step_is_the_cpu_s_and_stays_on_its_device(accelerator, objective, precision):
    options = options_of(objective)
    plain = run_on(torch.device("cpu"), "fp32", **options)
    run = run_on(accelerator, precision, **options)
    before = weights(plain)
    assert torch.equal(weights(run), before)
    wanted, _ = step(plain)
    found, good = step(run)
    assert places(run) == {accelerator}
    assert {value.device for value in (*found.values(), good)} == {accelerator}
    assert good
    in_value, in_angle = TOLERANCES[precision]
    for name in wanted.keys() - {"grad_norm"}:
        value = found[name].cpu()
        torch.testing.assert_close(value, wanted[name], rtol=in_value, atol=in_value, msg=name)
    updates = [weights(each) - before for each in (run, plain)]
    assert 1 - torch.cosine_similarity(*updates, dim=0) < in_angle
