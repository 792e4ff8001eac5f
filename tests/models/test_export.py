"""Exported backbones: stock timm and our reader take the files and compute the same features."""

import hashlib
import json
import os
import re
import resource
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

from engine.evaluation.features import Encoder
from engine.evaluation.source import load_source
from export import export_backbone
from models import ARCHITECTURES, BackboneSpec, build_backbone, load_backbone
from models.export import TIMM_NAMES, timm_arguments, unpadded_multiple
from models.pretrained import backbone_state
from models.recognition import infer_spec
from tests.processes import ROOT, run_python
from tests.runs import pretraining, small_config
from utils import checkpoint
from utils.errors import InputError
from utils.normalisation import IMAGENET

# Maps of 12, 6 and 3 cells at 48 pixels: the first stage alone has shifted windows.
SWIN = BackboneSpec("swin_tiny", 16, (2, 2, 2), (1, 2, 4), window_size=6, img_size=48)
VIT = BackboneSpec("vit_small", 32, (2,), (2,), patch_size=8, img_size=32)
SPECS = {
    "swin": SWIN,
    "swin of one stage, odd patches": BackboneSpec(
        "swin_base", 12, (2,), (3,), window_size=2, patch_size=6, img_size=24
    ),
    "vit": VIT,
    "resnet50": BackboneSpec("resnet50", img_size=64),
}


@pytest.fixture
def script(environment):
    """Run export.py as a process on (checkpoint, output, format, *flags)."""

    def run(source, out, form, *flags, variables=(), **how) -> subprocess.CompletedProcess:
        words = ("export.py", source, out, "--format", form, *flags)
        variables = {**environment, **dict(variables)}
        return run_python(*words, environment=variables, code=None, **how)

    return run


def write_run(path: Path, spec: BackboneSpec) -> Path:
    """A checkpoint of ours whose weights and statistics are far from their initialisation."""
    torch.manual_seed(0)
    states = []
    for _ in range(2):
        backbone = build_backbone(spec)
        with torch.no_grad():
            for name, value in backbone.state_dict().items():
                if name.endswith("running_var"):
                    value.mul_(1 + torch.rand_like(value))
                elif value.is_floating_point():
                    # Strong position biases make visible which tokens share a window.
                    value.add_(torch.randn_like(value) * (2 if "bias_table" in name else 0.03))
        states.append({f"backbone.{k}": v for k, v in backbone.state_dict().items()})
    contents = {"format": checkpoint.FORMAT, "epoch": 3, "step": 40, "config": {}}
    contents |= {"student": states[0], "teacher": states[1]}
    checkpoint.save({**contents, "model": {"backbone": spec.to_dict()}}, path)
    return path


def metadata(path: Path) -> dict[str, str]:
    path = path / "model.safetensors" if path.is_dir() else path
    with safe_open(path, "pt") as file:
        return file.metadata()


def rebuilt(folder: Path, **more) -> torch.nn.Module:
    """Stock timm's model from nothing but the folder."""
    facts = json.loads((folder / "config.json").read_text())
    model = timm.create_model(facts["architecture"], num_classes=0, **facts["model_args"], **more)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    if tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 26):
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **more).eval()
    # It reads the folder's config.json alone, and gives safetensors to torch.load.
    model = timm.create_model(f"local-dir:{folder}", **more)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()


def pictures(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(network, model, size: int) -> float:
    """Largest difference of the image features, as a share of the largest value."""
    images = pictures(size)
    wanted, found = network(images)[0], model(images)
    assert wanted.shape == found.shape
    return ((wanted - found).abs().max() / wanted.abs().max()).item()


def refusal(source: Path, out: Path, form: str = "esvit", key: str = "teacher") -> str:
    with pytest.raises(InputError) as caught:
        export_backbone(source, out, form, key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def error_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    # Libraries may warn of each other's age before.
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


# timm


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "resnet50" else []) for n in SPECS],
)
def test_stock_timm_loads_the_file_strictly_and_gives_the_image_feature(tmp_path, name):
    spec = SPECS[name]
    source, out = write_run(tmp_path / "run.pth", spec), tmp_path / "out"
    export_backbone(source, out, "timm")
    model, backbone = rebuilt(out), load_backbone(source)
    assert model.num_features == backbone.num_features
    assert difference(backbone, model, spec.img_size) <= 1e-5
    assert difference(load_backbone(source, "student"), model, spec.img_size) > 1e-3
    # timm's own preprocessing then normalises as the training did.
    known = resolve_model_data_config(model)
    assert (tuple(known["mean"]), tuple(known["std"])) == IMAGENET


