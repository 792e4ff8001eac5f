"""The teacher's centres: an EMA of its mean logits, moved once a step, after the loss."""

import pytest
import torch

from losses.targets import Centres
from tests.losses import plain_losses as plain
from tests.losses.loss_cases import GOALS, assert_near, make
from tests.runs import batch_of, pretraining, random_crops, small_config


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_centres_follow_the_mean_logits_by_ema(momentum):
    centres = Centres(7, region=True, momentum=momentum)
    centres.double()
    wanted = {name: torch.zeros(7, dtype=torch.float64) for name in ("image", "region")}
    for seed in range(3):
        case = make("no local crops", 3, seed)
        centres.collect(case.views()[1])
        centres.update()
        for name, mean in plain.mean_logits(case.teacher).items():
            wanted[name] = momentum * wanted[name] + (1 - momentum) * mean.detach()
            assert_near(getattr(centres, name), wanted[name], 1e-12, name)
            assert not getattr(centres, name).requires_grad


def test_centres_of_micro_batches_are_the_big_batch_s():
    case = make("no local crops", 4)
    big, small = (Centres(7, region=True).double() for _ in range(2))
    big.collect(case.views()[1])
    for images in (slice(0, 2), slice(2, 4)):
        small.collect(case.to(torch.float64, images).views()[1])
        assert not small.image.any(), "the centres are held until the update"
    big.update()
    small.update()
    for name in ("image", "region"):
        assert_near(getattr(small, name), getattr(big, name), 1e-12, name)
        assert getattr(big, name).any()


def test_an_update_with_nothing_collected_is_refused():
    centres = Centres(7, region=False)
    with pytest.raises(RuntimeError, match="nothing collected"):
        centres.update()
    case = make("no local crops", 2)
    centres.double().collect(case.views()[1])
    centres.update()
    before = centres.image.clone()
    with pytest.raises(RuntimeError, match="nothing collected"):
        centres.update()
    assert torch.equal(centres.image, before)


@pytest.mark.parametrize("name", GOALS)
def test_centres_are_kept_where_the_objective_reads_them(name):
    centres = GOALS[name].make_centres(7)
    wanted = {"image"} if name == "dino" else {"image", "region"}
    assert set(centres.state_dict()) == wanted
    assert not any(value.any() for value in centres.state_dict().values())


def test_a_training_step_updates_the_centres_once_and_after_the_loss():
    """Two micro-batches, seen by the teacher as it was before the step and from centres of zero."""
    run = pretraining(small_config(MODEL__DROP_PATH=0.0, TRAIN__ACCUM_STEPS=2))
    micro = [random_crops(3, seed) for seed in (0, 1)]
    means, losses = [], []
    for crops in micro:
        student, teacher = run.forward(crops)
        total, _, _ = run.objective(student, teacher, run.objective.make_centres(64), 0.04)
        losses.append(total.detach())
        kinds = {
            "image": (teacher.image_embeddings, teacher.image_prototypes),
            "region": (teacher.patch_embeddings[0].flatten(0, 1), teacher.region_prototypes),
        }
        means.append({kind: (rows @ w.T).mean(0).detach() for kind, (rows, w) in kinds.items()})
    figures, *_ = run.train_step(iter([batch_of(crops) for crops in micro]))
    assert_near(figures["loss"], torch.stack(losses).mean(), 1e-6, "loss")
    for kind in ("image", "region"):
        wanted = 0.1 * (means[0][kind] + means[1][kind]) / 2
        assert_near(getattr(run.carried, kind), wanted, 1e-5, kind)
