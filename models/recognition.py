"""Which architecture a file of weights has: recorded in it, said by its makers, or by its shapes.

A number of heads, and the image size that a Swin's windows are laid out for, leave no trace in the
weights. What is taken for them without a word of the file is a doubt: a sentence that whoever loads
the file prints, and that stands beside every figure.
"""

import contextlib
import json
import re
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
from torch import Tensor

from models.registry import ARCHITECTURES, BackboneSpec, build_backbone
from utils.checkpoint import is_own
from utils.errors import InputError
from utils.normalisation import IMAGENET, Normalisation

SPEC_IN_METADATA = "cmd_backbone"
# timm's name of the file beside the weights on the Hugging Face hub.
CONFIG = "config.json"
# Vision Transformers whose heads have not 64 channels, by width: timm's, and those of MAE.
HEADS_BY_WIDTH = {1280: 16, 1408: 16, 1664: 16}
REGISTERS = ("register_tokens", "storage_tokens", "reg_token")
MOCO_V3_HEADS = 12
# What other networks of these families have and ours not, by the names of its weights.
FOREIGN = {
    r"\.ls[12]\.|\.gamma_[12]$": "LayerScale",
    r"^reg(ister)?_tokens?$": "registers",
    r"^(dist_token|head_dist\.)": "a distillation token",
    r"^fc_norm\.": "a norm after the pooling",
    r"^norm_pre\.": "a norm before the blocks",
    r"\.[qk]_norm\.": "norms of queries and keys",
    r"^absolute_pos_embed$": "absolute positions",
    r"\.(q_bias|logit_scale|cpb_mlp)": "cosine attention",
}
LARGEST_MAP = 1024  # patches a side


class NoneOfOursError(InputError):
    """Weights of no architecture that models/registry.py names."""


Doubts = dict[str, str]  # by the field of BackboneSpec


def stored_spec(contents: object, metadata: dict[str, str]) -> BackboneSpec | None:
    """The architecture that a checkpoint or an export of ours records; None for anyone else's."""
    if is_own(contents):
        return BackboneSpec.from_dict(contents["model"]["backbone"])
    try:
        return BackboneSpec.from_dict(json.loads((metadata or contents)[SPEC_IN_METADATA]))
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def recognised(
    state: dict[str, Tensor], path: str | Path, contents: object, near: str
) -> tuple[BackboneSpec, Doubts]:
    """`infer_spec`, and where none of ours fits the model of timm that a file says it is.

    near: timm's model of weights whose makers are known; see `provenance`.
    """
    said, arguments = said_of_timm(contents, path)
    others = f"timm/{said}" if said else near
    size = {"img_size": arguments["img_size"]} if arguments.get("img_size") else {}
    try:
        spec, doubts = infer_spec(state, path, contents)
    except NoneOfOursError:
        if not others:
            raise
        return BackboneSpec(others, **size), {}
    is_foreign = any(re.search(pattern, name) for name in state for pattern in FOREIGN)
    if others and (is_foreign or "arch" in doubts or not _fits(spec, state)):
        return BackboneSpec(others, **size), {}
    return spec, doubts


def _fits(spec: BackboneSpec, state: dict[str, Tensor]) -> bool:
    """Whether a backbone's parameters are all in the state, in their shapes."""
    with torch.device("meta"):
        parameters = build_backbone(spec).named_parameters()
    return all(k in state and state[k].shape == value.shape for k, value in parameters)


def infer_spec(
    state: dict[str, Tensor], path: str | Path, contents: object = None
) -> tuple[BackboneSpec, Doubts]:
    """An architecture by the shapes of a backbone's weights in EsViT's names, and what is doubtful.

    contents: the whole file, which with a config.json of timm beside it may say more than the
    shapes. Raises InputError where they are of no known backbone.
    """
    if "conv1.weight" in state and "layer4.2.conv3.weight" in state:
        names = (name.split(".")[0] for name, *_ in _statements(contents, path))
        other = next((name for name in names if re.search("resne[txs]", name)), "resnet50")
        doubt = {"arch": f"the file says that it is a {other}; torchvision's resnet50 is taken"}
        return BackboneSpec("resnet50"), doubt if other != "resnet50" else {}
    if "patch_embed.proj.weight" in state:
        known = said(contents, state, path)
        rows, columns = known.get("grid", (0, 0))
        if rows != columns:  # which a number of position embeddings may not show
            raise InputError(
                f"{path} says of itself that it is laid out for {rows} x {columns} patches: the "
                f"networks of this project are for square images."
            )
        if "layers.0.blocks.0.norm1.weight" in state:
            return _infer_swin(state, path, known)
        if "pos_embed" in state:
            return _infer_vit(state, known, contents)
    raise NoneOfOursError(
        f"{path} holds none of the known backbones ({', '.join(ARCHITECTURES)}), nor does it say "
        f"which of timm's (--arch timm/NAME does, or a config.json beside it); its "
        f"first keys are: {few(state)}."
    )