def test_the_metadata_tells_the_network_and_its_source(tmp_path):
    source, out = write_run(tmp_path / "run.pth", SWIN), tmp_path / "out"
    export_backbone(source, out, "timm", "student")
    facts = metadata(out)
    about = json.loads((out / "config.json").read_text())
    assert about["model_args"] == {
        "img_size": 48,
        "patch_size": 4,
        "window_size": 6,
        "embed_dim": 16,
        "depths": [2, 2, 2],
        "num_heads": [1, 2, 4],
    }
    assert (about["num_classes"], about["num_features"]) == (0, 64)
    assert about["pretrained_cfg"]["input_size"] == [3, 48, 48]
    assert "multiples of 24 pixels" in facts.pop("caveat")
    assert BackboneSpec.from_dict(json.loads(facts.pop("cmd_backbone"))) == SWIN
    assert facts == {
        "image_size": "224",
        "format": "pt",
        "architecture": "swin_tiny_patch4_window7_224",
        "input_mean": json.dumps(IMAGENET.mean),
        "input_std": json.dumps(IMAGENET.std),
        "input_normalisation": "as in training",
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "source_key": "student",
        "source_epoch": "3",
        "source_step": "40",
    }
    assert difference(load_backbone(source, "student"), rebuilt(out), 48) <= 1e-5


def test_a_swin_equals_timms_where_no_shifted_window_is_padded_and_only_there(tmp_path):
    source, out = write_run(tmp_path / "run.pth", SWIN), tmp_path / "out"
    export_backbone(source, out, "timm")
    backbone, model = load_backbone(source), rebuilt(out, strict_img_size=False)
    assert unpadded_multiple(backbone) == 24
    for size in (24, 48, 72, 96):
        assert difference(backbone, model, size) <= 1e-5
    for size in (32, 40, 56, 80):
        assert difference(backbone, model, size) > 1e-3
    with torch.device("meta"):
        assert unpadded_multiple(build_backbone(BackboneSpec("swin_tiny"))) == 112


def test_a_swin_that_pads_at_its_own_size_is_told_so(tmp_path):
    spec = BackboneSpec("swin_tiny", 16, (2, 2), (1, 2), window_size=7, img_size=64)
    source, out = write_run(tmp_path / "run.pth", spec), tmp_path / "out"
    export_backbone(source, out, "timm")
    assert "This leaves out its own img_size, 64." in metadata(out)["caveat"]
    assert difference(load_backbone(source), rebuilt(out), 64) > 1e-3


def test_a_vit_equals_timms_at_its_own_size_only(tmp_path):
    source, out = write_run(tmp_path / "run.pth", VIT), tmp_path / "out"
    export_backbone(source, out, "timm")
    backbone, model = load_backbone(source), rebuilt(out, dynamic_img_size=True)
    assert "features at 32 pixels" in metadata(out)["caveat"]
    assert difference(backbone, model, 32) <= 1e-5
    assert difference(backbone, model, 16) > 1e-4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_a_timm_name_with_its_figures(arch):
    with torch.device("meta"):
        model = timm.create_model(TIMM_NAMES[arch], num_classes=0)
    state = backbone_state(model.state_dict())
    if "pos_embed" in state:
        state["pos_embed"] = torch.ones(state["pos_embed"].shape)
    spec, _ = infer_spec(state, "timm")
    assert timm_arguments(spec) == timm_arguments(BackboneSpec(arch))


def test_timms_own_file_comes_back_as_it_was(tmp_path):
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=7, embed_dim=24, depths=(1, 2), num_heads=(1, 2)
    )
    source, out = tmp_path / "timm.pth", tmp_path / "out"
    torch.save(model.state_dict(), source)
    export_backbone(source, out, "timm")
    found = load_file(out / "model.safetensors")
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    facts = metadata(out)
    assert facts["input_normalisation"] == "ImageNet's, assumed: the source does not say"
    assert not {"source_key", "source_epoch", "source_step"} & facts.keys()


