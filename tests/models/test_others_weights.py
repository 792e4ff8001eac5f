"""Weights under the names of those who first published them, in the networks of timm and here."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.evaluation.source import load_source
from models import BackboneSpec, build_backbone, load_backbone
from models.hub import located
from models.network import Network, Parts
from models.pretrained import (
    HEADS,
    WeightsFile,
    in_timms_names,
    load_pretrained,
    load_strictly,
    select_state,
)
from models.recognition import provenance
from tests.runs import shake
from utils import config
from utils.errors import InputError
from utils.normalisation import IMAGENET

VIT = {"embed_dim": 384, "depth": 1, "num_heads": 6}
SMALL = "test_convnext.r160_in1k"


def renamed(state: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    for pattern, new in pairs:
        state = {re.sub(pattern, new, name): value for name, value in state.items()}
    return state


def dinov2(model: nn.Module) -> dict:
    state = model.state_dict() | {"mask_token": torch.zeros(1, 384)}
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        position = torch.ones(1, 1, 384)  # of [CLS], which timm has in the token
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    return state


def dinov3(model: nn.Module) -> dict:
    pairs = ("reg_token", "storage_tokens"), (r"gamma_(\d)", r"ls\1.gamma")
    state = renamed(model.state_dict(), *pairs)
    extra = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.zeros(16)}
    for name in [name for name in state if name.endswith("qkv.weight")]:
        extra[name.replace("weight", "bias")] = torch.zeros(len(state[name]))
    return state | extra


def dino(model: nn.Module) -> dict:
    own = {f"module.backbone.{k}": v for k, v in model.state_dict().items()}
    head = {"module.head.mlp.0.weight": torch.zeros(4, 384)}
    return {"student": own | head, "teacher": {k[7:]: v for k, v in (own | head).items()}}


def moco_v3(model: nn.Module) -> dict:
    both = ("base_encoder", 1), ("momentum_encoder", 2)
    state = model.state_dict().items()
    return {"state_dict": {f"module.{p}.{k}": t * v for p, t in both for k, v in state}}


def mae(model: nn.Module) -> dict:
    decoder = {"mask_token": torch.zeros(1, 1, 512), "decoder_embed.weight": torch.zeros(512, 384)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.zeros(512)}
    return {"model": model.state_dict() | decoder}


def esvit(model: nn.Module) -> dict:
    down = r"^layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample"
    state = renamed(model.state_dict(), down)
    state |= {"layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49)}
    state |= {"head_dense.mlp.0.weight": torch.zeros(4, 4)}
    return {"teacher": {f"backbone.{k}" if "head" not in k else k: v for k, v in state.items()}}


ORIGINALS = {
    "DINO": (dino, "vit_small_patch16_224", VIT, "DINO's weights of a ViT-S/16", ""),
    "MoCo v3": (moco_v3, "vit_small_patch16_224", VIT, "MoCo v3's weights of a ViT-S/16", ""),
    "MAE": (mae, "vit_base_patch16_224", VIT, "MAE's weights of a ViT-S/16", ""),
    "DINOv2": (
        dinov2,
        "vit_small_patch14_dinov2",
        VIT,
        "DINOv2's weights of a ViT-S/14",
        "timm/vit_small_patch14_dinov2",
    ),
    "DINOv2 with registers": (
        dinov2,
        "vit_small_patch14_reg4_dinov2",
        VIT,
        "DINOv2's weights of a ViT-S/14 with 4 registers",
        "timm/vit_small_patch14_reg4_dinov2",
    ),
    "EsViT": (
        esvit,
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": (2, 1), "num_heads": (1, 2)},
        "EsViT's weights of a Swin",
        "",
    ),
}
if timm.is_model("vit_small_patch16_dinov3"):
    ORIGINALS["DINOv3"] = (
        dinov3,
        "vit_small_patch16_dinov3",
        VIT,
        "DINOv3's weights of a ViT-S/16 with 4 registers",
        "timm/vit_small_patch16_dinov3",
    )


@pytest.mark.parametrize("maker", ORIGINALS)
def test_an_originals_names_become_timms_and_its_maker_is_named(tmp_path, maker):
    published, name, figures, words, arch = ORIGINALS[maker]
    model = shake(timm.create_model(name, num_classes=0, **figures), 1).eval()
    torch.save(published(model), tmp_path / "x.pth")
    file = WeightsFile.read(tmp_path / "x.pth", spec=BackboneSpec(f"timm/{name}"))
    assert file.whose == words
    assert provenance(file.contents, file.state)[1] == arch
    assert file.normalisation == IMAGENET
    other = timm.create_model(name, num_classes=0, **figures).eval()
    load_strictly(other, in_timms_names(other, name, file.state), "the file", HEADS)
    images = torch.randn(1, 3, *other.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        torch.testing.assert_close(model(images), other(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224"])
def test_weights_laid_out_for_another_size_are_those_that_timm_makes_of_them(name):
    maker = next(maker for maker, (_, model, *_) in ORIGINALS.items() if model == name)
    published, _, figures, _, _ = ORIGINALS[maker]
    state = published(shake(timm.create_model(name, num_classes=0, **figures), 1).eval())
    state = select_state(state, "teacher", "the file")
    figures = {**figures, "img_size": 56}
    ours = timm.create_model(name, num_classes=0, **figures).eval()
    load_strictly(ours, in_timms_names(ours, name, state), "the file", HEADS)
    given = {"state_dict": dict(state), "num_classes": 1000}
    theirs = timm.create_model(
        name, num_classes=0, pretrained=True, pretrained_cfg_overlay=given, **figures
    )
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def convnext(folder: Path, **facts) -> Path:
    """A folder of the hub's form with the weights of a small ConvNeXt of timm's."""
    folder.mkdir(parents=True)
    model = timm.create_model(SMALL, num_classes=3)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "test_convnext", **facts}))
    return folder


def network_of(arch: str, **figures) -> tuple[Network, BackboneSpec]:
    spec = BackboneSpec(arch, img_size=64, **figures)
    return Network(build_backbone(spec), Parts()), spec


def test_a_folder_says_its_model_and_another_one_is_refused_by_both_names(tmp_path):
    folder = convnext(tmp_path / "x")
    backbone = load_backbone(folder)
    network, spec = network_of("timm/test_convnext")
    assert load_pretrained(network, folder, "teacher", spec) == ["backbone"]
    assert network.backbone.normalisation == backbone.normalisation != IMAGENET
    assert torch.equal(network.backbone.model.stem[0].weight, backbone.model.stem[0].weight)
    small = {"embed_dim": 48, "depths": (1,), "num_heads": (3,)}
    for arch, figures in (("timm/test_convnext2", {}), ("deit_tiny", small)):
        network, spec = network_of(arch, **figures)
        with pytest.raises(InputError, match=f"holds weights of timm/test_convnext, and .* {arch}"):
            load_pretrained(network, folder, "teacher", spec)
    # Where no file says it, the first keys that do not fit, with both shapes.
    (folder / "config.json").unlink()
    network, spec = network_of("timm/test_convnext2")
    shapes = r"of another shape: model\.\S+ is \[[\d, ]+\] in the file, \[[\d, ]+\] here"
    with pytest.raises(InputError, match=shapes):
        load_pretrained(network, folder, "teacher", spec)
    with pytest.raises(InputError, match="--arch timm/NAME"):
        load_backbone(folder)


def test_torchvisions_names_are_timms_of_a_resnet_and_of_nothing_else(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    assert provenance(state, state)[0] == "weights of a ResNet in torchvision's names"
    model = timm.create_model("resnet18", num_classes=0)
    load_strictly(model, in_timms_names(model, "resnet18", state), "the file", HEADS)
    state = {"features.0.0.weight": torch.zeros(1), "classifier.2.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "x.pth")
    network, spec = network_of("timm/test_convnext")
    with pytest.raises(InputError, match=r"missing: model\.stem"):
        load_pretrained(network, tmp_path / "x.pth", "teacher", spec)


def test_the_word_timm_is_what_timm_has_for_the_name(tmp_path, monkeypatch):
    """Of timm's cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / f"models--timm--{SMALL}"
    folder = convnext(place / "snapshots/0123")
    (place / "refs").mkdir()
    (place / "refs/main").write_text("0123")
    for words in (("timm", f"timm/{SMALL}"), ("timm", "timm/test_convnext"), (f"timm/{SMALL}",)):
        assert located(*words) == folder / "model.safetensors"
    source = load_source(f"timm/{SMALL}", cfg=config.defaults())
    assert torch.equal(
        source.network.backbone.model.stem[0].weight,
        load_backbone(folder).model.stem[0].weight,
    )
    with pytest.raises(InputError, match=r"of timm/test_resnet could not .*--init FILE"):
        located("timm", "timm/test_resnet")
    with pytest.raises(InputError, match=r"has no weights 'mine' of test_vit; it has: r160"):
        located("timm/test_vit.mine")
    with pytest.raises(InputError, match=r"MODEL\.ARCH is vit_small: give one of timm's"):
        located("timm", "vit_small")
