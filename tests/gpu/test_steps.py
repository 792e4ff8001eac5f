"""Steps on the accelerator are the CPU's, at each precision, and everything stays there."""

import math

import pytest
import torch
from torch import Tensor

from engine.training.acceleration import compile_network
from engine.training.resume import Found, resume
from engine.training.step import Pretraining
from tests.gpu.steps import (
    NETWORKS,
    PRECISIONS,
    options_of,
    run_on,
    step,
    unwaited,
)
from tests.runs import assert_same_bits, batch_of, checkpoint_of, crops_for, record_of, tensors
from tests.training.test_guard import everything
from utils import checkpoint

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


@pytest.mark.parametrize("objective", NETWORKS)
def test_a_step_never_waits_for_the_device(accelerator, objective):
    """The second one: the first makes masks and the optimizer's state."""
    run = run_on(accelerator, "bf16", **options_of(objective))
    step(run)
    crops = crops_for(run, seed=1)
    with unwaited(accelerator):
        run.train_step(iter([batch_of(crops)]))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_bad_step_changes_nothing_and_the_next_one_is_good(accelerator, optimizer, precision):
    """The fused optimizers' skip; in float16 the loss's scale falls as well."""
    options = options_of("cmd") | {"TRAIN__OPTIMIZER": optimizer}
    run = run_on(accelerator, precision, **options)
    step(run)
    before, scale = everything(run), run.scaler.get_scale()
    crops = crops_for(run, seed=1)
    crops[0][1, 0, 3, 5] = math.nan
    figures, _, good = run.train_step(iter([batch_of(crops)]))
    assert not good
    assert not figures["loss"].isfinite()
    assert_same_bits(everything(run), before)
    assert run.scaler.get_scale() == (scale / 2 if precision == "fp16" else scale)
    _, good = step(run, seed=2)
    assert good
    assert run.guard.skipped == 1
    assert any(not torch.equal(value, before[name]) for name, value in everything(run).items())
    assert run.is_finite()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_checkpoint_of_one_device_goes_on_on_the_other(accelerator, tmp_path, precision):
    """Written on the accelerator and read on the CPU, and the other way round, bit for bit."""
    options = options_of("cmd") | {"TRAIN__OPTIMIZER": "adamw"}
    cpu = torch.device("cpu")
    for name, (first, second) in {"there": (accelerator, cpu), "here": (cpu, accelerator)}.items():
        run, other = run_on(first, precision, **options), run_on(second, precision, **options)
        step(run)
        path = tmp_path / f"{name}.pth"
        checkpoint.save(checkpoint_of(run), path)
        state = checkpoint.load_own(path)
        assert {tensor.device for tensor in tensors(state).values()} == {cpu}
        resume(other, record_of(), Found(path, state, [], forced=False))
        assert places(other) == {second}
        assert other.scaler.state_dict() == run.scaler.state_dict()
        kept, found = everything(run), everything(other)
        assert_same_bits(
            {k: v.cpu() for k, v in found.items()}, {k: v.cpu() for k, v in kept.items()}
        )
        (wanted, _), (figures, good) = step(run, seed=1), step(other, seed=1)
        assert good
        in_value, _ = TOLERANCES[precision]
        assert figures["loss"].item() == pytest.approx(wanted["loss"].item(), rel=2 * in_value)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_a_compiled_step_is_the_plain_one(accelerator, checkpointing):
    """Without a graph break. By inductor on a GPU; a rehearsal, where it takes minutes, goes
    without its kernels."""
    options = options_of("cmd") | {"TRAIN__CHECKPOINTING": checkpointing}
    options |= {"MODEL__DEPTHS": [2], "MODEL__NUM_HEADS": [2]}
    plain, run = (run_on(accelerator, "bf16", **options) for _ in range(2))
    torch._dynamo.reset()
    for network in (run.student, run.teacher):
        compile_network(network, "inductor" if accelerator.type == "cuda" else "aot_eager")
    in_value, in_angle = TOLERANCES["bf16"]
    before = weights(run)
    for seed in range(2):
        (found, good), (wanted, _) = step(run, seed), step(plain, seed)
        assert good
        assert found["loss"].item() == pytest.approx(wanted["loss"].item(), rel=in_value)
    updates = [weights(each) - before for each in (run, plain)]
    assert 1 - torch.cosine_similarity(*updates, dim=0) < in_angle
    torch._dynamo.reset()
