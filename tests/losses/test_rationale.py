"""LCR: GradCAM's target, the branch and its loss against plain versions, and its pooling."""

import math

import pytest
import timm
import torch
import torchvision
from torch import Tensor

from engine import build
from engine.evaluation.features import Encoder
from engine.evaluation.source import load_source, random_like
from engine.training import resume
from losses.contrastive import info_nce
from losses.rationale import fitting_loss, gradcam, gradcam_of
from models.network import Network
from models.pretrained import backbone_state
from models.rationale import RationaleBranch, rationale_weights
from tests.losses.test_contrastive import OBJECTIVES, crops_of
from tests.runs import RESNET, SWIN, batch_of, pretraining, small_config
from utils import checkpoint
from utils.errors import InputError

LCR = OBJECTIVES["lcr"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The target


def plain_gradcam(features: Tensor, weights: Tensor) -> list[list[float]]:
    """One cell and channel at a time; features [B, N, D], weights [B, D]."""
    maps = []
    for image, channels in zip(features.tolist(), weights.tolist(), strict=True):
        cells = [
            max(0.0, sum(f * w for f, w in zip(cell, channels, strict=True))) for cell in image
        ]
        highest = max(cells)
        maps.append([cell / highest if highest else 0.0 for cell in cells])
    return maps


def test_gradcam_is_the_plain_sum():
    features, gradient = draw(3, 6, 5), draw(3, 5, seed=1)
    gradient[2] = -features[2].sum(0) * 1e3
    features[2] = features[2].abs()
    gradient[2] = -gradient[2].abs()  # no cell above 0
    found = gradcam(features.float(), gradient.float())
    assert torch.allclose(found.double(), torch.tensor(plain_gradcam(features, gradient)).double())
    assert not found[2].any()
    assert found[:2].amax(1).tolist() == [1.0, 1.0]
    # The size of the gradient is of no account: half precision's loss scale, the batch.
    assert torch.allclose(gradcam(features.float(), 1e-3 * gradient.float()), found, atol=1e-6)


@pytest.mark.parametrize("network", [SWIN, RESNET], ids=["swin", "resnet50"])
def test_the_target_of_a_step_is_gradcam_by_hooks(network):
    """Of the contrastive loss, cell by cell: its gradient by the last feature map, which N times
    is that by the mean, read by a hook."""
    run = pretraining(small_config(**LCR | network, MODEL__DROP_PATH=0.0))
    run.student.backbone.eval()  # a BatchNorm of one cell and few images is another every time
    crops = crops_of(5)
    with torch.no_grad():
        key = run.teacher([crops[1]]).image_embeddings
    teacher = run.forward(crops)[1]
    assert torch.allclose(teacher.image_embeddings, key, atol=2e-3)  # BatchNorm of 4 images

    _, patches = run.student.backbone(crops[0])
    patches.retain_grad()
    query = run.student.head(patches.mean(1))
    info_nce(query, key, run.carried.keys, 0.2)[0].backward()
    count = patches.shape[1]
    # GradCAM's weight of a channel: the mean over the cells of the loss's gradient by it.
    wanted = plain_gradcam(patches.detach().double(), count * patches.grad.double().mean(1))

    student = run.student([crops[0]])
    loss, _ = info_nce(student.image_embeddings, key, run.carried.keys, 0.2)
    found = gradcam_of(loss, student)
    assert torch.allclose(found.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-3)
    assert found.shape == (4, count)
    assert not found.requires_grad
    loss.backward()  # the graph is still there
    assert next(run.student.backbone.parameters()).grad.abs().sum() > 0

    # And it is what the objective fits the branch to.
    run.student.zero_grad()
    views = run.student([crops[0]])
    teacher = run.forward(crops)[1]
    loss, _ = info_nce(views.image_embeddings, teacher.image_embeddings, run.carried.keys, 0.2)
    target = gradcam_of(loss, views)
    _, terms, _ = run.objective(views, teacher, run.carried, 0.04)
    assert terms["L_F"].item() == fitting_loss(views.predicted_map, target, 0.4).item()


@pytest.mark.parametrize("network", [SWIN, RESNET], ids=["swin", "resnet50"])
def test_under_autocast_map_and_branch_keep_float32(network):
    features, gradient = draw(2, 6, 32).float(), draw(2, 32, seed=1).float()
    branch = RationaleBranch(32, 4).eval()
    plain = gradcam(features, gradient), branch(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gradcam(features, gradient), plain[0])
        assert torch.equal(branch(features), plain[1])
    options = LCR | network | {"TRAIN__PRECISION": "bf16"}
    figures, _, good = pretraining(small_config(**options)).train_step(
        iter([batch_of(crops_of(1))])
    )
    assert good
    assert figures["L_F"].dtype == torch.float32


# The branch and its loss


def test_the_branch_is_convolution_norm_relu_and_the_highest_channel():
    branch = RationaleBranch(5, channels=3)
    with torch.no_grad():
        branch.norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0]))
        branch.norm.bias.copy_(torch.tensor([0.1, 0.0, -0.2]))
    patches = draw(2, 4, 5).float()
    found = branch.train()(patches)
    weight = branch.conv.weight[:, :, 0, 0].detach()  # [3, 5]
    maps = [[[float(weight[c] @ cell) for cell in image] for c in range(3)] for image in patches]
    for c in range(3):
        values = [value for image in maps for value in image[c]]
        mean = sum(values) / len(values)
        scale = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + branch.norm.eps)
        gain, bias = branch.norm.weight[c].item(), branch.norm.bias[c].item()
        for image in maps:
            image[c] = [max(0.0, gain * (v - mean) / scale + bias) for v in image[c]]
    for image, row in zip(maps, found.tolist(), strict=True):
        highest = [max(channel[n] for channel in image) for n in range(4)]
        low, high = min(highest), max(highest)
        assert row == pytest.approx([(h - low) / (high - low) for h in highest], abs=1e-5)
    assert [name for name, _ in branch.named_parameters()] == [
        *("conv.weight", "norm.weight", "norm.bias")
    ]


