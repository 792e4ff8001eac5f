"""Checkpoints of others and our own: read into the same network, or refused in a sentence."""

import argparse
import io
import os
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torchvision.models import resnet50

from engine import build
from models import BackboneSpec, build_backbone, load_backbone
from models.pretrained import load_pretrained, load_strictly, select_state
from models.recognition import infer_spec
from tests import goldens
from tests.runs import config_of, shake
from utils import checkpoint
from utils.errors import InputError

SWIN = BackboneSpec("swin_tiny", 16, (1, 1, 2, 1), (1, 2, 4, 8))
VIT = BackboneSpec("deit_tiny", 64, (2,), (1,), patch_size=8, img_size=32)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def features(backbone, size: int = 32) -> torch.Tensor:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        image, patches = backbone(images)
    return torch.cat([image[:, None], patches], dim=1)


def weights(spec: BackboneSpec, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{k}": v for k, v in build_backbone(spec).state_dict().items()}


def save(tmp_path: Path, contents, name: str = "file.pth", **how) -> Path:
    torch.save(contents, tmp_path / name, **how)
    return tmp_path / name


def refusal(path, **arguments) -> str:
    with pytest.raises(InputError) as caught:
        load_backbone(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# The reference's files


def reference_file(student: dict, teacher: dict) -> dict:
    """A checkpoint as EsViT writes it after an epoch."""
    rates = {"lr": np.float64(0.0005), "weight_decay": np.float32(0.04), "step": np.int64(3)}
    return {
        "student": student,
        "teacher": teacher,
        "optimizer": {"state": {}, "param_groups": [{**rates, "params": [0]}]},
        "epoch": 1,
        "args": argparse.Namespace(arch="swin_tiny", lr=0.0005, opts=["MODEL.NUM_CLASSES", "0"]),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }


def module_named_scalars(module: str) -> types.ModuleType:
    """A pickle module that writes NumPy's scalars under another module's name."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if getattr(obj, "__name__", "") == "scalar":
                self.write(f"c{module}\nscalar\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

    module_of_names = types.ModuleType("pickle_with_names")
    module_of_names.Pickler = Pickler
    module_of_names.dump = lambda obj, file, protocol: Pickler(file, protocol).dump(obj)
    return module_of_names


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_a_file_of_the_reference_loads_under_both_of_numpys_names(tmp_path, module, zipped):
    student, teacher = weights(SWIN, "module.backbone."), weights(SWIN, "backbone.")
    teacher["head.mlp.0.weight"] = torch.zeros(2, 2)
    path = save(
        tmp_path,
        reference_file(student, teacher),
        pickle_module=module_named_scalars(module),
        _use_new_zipfile_serialization=zipped,
    )
    other = {"numpy.core.multiarray", "numpy._core.multiarray"} - {module}
    assert module.encode() in path.read_bytes()
    assert other.pop().encode() not in path.read_bytes()
    contents = checkpoint.load_file(path)
    assert contents["optimizer"]["param_groups"][0]["lr"] == 0.0005
    assert contents["args"].arch == "swin_tiny"
    for key, wanted in (("student", student), ("teacher", teacher)):
        loaded = load_backbone(path, key).state_dict()
        prefix = next(iter(wanted)).removesuffix("patch_embed.proj.weight")
        assert all(torch.equal(wanted[prefix + name], value) for name, value in loaded.items())


@pytest.mark.parametrize("name", ["swin_tiny_w7", "swin_tiny_w14", "deit_small_p16"])
def test_the_references_key_names_fit_and_tell_the_architecture(tmp_path, name):
    state = goldens.weights(goldens.read_json("backbone_keys.json")[name])
    path = save(tmp_path, {"teacher": {f"backbone.{k}": v for k, v in state.items()}})
    backbone = load_backbone(path)
    spec, _ = infer_spec(state, path)
    # DeiT-S and ViT-S are one network.
    assert spec.arch in (name.rpartition("_")[0], "vit_small")
    assert set(state) == {k for k, _ in backbone.named_parameters()}
    if "w14" in name:
        assert backbone.window_size == 14


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "_orig_mod."])
@pytest.mark.parametrize("key", [None, "teacher", "model", "state_dict"])
def test_wrappers_prefixes_and_containers_are_taken_off(tmp_path, prefix, key):
    state = weights(VIT, prefix)
    path = save(tmp_path, {key: state} if key else state)
    backbone = load_backbone(path, spec=VIT)
    fresh = build_backbone(VIT).eval()
    fresh.load_state_dict({k.removeprefix(prefix): v for k, v in state.items()})
    assert torch.equal(features(backbone), features(fresh))
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())


def test_expected_left_overs_are_accepted(tmp_path):
    state = weights(SWIN)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    state["layers.2.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    for name in ("head.weight", "head.fc.weight", "head_dense.mlp.0.weight", "fc.bias"):
        state[name] = torch.zeros(2)
    backbone = load_backbone(save(tmp_path, state))
    assert torch.equal(backbone.norm.weight, state["norm.weight"])


# timm and torchvision


def timm_features(model, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_features(images)


def test_a_swin_of_timm_gives_timms_features(tmp_path):
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=5)
    shake(model, 1).eval()
    assert any(name.startswith("layers.1.downsample") for name in model.state_dict())
    backbone = load_backbone(save(tmp_path, {"model": model.state_dict()}))
    images = torch.randn(1, 3, 224, 224)
    image, patches = backbone(images)
    theirs = timm_features(model, images)
    torch.testing.assert_close(patches, theirs.flatten(1, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(image, theirs.mean((1, 2)), rtol=1e-4, atol=1e-4)


def test_timms_and_esvits_numbering_of_a_downsample_give_the_same_network(tmp_path):
    state = weights(SWIN)
    renumbered = {}
    for name, value in state.items():
        if ".downsample." in name:
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) + 1}.{rest}"
        renumbered[name] = value
    assert state.keys() != renumbered.keys()
    first = load_backbone(save(tmp_path, state, "esvit.pth"))
    second = load_backbone(save(tmp_path, renumbered, "timm.pth"))
    assert torch.equal(features(first, 96), features(second, 96))


def test_a_deit_of_timm_gives_timms_features(tmp_path):
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False, num_classes=5)
    shake(model, 1).eval()
    backbone = load_backbone(save(tmp_path, model.state_dict()))
    images = torch.randn(2, 3, 224, 224)
    image, patches = backbone(images)
    theirs = timm_features(model, images)
    torch.testing.assert_close(image, theirs[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(patches, theirs[:, 1:], rtol=1e-4, atol=1e-4)


def test_a_resnet_of_torchvision_gives_its_pooled_features(tmp_path):
    model = resnet50(weights=None).eval()
    path = save(tmp_path, model.state_dict())
    backbone = load_backbone(path)
    images = torch.randn(2, 3, 64, 64)
    image, _ = backbone(images)
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        wanted = model(images)
    torch.testing.assert_close(image, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


# Weights that do not fit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("drop", "missing: blocks.1.norm2.bias"),
        ("add", "left over: blocks.0.extra"),
        ("reshape", "of another shape: norm.weight is [65] in the file, [64] here"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, words):
    state = weights(VIT)
    if change == "drop":
        del state["blocks.1.norm2.bias"]
    elif change == "add":
        state["blocks.0.extra"] = torch.zeros(1)
    else:
        state["norm.weight"] = torch.zeros(65)
    assert words in refusal(save(tmp_path, state))


def test_many_faults_are_counted(tmp_path):
    message = refusal(save(tmp_path, weights(VIT)), spec=SWIN)
    assert "missing: patch_embed.norm.weight, " in message
    assert " more; left over: cls_token, pos_embed, " in message


@pytest.mark.parametrize("name", ["relative_position_bias_table", "qkv.weight"])
def test_a_swin_without_one_of_its_tensors_is_refused_by_name(tmp_path, name):
    state = weights(SWIN)
    del state[f"layers.1.blocks.0.attn.{name}"]
    assert f"layers.1.blocks.0.attn.{name}" in refusal(save(tmp_path, state))


def test_a_swin_of_the_second_version_is_refused(tmp_path):
    model = timm.create_model(
        "swinv2_tiny_window8_256", pretrained=False, embed_dim=12, depths=(1, 1), num_heads=(1, 1)
    )
    refusal(save(tmp_path, model.state_dict()))


def test_a_deeper_resnet_is_refused(tmp_path):
    state = weights(BackboneSpec("resnet50"))
    state["layer3.22.conv1.weight"] = torch.zeros(1)
    assert "left over: layer3.22.conv1.weight" in refusal(save(tmp_path, state))


def test_an_unknown_backbone_is_refused_with_its_first_keys(tmp_path):
    message = refusal(save(tmp_path, {"stem.weight": torch.zeros(1)}))
    assert "none of the known backbones (swin_tiny, " in message
    assert "stem.weight" in message


def test_the_other_networks_key_is_offered(tmp_path):
    message = refusal(save(tmp_path, {"student": weights(VIT)}))
    assert "has no 'teacher' weights; it has: student" in message


@pytest.mark.parametrize("contents", [{}, {"epoch": 3}, [1, 2], {"teacher": {}}])
def test_a_file_without_weights_is_refused(tmp_path, contents):
    assert "holds no network weights" in refusal(save(tmp_path, contents))


def test_strict_loading_changes_nothing_when_it_refuses():
    backbone = build_backbone(VIT)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    state = weights(VIT)
    del state["norm.bias"]
    with pytest.raises(InputError, match=r"missing: norm\.bias"):
        load_strictly(backbone, state, "test")
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())


# Files that are no checkpoints


def not_checkpoints() -> dict[str, bytes | None]:
    zipped, legacy = io.BytesIO(), io.BytesIO()
    state = {"teacher": {"w": torch.zeros(99)}}
    torch.save(state, zipped)
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    arrays = io.BytesIO()
    np.savez(arrays, a=np.zeros(3))
    files = {
        "empty.pth": b"",
        "text.pth": b"hello\n",
        "page.pth": b"<!DOCTYPE html><html><body>404</body></html>",
        "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "picture.pth": b"\x89PNG\r\n\x1a\n" + bytes(40),
        "arrays.pth": arrays.getvalue(),
        "text.safetensors": b"hello\n",
        "empty.safetensors": b"",
    }
    for place in (1, 2, 3):
        files[f"zip{place}.pth"] = zipped.getvalue()[: -place * 100]
    return files


@pytest.mark.parametrize("name", not_checkpoints())
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(not_checkpoints()[name])
    message = refusal(tmp_path / name)
    assert "is not a checkpoint" in message or "is not a safetensors file" in message


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "there is no checkpoint at" in refusal(tmp_path / "none.pth")
    assert refusal(tmp_path) == f"{tmp_path} is a folder, not a checkpoint: name the file."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = save(tmp_path, {})
    path.chmod(0)
    assert "may not be read" in refusal(path)


# Our own files


def test_a_run_of_ours_loads_without_options_or_processes(trained):
    backbone = load_backbone(trained / "checkpoint.pth")
    stored = torch.load(trained / "checkpoint.pth", weights_only=True)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, stored["teacher"][f"backbone.{name}"])
    student = load_backbone(trained / "checkpoint.pth", "student").state_dict()
    assert all(torch.equal(v, stored["student"][f"backbone.{k}"]) for k, v in student.items())
    # What no shape tells is read from the file: two heads where 64 channels would be one.
    assert backbone.blocks[0].attn.num_heads == 2
    image, patches = backbone(torch.zeros(1, 3, 32, 32))
    assert (image.shape, patches.shape) == ((1, 32), (1, 16, 32))


@pytest.mark.parametrize("number", [checkpoint.FORMAT - 1, checkpoint.FORMAT + 1])
def test_another_format_is_refused(tmp_path, number):
    message = refusal(save(tmp_path, {"format": number, "teacher": weights(VIT), "novelty": 1}))
    assert f"has checkpoint format {number}" in message
    assert f"reads format {checkpoint.FORMAT} alone" in message


# Starting from weights


def network(pairs: str):
    return build.networks(config_of(pairs))[0]


def test_heads_of_the_same_shape_are_read_and_others_stay_fresh(tmp_path, network_options):
    source = network(f"{network_options} SEED 1")
    path = save(tmp_path, {"teacher": source.state_dict()})
    same = network(f"{network_options} SEED 2")
    spec = build.backbone_spec(config_of(network_options))
    assert load_pretrained(same, path, "teacher", spec) == [
        "backbone",
        "head",
        "head_dense",
        "head_bag",
        "pool",
    ]
    states = source.state_dict(), same.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    other = network(f"{network_options} SEED 2 HEAD.OUT_DIM 32")
    before = other.head.mlp[0].weight.clone()
    assert load_pretrained(other, path, "teacher", spec) == ["backbone", "head_bag", "pool"]
    assert torch.equal(other.head.mlp[0].weight, before)


def test_a_run_starts_from_a_references_file_at_step_0(tmp_path, network_options, pretrain):
    source = network(f"{network_options} LOSS.OBJECTIVE esvit SEED 9")
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    path = save(tmp_path, reference_file(state, state))
    # Learning rate 0: what is written after an epoch is what the run began with.
    done = pretrain(
        tmp_path / "run",
        "TRAIN.EPOCHS 1 TRAIN.BASE_LR 0 TRAIN.MIN_LR 0 PRINT_FREQ 1",
        flags=["--pretrained_weights_ckpt", str(path)],
    )
    assert f"starting from {path}: backbone, head, head_dense" in done.stdout
    assert "resuming" not in done.stdout
    assert "epoch 0.50/1  step 1/2" in done.stdout
    written = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert written["step"] == 2
    for name, value in source.state_dict().items():
        assert torch.equal(written["student"][name], value), name
        torch.testing.assert_close(written["teacher"][name], value)


def test_a_state_is_chosen_by_key():
    both = {"student": {"w": torch.zeros(1)}, "teacher": {"w": torch.ones(1)}}
    assert select_state(both, "student", "x")["w"] == 0
    assert select_state(both, "teacher", "x")["w"] == 1