def _infer_swin(
    state: dict[str, Tensor], path: str | Path, known: dict
) -> tuple[BackboneSpec, Doubts]:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    stages = _count(state, r"layers\.(\d+)\.")
    depths = tuple(_count(state, rf"layers\.{s}\.blocks\.(\d+)\.") for s in range(stages))
    names = [f"layers.{s}.blocks.0.attn.relative_position_bias_table" for s in range(stages)]
    if lost := [name for name in names if name not in state]:
        raise InputError(f"{path} has weights of a Swin but not all: missing: {few(lost)}.")
    tables = [state[name] for name in names]
    heads = tuple(table.shape[1] for table in tables)
    # A table has (2w - 1)^2 rows; later stages' windows shrink to their maps.
    windows = [(round(len(table) ** 0.5) + 1) // 2 for table in tables]
    arch = _named("swin", embed_dim=width, depths=depths, num_heads=heads)
    sides = _layouts(state, windows, depths)
    doubts, size = {}, known.get("img_size")
    if size is None:
        # As is usual: the last stage's map is one window. Or 224 pixels where that is the same.
        usual = windows[-1] * 2 ** (stages - 1)
        usual = usual if usual in sides else min(sides, default=usual)
        plain = 224 // patch
        size = patch * (plain if sides.get(plain) == sides.get(usual, ()) else usual)
        if len(set(sides.values())) != 1:
            doubts["img_size"] = (
                f"its windows are taken as laid out for {size} pixels, which the file does not "
                f"say: laid out for more, its last stage shifts them"
            )
    spec = BackboneSpec(arch, width, depths, heads, windows[0], patch_size=patch, img_size=size)
    return spec, doubts | _unlike_here(known)


def _layouts(
    state: dict[str, Tensor], windows: list[int], depths: tuple[int, ...]
) -> dict[int, tuple[bool, ...]]:
    """Sides of the first map, in patches, that fit the windows, and which stages each shifts.

    Microsoft's files keep the masks of the shifted windows, [windows, M², M²], which say more.
    """
    masks = {name: len(mask) for name, mask in state.items() if name.endswith(".attn_mask")}
    found, step = {}, 2 ** (len(windows) - 1)
    for side in range(step, LARGEST_MAP + 1, step):
        maps = [side // 2**stage for stage in range(len(windows))]
        shifts = tuple(
            window < own and depth > 1
            for window, own, depth in zip(windows, maps, depths, strict=True)
        )
        wanted = {
            f"layers.{stage}.blocks.{block}.attn_mask": (maps[stage] / windows[stage]) ** 2
            for stage, depth in enumerate(depths)
            for block in range(1, depth, 2)
            if shifts[stage]
        }
        are_windows = all(w == min(windows[0], own) for w, own in zip(windows, maps, strict=True))
        if are_windows and (not masks or masks == wanted):
            found[side] = shifts
    return found


def _infer_vit(
    state: dict[str, Tensor], known: dict, contents: object
) -> tuple[BackboneSpec, Doubts]:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = _count(state, r"blocks\.(\d+)\.")
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    heads, doubts = HEADS_BY_WIDTH.get(width, max(1, width // 64)), {}
    if "num_heads" in known:
        (heads,) = known["num_heads"]
    elif names := _moco_v3(state, contents, width):
        heads = MOCO_V3_HEADS
        doubts["num_heads"] = f"{heads} attention heads are taken, as MoCo v3's have: {names}"
    else:
        usual = " as is usual" * (width in HEADS_BY_WIDTH or width % 64 == 0)
        doubts["num_heads"] = (
            f"{heads} attention heads are taken, {width / heads:g} channels each{usual}: the file "
            f"does not say"
        )
    arch = _named("vit", embed_dim=width, depths=(depth,), num_heads=(heads,))
    spec = BackboneSpec(arch, width, (depth,), (heads,), patch_size=patch, img_size=side * patch)
    return spec, doubts | _unlike_here(known)


def _unlike_here(known: dict) -> Doubts:
    """What the file says of itself that is done otherwise here, whatever the options."""
    if (activation := known.get("activation", "GELU")) != "GELU":
        return {"activation": f"its activation is {activation}; here GELU is taken"}
    return {}


def _moco_v3(state: dict[str, Tensor], contents: object, width: int) -> str:
    """By what a ViT shows itself as one of MoCo v3; "" where it does not."""
    state_dict = contents.get("state_dict") if isinstance(contents, dict) else None
    if any(re.match(r"(module\.)?(base|momentum)_encoder\.", name) for name in state_dict or ()):
        return "the file has its names"
    # MAE's are fixed too, but that has no ViT-S. [CLS] gets none.
    if width == 384 and _fixed_sines(state):
        return "its position embeddings are fixed sines"
    return ""


def said(contents: object, state: dict[str, Tensor], path: str | Path) -> dict:
    """Fields of BackboneSpec by what the file, or timm's config.json beside it, says of itself.

    Names of architectures count where what they stand for has the weights' width. timm's mean
    their network with the arguments beside them; DINO's and EsViT's ours.
    """
    width, known = len(state.get("norm.weight", ())), {}
    for name, arguments, _ in _statements(contents, path):
        own = ARCHITECTURES.get(name, {})
        if own.get("family") == "vit" and own["embed_dim"] == width:
            if not _moco_v3(state, contents, width):  # its vit_small is another
                known["num_heads"] = own["num_heads"]
        elif timm.is_model(name):
            known |= _of_timm(name, arguments, width)
        if known:
            break
    heads = _arguments(contents).get("num_heads")
    if isinstance(heads, int) and heads > 0 and not width % heads:
        known.setdefault("num_heads", (heads,))
    layout = re.search(r"window\d+_(\d+)", str(_arguments(contents).get("cfg", "")))
    if layout:  # of EsViT's presets
        known.setdefault("img_size", int(layout[1]))
    return known


def said_of_timm(contents: object, path: str | Path) -> tuple[str, dict]:
    """The model of timm that a file says it is, and its keyword arguments; "" where it does not."""
    found = _statements(contents, path)
    return next(((name, more) for name, more, _ in found if timm.is_model(name)), ("", {}))


def normalisation_of(
    contents: object, metadata: dict[str, str], path: str | Path
) -> Normalisation | None:
    """Of the images in training, by what a file, or the config.json beside it, says of itself.

    None where it says nothing. timm's names stand for what timm normalises by.
    """
    if is_own(contents):
        data = _dict(contents.get("config")).get("DATA", {})
        own = data.get("MEAN"), data.get("STD")
        return _normalisation(*own) or IMAGENET
    if "input_mean" in metadata:
        with contextlib.suppress(ValueError):
            return _normalisation(
                json.loads(metadata["input_mean"]), json.loads(metadata.get("input_std", "0"))
            )
    for name, _, facts in _statements(contents, path):
        timms = timms_normalisation(name) if timm.is_model(name) else (None, None)
        if found := _normalisation(facts.get("mean") or timms[0], facts.get("std") or timms[1]):
            return found
    return None


def timms_normalisation(name: str) -> Normalisation:
    """By which timm normalises images for its weights of this model."""
    facts = timm.get_pretrained_cfg(name)
    return _normalisation(facts.mean, facts.std) if facts else IMAGENET


def _normalisation(mean: object, std: object) -> Normalisation | None:
    """None of what are not two times three numbers."""
    with contextlib.suppress(ValueError, TypeError):
        found = Normalisation(tuple(map(float, mean)), tuple(map(float, std)))
        if len(found.mean) == len(found.std) == 3 and min(found.std) > 0:
            return found
    return None


def _statements(contents: object, path: str | Path) -> Iterable[tuple[str, dict, dict]]:
    """(name of an architecture, its keyword arguments, what holds mean and std), surest first."""
    try:
        beside = json.loads((Path(path).parent / CONFIG).read_text())
    except (OSError, ValueError):
        beside = None
    arguments = _arguments(contents)
    size = {"img_size": arguments["img_size"]} if arguments.get("img_size") else {}
    of_run = {**size, **_dict(arguments.get("model_kwargs"))}
    for facts, more in ((_dict(beside), {}), (_dict(contents), of_run), (arguments, of_run)):
        for key in ("architecture", "arch", "model"):
            if isinstance(facts.get(key), str):
                of_images = {**arguments, **_dict(facts.get("pretrained_cfg"))}
                yield facts[key], {**more, **_dict(facts.get("model_args"))}, of_images


def _arguments(contents: object) -> dict:
    """The command line of the run that made a file, where it is kept as DINO and timm do."""
    arguments = _dict(contents).get("args")
    return vars(arguments) if isinstance(arguments, Namespace) else _dict(arguments)


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _of_timm(name: str, arguments: dict, width: int) -> dict:
    """What timm's model of this name says that shapes do not; {} where it has another width."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0, **arguments)
        if model.num_features != width:
            return {}
        known = {
            "img_size": model.patch_embed.img_size[0],
            "grid": model.patch_embed.grid_size,
        }
        block = next(part for part in model.modules() if hasattr(part, "mlp"))
        known["activation"] = type(block.mlp.act).__name__
        if hasattr(model, "blocks"):
            known["num_heads"] = (block.attn.num_heads,)
        return known
    except Exception:  # whatever a foreign name with foreign arguments makes timm do
        return {}


# Vision Transformers by width: the field's letter, and timm's word.
VITS = {
    192: ("Ti", "tiny"),
    384: ("S", "small"),
    768: ("B", "base"),
    1024: ("L", "large"),
    1280: ("H", "huge_plus"),
    1536: ("g", "giant"),
    4096: ("7B", "7b"),
}


def provenance(contents: object, state: dict[str, Tensor]) -> tuple[str, str]:
    """Whose weights these are, by the names in a file, and the name here of such a network.

    state: of the one network, as `select_state` gives it. "DINOv2's weights of a ViT-S/14" and
    "timm/vit_small_patch14_dinov2"; "" each where the names are those of many.
    """
    if is_own(contents):
        return "", ""
    names = [*state]

    def has(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in names)

    raw = [str(name) for name in _dict(_dict(contents).get("state_dict"))]
    width, patch = 0, 0
    if "patch_embed.proj.weight" in state:
        width, _, _, patch = state["patch_embed.proj.weight"].shape
    letter, word = VITS.get(width, ("", ""))
    vit = f"a ViT-{letter}/{patch}" if letter else f"a ViT of width {width}"
    tokens = next((state[n].shape[1] for n in REGISTERS if n in state), 0)
    registers = f" with {tokens} registers" if tokens else ""
    if any(re.match(r"(module\.)?(base|momentum)_encoder\.", name) for name in raw):
        return f"MoCo v3's weights of {vit if width else 'a ResNet'}", ""
    if any(re.match(r"(module\.)?encoder_[qk]\.", name) for name in raw):
        return "MoCo v2's weights of a ResNet", ""
    if "storage_tokens" in state:
        return f"DINOv3's weights of {vit}{registers}", _if_of_timm(
            f"vit_{word}_patch{patch}_dinov3"
        )
    if has(r"downsample_layers\.0\.0\.") and has(r"norms\.\d\."):
        return "DINOv3's weights of a ConvNeXt", ""
    if "mask_token" in state and has(r"blocks\.(\d+\.)+ls1\."):
        kind = "reg4_dinov2" if tokens else "dinov2"
        return f"DINOv2's weights of {vit}{registers}", _if_of_timm(
            f"vit_{word}_patch{patch}_{kind}"
        )
    if has(r"decoder_blocks\.") or (width >= 768 and has("cls_token$") and _fixed_sines(state)):
        return f"MAE's weights of {vit}", ""
    if has(r"embeddings\.(cls_token|patch_embeddings)") or has(
        r"(encoder\.)?layers?\.\d+\.(attention|layernorm)"
    ):
        return "weights in the names of the transformers library", ""
    if has(r"(features\.\d+\.|conv_proj\.|encoder\.layers\.encoder_layer_0)"):
        return "torchvision's weights", ""
    if has(r"layer1\.0\.conv1\.") and has(r"fc\.weight$"):
        return "weights of a ResNet in torchvision's names", ""
    if {"student", "teacher"} & _dict(contents).keys():
        if has(r"layers\.0\.blocks"):
            return "EsViT's weights of a Swin", ""
        return f"DINO's weights of {vit if width else 'a ResNet'}", ""
    return "", ""


def _fixed_sines(state: dict[str, Tensor]) -> bool:
    """Whether [CLS] has no position: embeddings are fixed, as MAE's and MoCo v3's."""
    return "pos_embed" in state and not state["pos_embed"][0, 0].any()


def _if_of_timm(name: str) -> str:
    return f"timm/{name}" if timm.is_model(name) else ""


def _count(state: dict[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    return 1 + max(found, default=-1)


def _named(family: str, **figures) -> str:
    """The registry's name with these figures, else the family's first with them overridden."""
    for name, known in ARCHITECTURES.items():
        if known["family"] == family and all(known[k] == v for k, v in figures.items()):
            return name
    return next(name for name, known in ARCHITECTURES.items() if known["family"] == family)


def few(names: Iterable[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
