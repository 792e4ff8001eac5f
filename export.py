"""The backbone of a checkpoint, written for other programs to read.

    python export.py CKPT OUT --format timm
        a folder: timm.create_model("local-dir:OUT", pretrained=True) loads its model.safetensors
        and config.json; pool.safetensors, of a run with the MIL pooling, is what pools patch
        features (docs/start_from_weights.md)
    python export.py CKPT OUT.pth --format esvit             # or .pt, .safetensors
        EsViT's names; .pth and .pt hold {checkpoint key: weights}, as its scripts expect
    python export.py CKPT OUT.onnx --format onnx
        both features at the size the network is laid out for, any batch; needs the packages
        onnx and onnxscript
CKPT: a file of this project, EsViT, CMD's release, DINO, torchvision or timm. The metadata
of .safetensors and .onnx also names the source and how images are to be normalised.
"""

import argparse
import json
from pathlib import Path

from models import export
from models.pretrained import WeightsFile
from models.recognition import CONFIG, SPEC_IN_METADATA, normalisation_of
from utils import checkpoint, config
from utils.cli import Parser
from utils.errors import InputError, run_script
from utils.files import make_folder, replacing, write_json

POOL = "pool.safetensors"
SUFFIXES = {
    "timm": ("",),
    "esvit": (".safetensors", ".pth", ".pt"),
    "onnx": (".onnx",),
}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="trained weights")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write, or a folder for timm")
    parser.add_argument("--format", choices=SUFFIXES, required=True, help="who is to read OUT")
    parser.add_argument("--checkpoint_key", default="teacher", help="teacher or student [teacher]")
    arguments = parser.parse_args()
    facts = export_backbone(
        arguments.checkpoint, arguments.out, arguments.format, arguments.checkpoint_key
    )
    print(f"written: {arguments.out} ({facts['architecture']})")
    if "caveat" in facts:
        print(f"note: {facts['caveat']}")
    if "doubts" in facts:
        print(f"note: {facts['doubts']}")


def export_backbone(source: Path, out: Path, form: str, key: str = "teacher") -> dict[str, str]:
    """Write the backbone of `source` to `out`; returns the file's metadata.

    form: a key of SUFFIXES. key: "teacher" or "student". Raises InputError where either file
    will not do; whatever was at `out` is still there then.
    """
    check_target(source, out, form)
    file = WeightsFile.read(source, key)
    backbone, spec = file.backbone(), file.spec
    facts = {"architecture": spec.arch, SPEC_IN_METADATA: json.dumps(spec.to_dict())}
    facts |= describe_source(file)
    if file.doubts:
        facts["doubts"] = "; ".join(file.doubts.values())
    if form == "timm":
        size = int(facts.get("image_size", spec.img_size))
        state, about, caveat = export.to_timm(backbone, spec, size)
        facts |= {"architecture": about["architecture"]} | ({"caveat": caveat} if caveat else {})
        make_folder(out, "OUT")
        checkpoint.save_safetensors(state, {"format": "pt", **facts}, out / checkpoint.WEIGHTS)
        write_json(out / CONFIG, about)
        (out / POOL).unlink(missing_ok=True)
        if parts := export.pooling(file.state):
            checkpoint.save_safetensors(parts, {"format": "pt", **facts}, out / POOL)
    elif form == "esvit":
        if caveat := export.esvit_caveat(backbone, spec):
            facts["caveat"] = caveat
        if out.suffix == ".safetensors":
            checkpoint.save_safetensors(backbone.state_dict(), {"format": "pt", **facts}, out)
        else:
            spec_of_ours = {SPEC_IN_METADATA: facts[SPEC_IN_METADATA]}
            checkpoint.save({key: backbone.state_dict(), **spec_of_ours}, out)
    else:
        program = export.to_onnx(backbone, spec.img_size)
        program.model.metadata_props.update(facts)
        with replacing(out) as temporary:
            program.save(temporary)
    return facts


def check_target(source: Path, out: Path, form: str) -> None:
    """Say before anything is read what could not be written."""
    if form == "timm" and out.suffix and not out.is_dir():
        raise InputError(f"--format timm writes a folder: leave {out.suffix} out of {out}.")
    if form != "timm" and out.suffix not in SUFFIXES[form]:
        raise InputError(f"--format {form} writes {' or '.join(SUFFIXES[form])}, not {out}.")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write {out.name} into.")
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{out} is the checkpoint itself: choose another name.")
    if form == "onnx":
        export.require_onnx()


def describe_source(file: WeightsFile) -> dict[str, str]:
    """Where the weights come from and what images they want, as a file's metadata."""
    facts = {
        "source_sha256": checkpoint.sha256(file.path),
        "input_mean": json.dumps(file.normalisation.mean),
        "input_std": json.dumps(file.normalisation.std),
        "input_normalisation": "ImageNet's, assumed: the source does not say",
    }
    if normalisation_of(file.contents, file.metadata, file.path):
        facts["input_normalisation"] = "as the source says"
    if checkpoint.is_own(file.contents):
        facts["input_normalisation"] = "as in training"
        size = config.eval_size(config.from_dict(file.contents["config"], str(file.path)))
        facts["image_size"] = str(size)
    if file.key in file.contents:
        facts["source_key"] = file.key
    for name in ("epoch", "step"):
        if isinstance(file.contents.get(name), int):
            facts[f"source_{name}"] = str(file.contents[name])
    return facts


if __name__ == "__main__":
    run_script(main)
