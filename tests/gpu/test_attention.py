"""Swin's attention on the accelerator: one kernel, the plain one's numbers, in every stage."""

import contextlib
import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from models.swin import LAYER_NORM_EPS, PadThenShiftBlock, SwinStage, shift_mask
from models.vit import ViT
from tests.gpu.steps import PRECISIONS
from utils.precision import DTYPES, autocast

pytestmark = pytest.mark.gpu
STAGES = {96: 3, 192: 6, 384: 12, 768: 24}  # swin_tiny's widths and heads
# Of the largest value: 8 and 11 significant bits, and float32's own products.
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}
# The operator of the kernel that is pinned; a CPU has its own form of attention (models/swin.py).
PINNED = {"cuda": "aten::_scaled_dot_product_efficient_attention", "cpu": "aten::softmax"}
ATTENTIONS = ("_scaled_dot_product", "fmha", "flash", "cudnn_generated")


def stage_of(width: int) -> SwinStage:
    """Two blocks of a stage of swin_tiny on a map of 2 x 2 windows, the second one shifted."""
    torch.manual_seed(width)
    norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
    stage = SwinStage(width, 14, STAGES[width], 7, [0.0, 0.0], downsample=False, norm_layer=norm)
    for block in stage.blocks:
        nn.init.normal_(block.attn.relative_position_bias_table)
    return stage


def plain(block: PadThenShiftBlock, x: Tensor, bias: Tensor) -> Tensor:
    """The block's attention, window by window and head by head, on a map that windows tile."""
    count, side, shift = len(x), block.window_size[0], block.shift_size[0]
    qkv = block.attn.qkv(x).roll((-shift, -shift), (1, 2))
    windows = x.shape[1] // side
    if shift:
        masks = shift_mask(windows, windows, block.window_size, block.shift_size, x.device)
    out = torch.empty_like(x)
    for window in range(windows**2):
        row, column = divmod(window, windows)
        place = (slice(None), slice(row * side, (row + 1) * side))
        place += (slice(column * side, (column + 1) * side),)
        q, k, v = qkv[place].reshape(count, side**2, 3, len(bias), -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
        if shift:
            scores = scores + masks[window]
        out[place] = (scores.softmax(-1) @ v).transpose(1, 2).reshape(count, side, side, -1)
    return block.attn.proj(out.roll((shift, shift), (1, 2)))


def names_in(trace: profile) -> set[str]:
    """The profiled operators and kernels of attention."""
    keys = {event.key for event in trace.key_averages()}
    return {key for key in keys if any(part in key for part in ATTENTIONS)}


@contextlib.contextmanager
def as_trained(trained: bool, precision: str, device: torch.device) -> Iterator[profile]:
    """A profile of its block, computed as a student that is trained or as a teacher."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        torch.set_grad_enabled(trained),
        profile(activities=activities) as trace,
        autocast(precision, device),
    ):
        yield trace


@pytest.mark.parametrize("shifted", [False, True], ids=["whole", "shifted"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", STAGES)
def test_attention_of_a_stage_is_the_plain_one(accelerator, width, precision, shifted):
    """Values and gradients beside float64; the teacher's values are the student's, bit for bit."""
    stage = stage_of(width)
    exact = copy.deepcopy(stage).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 14, 14, width, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    wanted = plain(exact.blocks[shifted], x, exact.biases(1)[0][shifted])
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    trained = [x, *exact.blocks[shifted].attn.parameters()]
    wanted_gradients = torch.autograd.grad((weights * wanted).sum(), trained)

    student = stage.to(accelerator)
    teacher = copy.deepcopy(student).requires_grad_(False)
    there = x.detach().float().to(accelerator).requires_grad_()
    with autocast(precision, accelerator):
        found = student.blocks[shifted]._attn(there, student.biases(1)[0][shifted])
        with torch.no_grad():
            beside = teacher.blocks[shifted]._attn(there, teacher.biases(1)[0][shifted])
    assert found.dtype == DTYPES[precision]
    assert torch.equal(found, beside)
    leaves = [there, *student.blocks[shifted].attn.parameters()]
    gradients = torch.autograd.grad((weights.to(accelerator) * found).sum(), leaves)
    names = ["x", *(name for name, _ in student.blocks[shifted].attn.named_parameters())]
    for name, one, other in zip(
        ["output", *names], [found, *gradients], [wanted, *wanted_gradients], strict=True
    ):
        error = (one.detach().cpu().double() - other.detach()).abs().max() / other.abs().max()
        assert error < TOLERANCES[precision], f"{name}: {error:.2g}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_student_and_teacher_have_the_pinned_kernel(accelerator, precision):
    stage = stage_of(96).to(accelerator)
    x = torch.randn(3, 14, 14, 96, device=accelerator)
    found = []
    for trained in (True, False):
        stage.requires_grad_(trained)
        with as_trained(trained, precision, accelerator) as trace:
            for block, bias in zip(stage.blocks, stage.biases(1)[0], strict=True):
                x = block(x.detach(), bias)
        keys = {event.key for event in trace.key_averages()}
        assert PINNED[accelerator.type] in keys
        found.append(names_in(trace))
    assert found[0] == found[1]
    wrong = [name for name in found[0] if "flash" in name or "cudnn" in name]
    assert not wrong


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_vit_s_student_and_teacher_have_the_same_kernel(accelerator, precision):
    """Whichever torch prefers: there is no bias that could tell them apart."""
    vit = ViT(128, 1, 2, patch_size=16, img_size=64).to(accelerator)
    images = torch.randn(2, 3, 64, 64, device=accelerator)
    found, features = [], []
    for trained in (True, False):
        vit.requires_grad_(trained)
        with as_trained(trained, precision, accelerator) as trace:
            features.append(vit(images)[0].detach())
        found.append({name for name in names_in(trace) if name.startswith("aten::")})
    assert found[0] == found[1] != set()
    torch.testing.assert_close(*features, rtol=0, atol=TOLERANCES[precision])
