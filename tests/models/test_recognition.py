"""What shapes do not show of an architecture: believed where a file says it, else a doubt."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from models import BackboneSpec, build_backbone, load_backbone
from models.network import Network, Parts
from models.pretrained import WeightsFile, load_pretrained
from models.recognition import infer_spec
from utils.errors import InputError
from utils.normalisation import IMAGENET

# At 448 pixels maps of 112, 56, 28, 14 patches: the last stage shifts windows of 7.
LAID_OUT = {"embed_dim": 16, "depths": [1, 1, 1, 2], "num_heads": [1, 2, 4, 8]}
SMALL_VIT = {"embed_dim": 48, "depth": 1, "num_heads": 4, "patch_size": 8, "img_size": 32}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def write(path: Path, contents) -> Path:
    torch.save(contents, path)
    return path


def swin(size: int) -> torch.nn.Module:
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, num_classes=0, img_size=size, **LAID_OUT).eval()


def vit(width: int, heads: int, **figures) -> dict[str, torch.Tensor]:
    spec = BackboneSpec("deit_tiny", width, (1,), (heads,), patch_size=8, img_size=32, **figures)
    return build_backbone(spec).state_dict()


def heads_of(file: WeightsFile) -> int:
    return file.backbone().blocks[0].attn.num_heads


# Heads


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_the_usual_heads_of_a_width_are_taken_and_said(width, heads):
    state = {"patch_embed.proj.weight": torch.zeros(width, 3, 14, 14)}
    state |= {"pos_embed": torch.ones(1, 257, width), "blocks.0.norm1.weight": torch.ones(width)}
    spec, doubts = infer_spec(state, "x")
    assert spec.num_heads == (heads,)
    assert (
        f"{heads} attention heads are taken, {width // heads} channels each" in doubts["num_heads"]
    )


@pytest.mark.parametrize("with_arch", [True, False])
def test_a_training_checkpoint_of_moco_v3_has_twelve_heads(tmp_path, with_arch):
    state = vit(48, 12)
    both = {f"module.base_encoder.{name}": value for name, value in state.items()}
    both["module.base_encoder.head.0.weight"] = torch.zeros(2, 48)
    both |= {f"module.momentum_encoder.{name}": 0 * value for name, value in state.items()}
    both["module.predictor.0.weight"] = torch.zeros(2, 2)
    contents = {"state_dict": both, **({"arch": "vit_small"} if with_arch else {})}
    file = WeightsFile.read(write(tmp_path / "x.pth", contents))
    assert heads_of(file) == 12
    assert "MoCo v3" in file.doubts["num_heads"]
    assert torch.equal(file.state["norm.weight"], state["norm.weight"]), "the query encoder"


@pytest.mark.parametrize("more", [{}, {"arch": "vit_small"}, {"args": Namespace(arch="vit_small")}])
def test_a_vit_s_of_moco_v3_without_its_names_shows_itself_by_its_positions(tmp_path, more):
    state = vit(384, 12)
    path = tmp_path / "x.pth"
    assert heads_of(WeightsFile.read(write(path, {"model": state, **more}))) == 6
    state["pos_embed"][0, 0] = 0
    file = WeightsFile.read(write(path, {"model": state, **more}))
    assert heads_of(file) == 12
    assert "fixed sines" in file.doubts["num_heads"]


def test_moco_v2s_query_encoder_is_read(tmp_path):
    state = build_backbone(BackboneSpec("resnet50")).state_dict()
    both = {f"module.encoder_q.{name}": value for name, value in state.items()}
    both |= {f"module.encoder_k.{name}": 0 * value for name, value in state.items()}
    both |= {"module.encoder_q.fc.2.weight": torch.zeros(2, 2), "module.queue": torch.zeros(2, 2)}
    contents = {"state_dict": both, "arch": "resnet50"}
    file = WeightsFile.read(write(tmp_path / "x.pth", contents))
    assert torch.equal(file.backbone().conv1.weight, state["conv1.weight"])
    assert not file.doubts
    contents["arch"] = "resnetblur50"  # of the same names and shapes
    file = WeightsFile.read(write(tmp_path / "x.pth", contents))
    assert file.spec.arch == "timm/resnetblur50"
    contents["arch"] = "resnest50_of_mine"
    file = WeightsFile.read(write(tmp_path / "x.pth", contents))
    assert "resnest50_of_mine; torchvision's resnet50 is taken" in file.doubts["arch"]


@pytest.mark.parametrize(("heads", "believed"), [(12, 12), (5, 6), (0, 6), ("12", 6)])
def test_heads_in_the_command_line_of_a_file_are_believed_where_they_divide_its_width(
    heads, believed, tmp_path
):
    path = write(tmp_path / "x.pth", {"teacher": vit(384, 6), "args": Namespace(num_heads=heads)})
    file = WeightsFile.read(path)
    assert heads_of(file) == believed
    assert ("num_heads" in file.doubts) == (believed != heads)


def test_dinos_arguments_are_believed(tmp_path):
    contents = {"teacher": vit(384, 6), "args": Namespace(arch="vit_small", patch_size=8)}
    file = WeightsFile.read(write(tmp_path / "x.pth", contents))
    assert (heads_of(file), file.doubts) == (6, {})


@pytest.mark.parametrize("kind", ["config.json", "keys", "arguments"])
def test_what_timm_writes_beside_the_weights_is_believed(tmp_path, kind):
    name = "deit_tiny_patch16_224"
    model = timm.create_model(name, num_classes=0, **SMALL_VIT).eval()
    path = tmp_path / "model.pth"
    if kind == "config.json":
        path = tmp_path / "model.safetensors"
        save_file(model.state_dict(), path)
        facts = {"architecture": name, "model_args": SMALL_VIT, "num_classes": 0}
        (tmp_path / "config.json").write_text(json.dumps(facts))
    elif kind == "keys":
        facts = {"architecture": name, "model_args": SMALL_VIT}
        write(path, {"state_dict": model.state_dict(), **facts})
    else:
        kwargs = {k: v for k, v in SMALL_VIT.items() if k != "img_size"}
        arguments = Namespace(model=name, img_size=32, model_kwargs=kwargs)
        write(path, {"arch": name, "state_dict": model.state_dict(), "args": arguments})
    file = WeightsFile.read(path)
    assert (heads_of(file), file.doubts) == (4, {})
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(path)(images)[0], model(images))


@pytest.mark.parametrize("text", ["{", "[]", '{"architecture": "vit_base_patch16_224"}', "{}"])
def test_a_config_of_something_else_leaves_the_doubt(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    file = WeightsFile.read(write(tmp_path / "x.pth", vit(48, 1)))
    assert heads_of(file) == 1
    assert list(file.doubts) == ["num_heads"]


def test_positions_of_images_that_are_not_square_are_refused_even_where_their_number_is(tmp_path):
    """2 x 8 patches are as many as 4 x 4."""
    shape = {**SMALL_VIT, "img_size": (16, 64)}
    facts = {"architecture": "deit_tiny_patch16_224", "model_args": shape}
    model = timm.create_model(facts["architecture"], num_classes=0, **shape)
    write(tmp_path / "x.pth", model.state_dict())
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="laid out for 2 x 8 patches"):
        WeightsFile.read(tmp_path / "x.pth")


def test_the_normalisation_of_images_is_what_the_file_says(tmp_path):
    facts = {"architecture": "vit_tiny_patch16_224", "model_args": SMALL_VIT}
    write(tmp_path / "x.pth", vit(48, 4))
    (tmp_path / "config.json").write_text(json.dumps(facts))
    halves = (0.5, 0.5, 0.5)
    assert WeightsFile.read(tmp_path / "x.pth").normalisation == (halves, halves)
    assert load_backbone(tmp_path / "x.pth").normalisation == (halves, halves)
    facts["pretrained_cfg"] = {"mean": [0.485, 0.456, 0.406]}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    facts["pretrained_cfg"]["std"] = [0.229, 0.224, 0.225]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert WeightsFile.read(tmp_path / "x.pth").normalisation == IMAGENET
    assert not WeightsFile.read(tmp_path / "x.pth").doubts
    facts["model_args"] = SMALL_VIT | {"act_layer": "quick_gelu"}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert "QuickGELU" in WeightsFile.read(tmp_path / "x.pth").doubts["activation"]
    facts["pretrained_cfg"], facts["model_args"] = "x", [1]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert list(WeightsFile.read(tmp_path / "x.pth").doubts) == ["num_heads"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"init_values": 1e-5}, "LayerScale"),
        ({"reg_tokens": 4}, "registers"),
        ({"global_pool": "avg"}, "a norm after the pooling"),
        ({"pre_norm": True}, "a norm before the blocks"),
        ({"qk_norm": True}, "norms of queries and keys"),
    ],
)
def test_a_vit_with_what_none_here_has_is_refused_by_that(tmp_path, more, words):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL_VIT, **more)
    path = write(tmp_path / "x.pth", model.state_dict())
    with pytest.raises(InputError, match=f"network with {words}, which only those of timm have"):
        load_backbone(path)


def test_an_unusual_vit_to_start_from_is_refused_or_asked_for(tmp_path):
    state = {f"module.base_encoder.{name}": value for name, value in vit(48, 12).items()}
    path = write(tmp_path / "x.pth", {"state_dict": state})
    spec = BackboneSpec("deit_tiny", 48, (1,), patch_size=8, img_size=32)
    network = Network(build_backbone(spec), Parts())
    with pytest.raises(InputError, match=r"MODEL.NUM_HEADS \[12\]"):
        load_pretrained(network, path, "teacher", spec)
    asked = BackboneSpec("deit_tiny", 48, (1,), (3,), patch_size=8, img_size=32)
    assert load_pretrained(network, path, "teacher", asked) == ["backbone"]


def test_heads_that_no_file_says_are_doubted_at_a_start_until_an_option_says_them(tmp_path, caplog):
    path = write(tmp_path / "x.pth", vit(216, 3))
    for heads, doubt in (
        ((), "72 channels each: the file does not say; MODEL.NUM_HEADS says otherwise\n"),
        ((3,), ""),
    ):
        spec = BackboneSpec("deit_tiny", 216, (1,), heads, patch_size=8, img_size=32)
        load_pretrained(Network(build_backbone(spec), Parts()), path, "teacher", spec)
        assert caplog.text.endswith(doubt)
        assert bool(caplog.text) == bool(doubt)
        caplog.clear()


# The size that windows are laid out for


def test_a_swin_that_does_not_say_its_layout_is_taken_as_the_usual_one():
    spec, doubts = infer_spec(
        build_backbone(
            BackboneSpec("swin_tiny", 16, (1, 1, 1, 2), (1, 2, 4, 8), window_size=12, img_size=384)
        ).state_dict(),
        "x",
    )
    assert spec.img_size == 384
    assert "laid out for 384 pixels" in doubts["img_size"]


def test_windows_that_shrank_show_the_layout():
    for size in (32, 96, 224):
        made = BackboneSpec("swin_tiny", 16, (2, 2, 2, 2), (1, 2, 4, 8), 14, 4, size)
        network = build_backbone(made)
        spec, doubts = infer_spec(network.state_dict(), "x")
        again = build_backbone(spec)
        for wanted, found in zip(network.all_blocks(), again.all_blocks(), strict=True):
            assert (wanted.window_size, wanted.shift_size) == (found.window_size, found.shift_size)
        assert not doubts


@pytest.mark.parametrize("kind", ["timm's arguments", "EsViT's preset", "Microsoft's masks"])
def test_a_layout_that_the_file_shows_is_taken(tmp_path, kind):
    model = swin(448)
    state = model.state_dict()
    arguments = Namespace(arch="swin_tiny")
    if kind == "timm's arguments":
        name = "swin_tiny_patch4_window7_224"
        arguments = Namespace(model=name, img_size=448, model_kwargs=LAID_OUT)
    elif kind == "EsViT's preset":
        arguments.cfg = "experiments/imagenet/swin/swin_tiny_patch4_window7_448.yaml"
    else:
        state["layers.3.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    path = write(tmp_path / "x.pth", {"model": state, "args": arguments})
    file = WeightsFile.read(path)
    assert (file.spec.img_size, file.doubts) == (448, {})
    assert file.backbone().layers[-1].blocks[1].shift_size == (3, 3)


def test_another_layout_than_that_of_the_network_to_train_is_said(tmp_path, caplog):
    path = write(tmp_path / "x.pth", {"model": swin(448).state_dict()})
    spec = BackboneSpec("swin_tiny", 16, (1, 1, 1, 2), (1, 2, 4, 8), img_size=448)
    network = Network(build_backbone(spec), Parts())
    with caplog.at_level("WARNING"):
        load_pretrained(network, path, "teacher", spec)
    assert "laid out for 224 pixels" in caplog.text
