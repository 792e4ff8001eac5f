"""Swin's attention: one kernel for student and teacher, position biases gathered once a forward."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from engine import build
from models import swin
from tests.runs import SWIN, Calls, small_config


def inputs(trained: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [2, 6, 49, 8] and a bias [6, 49, 49], with a gradient or all without."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 49, 8)] * 3 + [(6, 49, 49)]
    return tuple(torch.randn(s, generator=generator).requires_grad_(trained) for s in shapes)


def calls_of(attention, trained: bool) -> set[str]:
    with Calls() as calls, torch.set_grad_enabled(trained):
        attention(*inputs(trained))
    return set(calls.names) - {"detach"}


# On a CPU torch would give the teacher a fused kernel and the student none, as on some GPUs
# cuDNN's and the memory-efficient one.
FUSED = "_scaled_dot_product_flash_attention_for_cpu"


def unpinned(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


def test_student_and_teacher_have_the_same_kernel():
    assert FUSED in calls_of(unpinned, trained=False)
    assert FUSED not in calls_of(unpinned, trained=True)
    names = calls_of(swin.fused, trained=True)
    assert names == calls_of(swin.fused, trained=False)
    assert FUSED not in names


def test_compiled_the_kernel_is_pinned_without_a_break_and_for_itself_alone():
    graphs = []

    def note(module, _):
        graphs.append(str(module.graph))
        return module

    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=note))

    def beside(q, k, v, bias):
        return swin.fused(q, k, v, bias), unpinned(q, k, v, bias)

    teacher = inputs(trained=False)
    with torch.no_grad():
        assert torch.equal(compiled(swin.fused)(*teacher), swin.fused(*teacher))
        torch.testing.assert_close(*compiled(beside)(*teacher))
    torch._dynamo.reset()
    assert [FUSED in graph for graph in graphs] == [False, True]


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_call_is_the_plain_one(masked):
    q, k, v, bias = inputs(trained=True)
    if masked:
        bias = bias + swin.shift_mask(2, 1, (7, 7), (3, 3), q.device).repeat_interleave(3, 0)
    leaves = [q, k, v, bias]
    results = [attention(q, k, v, bias) for attention in (swin.fused, swin.attend)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(result.square().sum(), leaves) for result in results]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_position_biases_are_gathered_once_a_stage_with_the_gradient_of_a_gather_each():
    """For three sizes of crops: the bits of the same weights in one forward after the other."""
    student, _ = build.networks(small_config(**SWIN, MODEL__DROP_PATH=0.0))
    backbone = student.backbone
    generator = torch.Generator().manual_seed(0)
    crops = [torch.randn(2, 3, size, size, generator=generator) for size in (32, 16, 24)]
    with Calls() as calls:
        features = student(crops).image_features
    assert calls.names.count("index_select") == len(backbone.layers)
    parameters = list(backbone.parameters())
    found = torch.autograd.grad(features.square().sum(), parameters)
    apart = torch.cat([backbone(crop)[0] for crop in crops])
    assert torch.equal(features, apart)
    for one, other in zip(
        found, torch.autograd.grad(apart.square().sum(), parameters), strict=True
    ):
        assert torch.equal(one, other)