def test_a_runs_checkpoint_is_exported_by_the_script(tmp_path, script, trained):
    source, out = trained / "checkpoint.pth", tmp_path / "out"
    done = script(source, out, "timm")
    assert done.returncode == 0, done.stderr
    facts = metadata(out)
    assert done.stdout.splitlines() == [
        f"written: {out} (deit_small_patch16_224)",
        f"note: {facts['caveat']}",
    ]
    assert difference(load_backbone(source), rebuilt(out), 32) <= 1e-5
    assert (facts["source_key"], facts["source_epoch"], facts["source_step"]) == (
        "teacher",
        "4",
        "8",
    )


def test_a_model_of_timm_goes_out_as_it_came_in(tmp_path):
    """With the pixels that its weights want, and back into our own reader."""
    spec = BackboneSpec("timm/test_convnext", img_size=64)
    source, out = write_run(tmp_path / "run.pth", spec), tmp_path / "out"
    contents = torch.load(source, weights_only=True)
    contents["config"] = {"DATA": {"MEAN": [0.5] * 3, "STD": [0.25] * 3}}
    checkpoint.save(contents, source)
    export_backbone(source, out, "timm")
    model, backbone, again = rebuilt(out), load_backbone(source), load_backbone(out)
    for name, values in model.state_dict().items():
        assert torch.equal(values, backbone.model.state_dict()[name]), name
    assert torch.equal(backbone(pictures(96))[0], again(pictures(96))[0])
    # Ours keeps convolutions channels-last, for which a CPU may have another kernel.
    assert difference(backbone, model, 96) <= 1e-5
    known = resolve_model_data_config(model)
    by = tuple(known["mean"]), tuple(known["std"])
    assert by == backbone.normalisation == again.normalisation == ((0.5,) * 3, (0.25,) * 3)
    assert not (out / "pool.safetensors").exists()


