"""Every map against a plain computation, on networks of every family."""

import pytest
import torch

from engine import build
from engine.evaluation.attention import attention_map, kinds
from models.network import Network
from tests.runs import RESNET, SWIN, small_config

FAMILIES = {"vit": {}, "swin": SWIN, "resnet": RESNET}
CONTRAST = {"LOSS__OBJECTIVE": "lcr", "AUG__LOCAL_CROPS_NUMBER": 0}
CASES = {
    "vit cmd": ({}, ["mil", "self", "similarity"]),
    "vit dino": ({"LOSS__OBJECTIVE": "dino"}, ["self", "similarity"]),
    "swin cmd": (SWIN, ["mil", "similarity"]),
    "swin lcr": (SWIN | CONTRAST, ["lcr", "similarity"]),
    "resnet lcr": (RESNET | CONTRAST, ["lcr", "similarity"]),
    "resnet esvit": (RESNET | {"LOSS__OBJECTIVE": "esvit"}, ["similarity"]),
}


def network_of(options: dict) -> Network:
    """A student, its parameters moved so that maps are not nearly flat, in eval mode."""
    student = build.networks(small_config(**options))[0].eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in student.named_parameters():
            if "norm" not in name and value.ndim > 1 and "conv" not in name:
                value += 0.1 * torch.randn(value.shape, generator=generator)
    return student


def some_images(count: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_a_network_has_the_maps_of_its_parts_and_every_row_sums_to_1(case):
    options, expected = CASES[case]
    network, images = network_of(options), some_images()
    assert kinds(network) == expected
    rows, columns = network.backbone.patch_grid(64, 64)
    for kind in expected:
        map_ = attention_map(network, images, kind)
        assert map_.shape == (3, rows * columns)
        assert map_.dtype == torch.float32
        assert not map_.requires_grad
        assert (map_ >= 0).all()
        torch.testing.assert_close(map_.sum(dim=1), torch.ones(3))
        assert map_.std(dim=1).min() > 0  # not the uniform map, which sums to 1 as well
    for kind in {"mil", "lcr", "self"} - set(expected):
        with pytest.raises(ValueError, match=f"has no map '{kind}'; it has: {expected[0]}"):
            attention_map(network, images, kind)


def test_heads_are_softmax_of_the_last_blocks_queries_and_keys():
    network, images = network_of({}), some_images(size=48)  # not the stored position grid
    seen = []
    attention = network.backbone.blocks[-1].attn
    handle = attention.qkv.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        network.backbone(images)
    handle.remove()
    (qkv,) = seen  # [B, 37, 3 * 48]
    width, channels = 48, 16
    expected = torch.empty(3, 3, 36)
    for image in range(3):
        for head in range(3):
            query = qkv[image, :, head * channels : (head + 1) * channels]
            key = qkv[image, :, width + head * channels : width + (head + 1) * channels]
            whole = (query @ key.T / channels**0.5).softmax(dim=1)
            expected[image, head] = whole[0, 1:]
    found = network.backbone.class_attention(images).detach()
    torch.testing.assert_close(found, expected)
    assert (found.sum(dim=-1) < 1).all()  # [CLS] keeps some
    mean = expected.mean(dim=1)
    torch.testing.assert_close(
        attention_map(network, images, "self"), mean / mean.sum(dim=1, keepdim=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_similarity_is_a_softmax_of_cosines(family):
    network, images = network_of(FAMILIES[family]), some_images()
    with torch.no_grad():
        image_features, patch_features = network.backbone(images)
    found = attention_map(network, images, "similarity")
    for image in range(3):
        cosines = torch.stack(
            [
                image_features[image] @ patch / image_features[image].norm() / patch.norm()
                for patch in patch_features[image]
            ]
        )
        weights = (cosines / 0.1).exp()
        torch.testing.assert_close(found[image], weights / weights.sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_mil_is_the_pooling_on_region_embeddings(family):
    network, images = network_of(FAMILIES[family]), some_images()
    with torch.no_grad():
        expected = network([images]).log_attention[0].exp()
    torch.testing.assert_close(attention_map(network, images, "mil"), expected)


def test_lcr_is_the_branch_scaled_and_uniform_where_it_is_zero():
    network, images = network_of(SWIN | CONTRAST), some_images()
    with torch.no_grad():
        predicted = network.rationale(network.backbone(images)[1])
    expected = torch.stack([row / sum(row.tolist()) for row in predicted])
    torch.testing.assert_close(attention_map(network, images, "lcr"), expected)
    with torch.no_grad():
        network.rationale.conv.weight.zero_()
    flat = attention_map(network, images, "lcr")
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / flat.shape[1]))