def test_a_map_without_anything_is_0_and_its_weights_even():
    branch = RationaleBranch(5, channels=2).eval()
    with torch.no_grad():
        branch.norm.bias.fill_(-100.0)
    found = branch(draw(2, 4, 5).float())
    assert not found.any()
    assert rationale_weights(found).tolist() == [[0.25] * 4] * 2
    weights = rationale_weights(torch.tensor([[0.0, 1.0, 0.5, 0.5]]))
    assert weights.tolist() == [[0.0, 0.5, 0.25, 0.25]]


def test_the_fitting_loss_is_the_plain_sum_and_teaches_the_prediction_alone():
    predicted, target = draw(3, 4).sigmoid().requires_grad_(), draw(3, 4, seed=1).sigmoid()
    target.requires_grad_()
    loss = fitting_loss(predicted, target, 0.4)
    plain = 0.0
    for p, t in zip(predicted.tolist(), target.tolist(), strict=True):
        q = [math.exp(v / 0.4) / sum(math.exp(w / 0.4) for w in p) for v in p]
        r = [math.exp(v / 0.4) / sum(math.exp(w / 0.4) for w in t) for v in t]
        plain += sum(b * math.log(b / a) for a, b in zip(q, r, strict=True))
    assert loss.item() == pytest.approx(plain, rel=1e-9)
    loss.backward()
    assert predicted.grad.abs().sum() > 0
    assert target.grad is None


# In the trainer


def test_lcr_is_moco_with_a_weighted_term_that_reaches_branch_and_backbone():
    """With weight 0 its backbone and head learn as MoCo's, bit for bit; the branch alone is new."""

    def after(**options) -> Network:
        run = pretraining(small_config(**LCR | SWIN | options))
        for step in range(2):
            figures, _, _ = run.train_step(iter([batch_of(crops_of(step))]))
        weight = run.cfg.LCR.WEIGHT if "L_F" in figures else 0
        total = figures["L_C"] + weight * figures.get("L_F", torch.zeros(()))
        assert figures["loss"].item() == pytest.approx(total.item(), rel=1e-6)
        return run.student

    moco = after(LOSS__OBJECTIVE="moco_v2").state_dict()
    idle, fitted = after(LCR__WEIGHT=0.0).state_dict(), after().state_dict()
    assert set(idle) - set(moco) == {
        f"rationale.{name}" for name in ("conv.weight", "norm.weight", "norm.bias", *_STATISTICS)
    }
    assert all(torch.equal(idle[name], value) for name, value in moco.items())
    assert not torch.equal(fitted["rationale.conv.weight"], idle["rationale.conv.weight"])
    assert not torch.equal(fitted["backbone.patch_embed.proj.weight"], moco[_FIRST])