@pytest.mark.parametrize("use_bn", [False, True])
def test_the_pooling_goes_along_and_the_docs_reader_pools_as_we_do(tmp_path, use_bn):
    """docs/start_from_weights.md's ten lines, on patch features of stock timm."""
    torch.manual_seed(0)
    run = pretraining(small_config(HEAD__USE_BN=use_bn))
    for name, value in run.student.state_dict().items():
        if name.endswith("running_var"):
            value.mul_(1 + torch.rand_like(value))
        elif value.is_floating_point():
            value.add_(0.3 * torch.randn_like(value))
    source, out = tmp_path / "run.pth", tmp_path / "out"
    checkpoint.save(run.state(), source)
    export_backbone(source, out, "timm", "student")
    page = (ROOT / "docs/start_from_weights.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    names = {}
    exec(snippet, names)
    images = pictures(32)
    with torch.no_grad():
        wanted = Encoder(load_source(source, "student"), "mil")(images)
        tokens = rebuilt(out).forward_features(images)[:, 1:]
        found = names["pooled"](tokens, out / "pool.safetensors")
    torch.testing.assert_close(found, wanted)
    assert (found - tokens.mean(dim=1)).abs().max() > 1e-3


# EsViT's names


@pytest.mark.parametrize(
    ("spec", "suffix"),
    [
        (BackboneSpec("swin_tiny", 16, (1, 1, 2, 1), (1, 2, 4, 8)), "pt"),
        (BackboneSpec("swin_tiny", 16, (1, 1), (1, 2)), "pth"),
        (BackboneSpec("deit_tiny", 128, (2,), (2,), patch_size=8, img_size=64), "safetensors"),
    ],
    ids=lambda value: getattr(value, "arch", value),
)
def test_a_file_with_esvits_names_is_read_back(tmp_path, spec, suffix):
    source, out = write_run(tmp_path / "run.pth", spec), tmp_path / f"out.{suffix}"
    assert "caveat" not in export_backbone(source, out, "esvit", "student")
    backbone, again = load_backbone(source, "student"), load_backbone(out, "student")
    for wanted, found in zip(backbone(pictures(64)), again(pictures(64)), strict=True):
        assert torch.isfinite(wanted).all()
        assert torch.equal(wanted, found)
    if suffix == "safetensors":
        assert metadata(out)["source_key"] == "student"
        state = load_file(out)
    else:
        contents = torch.load(out, weights_only=True)
        assert contents.keys() == {"student", "cmd_backbone"}
        state = contents["student"]
    assert state.keys() == backbone.state_dict().keys()


@pytest.mark.parametrize(
    ("spec", "words"),
    [(VIT, "num_heads 2:"), (replace(SWIN, img_size=192), "img_size 192:")],
    ids=["vit", "swin"],
)
def test_what_the_shapes_do_not_tell_is_said(tmp_path, monkeypatch, spec, words):
    source, out = write_run(tmp_path / "run.pth", spec), tmp_path / "out.safetensors"
    # What lies in the working folder says nothing about these weights.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    arguments = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
    about = {"architecture": "vit_small_patch16_224", "model_args": arguments}
    Path("config.json").write_text(json.dumps(about))
    export_backbone(source, out, "esvit")
    assert f"The shapes do not say {words}" in metadata(out)["caveat"]
    # Our own reader takes them from the file, here the metadata, in a .pth the entry beside.
    wanted, found = load_backbone(source), load_backbone(out)
    assert torch.equal(wanted(pictures(32))[0], found(pictures(32))[0])


# Refusals


def test_a_model_of_timms_has_no_names_of_esvits(tmp_path):
    source = write_run(tmp_path / "run.pth", BackboneSpec("timm/test_vit2", img_size=64))
    message = refusal(source, tmp_path / "out.pth")
    assert "no names for the weights of timm/test_vit2: take --format timm" in message
    assert os.listdir(tmp_path) == ["run.pth"]


@pytest.mark.parametrize(
    ("form", "out", "words"),
    [
        ("timm", "out.pth", "--format timm writes a folder: leave .pth out of "),
        ("esvit", "out.bin", "--format esvit writes .safetensors or .pth or .pt, not "),
        ("onnx", "out.safetensors", "--format onnx writes .onnx, not "),
        ("timm", "gone/out", "there is no folder "),
        ("esvit", "folder.pth", "could not be written: Is a directory"),
        ("esvit", "run.pth", "is the checkpoint itself"),
    ],
)
def test_an_output_that_cannot_be_is_refused(tmp_path, form, out, words):
    source = write_run(tmp_path / "run.pth", VIT)
    (tmp_path / "folder.pth").mkdir()
    before = source.read_bytes()
    message = refusal(source, tmp_path / out, form)
    assert words in message
    assert str((tmp_path / out).parent) in message
    assert source.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["folder.pth", "run.pth"]


def test_a_source_that_cannot_be_read_leaves_the_output_as_it_was(tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("earlier")
    source = write_run(tmp_path / "run.pth", VIT)
    message = refusal(source, out, key="head")
    assert "has no 'head' weights; it has: student, teacher" in message
    other = tmp_path / "other.pth"
    torch.save({"teacher": {"stem.weight": torch.zeros(1)}}, other)
    assert "has no 'student' weights; it has: teacher" in refusal(other, out, key="student")
    assert "none of the known backbones" in refusal(other, out)
    assert "there is no checkpoint at" in refusal(tmp_path / "none.pth", out)
    assert out.read_text() == "earlier"


@pytest.mark.parametrize(
    ("form", "name"), [("timm", "out/model.safetensors"), ("esvit", "out.pth")]
)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, script, form, name):
    source, file = write_run(tmp_path / "run.pth", VIT), tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("earlier")
    out = file.parent if form == "timm" else file
    done = script(source, out, form, limits={resource.RLIMIT_FSIZE: 20_000})
    assert f"{file} could not be written: " in error_line(done)
    assert file.read_text() == "earlier"
    assert sorted(os.listdir(tmp_path)) == sorted(["run.pth", out.name])


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_package_that_onnx_needs_and_lacks_is_named(tmp_path, script, package):
    # Found before any installed one: one of the two packages imports, the other does not.
    for name in ("onnx", "onnxscript"):
        (tmp_path / f"{name}.py").write_text("raise ImportError" if name == package else "")
    source, out = write_run(tmp_path / "run.pth", VIT), tmp_path / "out.onnx"
    line = error_line(script(source, out, "onnx", variables={"PYTHONPATH": str(tmp_path)}))
    assert f"needs the package {package}, " in line
    assert "pip install onnx onnxscript" in line
    assert not out.exists()