_FIRST = "backbone.patch_embed.proj.weight"
_STATISTICS = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


def test_a_vit_is_refused_with_what_serves():
    with pytest.raises(InputError, match=r"needs an image feature that is the mean.*resnet50"):
        build.networks(small_config(**LCR))


def test_the_branch_is_in_both_networks_of_a_checkpoint_and_comes_back(tmp_path):
    run = pretraining(small_config(**LCR | SWIN))
    run.train_step(iter([batch_of(crops_of(0))]))
    checkpoint.save(run.state(), tmp_path / "checkpoint.pth")
    state = checkpoint.load_own(tmp_path / "checkpoint.pth")
    assert state["model"]["rationale"] == 4
    patches = draw(2, 4, 32).float()
    wanted = run.student.rationale.eval()(patches)
    for key in ("teacher", "student"):
        network = load_source(tmp_path / "checkpoint.pth", key).network
        assert torch.equal(network.rationale(patches), wanted)


# Pooling


def test_pooling_lcr_is_the_mean_weighted_by_the_predicted_map(tmp_path, caplog):
    run = pretraining(small_config(**LCR | SWIN))
    run.train_step(iter([batch_of(crops_of(0))]))
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(run.state(), path)
    cfg = small_config(EVAL__POOLING="lcr")
    with caplog.at_level("INFO", "cmd"):
        source = load_source(path)
    assert "--checkpoint_key student" in caplog.text
    images = crops_of(9)[0]
    found = Encoder(source, "lcr")(images)
    network = source.network
    with torch.no_grad():
        _, patches = network.backbone(images)
        for image, feature in zip(patches, found, strict=True):
            predicted = network.rationale(image[None])[0].tolist()
            total = sum(predicted)
            weighed = sum(p / total * cell for p, cell in zip(predicted, image, strict=True))
            assert torch.allclose(feature, weighed, atol=1e-5)
            assert not torch.allclose(feature, image.mean(0), atol=1e-3)
    # A random network of its shape has a branch of its own, and its features depend on it.
    random = random_like(source, cfg.SEED)
    assert random.network.rationale.channels == 4
    assert Encoder(random, "lcr")(images).shape == found.shape
    assert source.shape("lcr") != source.shape("mean") | {"pooling": "lcr"}


def test_pooling_lcr_is_refused_where_there_is_no_branch(tmp_path):
    run = pretraining(small_config())
    checkpoint.save(run.state(), tmp_path / "checkpoint.pth")
    source = load_source(tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=r"EVAL\.POOLING lcr needs LCR's branch"):
        Encoder(source, "lcr")


# Starting weights


@pytest.mark.parametrize(
    ("objective", "source"),
    [
        *((name, "timm's Swin") for name in ("dino", "esvit", "cmd", "released", "moco_v2", "lcr")),
        ("cmd", "torchvision's ResNet"),
        ("moco_v2", "torchvision's ResNet"),  # BatchNorm in groups
    ],
)
def test_every_objective_starts_from_someones_weights(objective, source, tmp_path):
    """By path, in their names, with their classifier; student and teacher get all of it."""
    options = {"LOSS__OBJECTIVE": objective, "AUG__LOCAL_CROPS_NUMBER": []}
    torch.manual_seed(3)
    if source == "timm's Swin":
        shape = {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}
        theirs = timm.models.SwinTransformer(img_size=32, patch_size=4, **shape)
        options |= SWIN
    else:
        theirs = torchvision.models.resnet50()
        options |= RESNET
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    cfg = small_config(**options, INIT__WEIGHTS=str(path))
    student, teacher = build.networks(cfg)
    resume.start_from(cfg, student, teacher)
    for network in (student, teacher):
        found = backbone_state(theirs.state_dict())
        own = network.backbone.state_dict()
        names = own.keys() & found.keys()
        assert len(names) > 0.8 * len(own)
        assert all(torch.equal(own[name], found[name]) for name in names)
