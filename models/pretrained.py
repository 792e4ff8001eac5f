"""Reading weights: ours, and those of EsViT, CMD's release, DINO, torchvision and timm.

Every reader ends in a strict load: a key that is missing or left over is an error that
names it, but for the left-overs that are expected (buffers, and heads where only the
backbone is wanted).
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.registry import ARCHITECTURES, BackboneSpec, build_backbone
from utils.checkpoint import check_format, is_own, load_file
from utils.checkpoint import metadata as checkpoint_metadata
from utils.errors import InputError
from utils.logging import logger

BUFFERS = r"(relative_position_index|attn_mask|num_batches_tracked)$"
SPEC_IN_METADATA = "cmd_backbone"
# Options that shape a backbone.
SHAPING = ("MODEL.ARCH", "MODEL.WINDOW_SIZE", "MODEL.PATCH_SIZE", "MODEL.IMG_SIZE")
HEADS = r"^(head|head_dense|fc|pool|rationale)\."
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|backbone\.)+")


def load_backbone(
    path: str | Path, checkpoint_key: str = "teacher", spec: BackboneSpec | None = None
) -> Backbone:
    """The backbone in a checkpoint, in eval mode, on the CPU, without gradients.

    path: a file of this project, EsViT, CMD's release, DINO, torchvision or timm (.pth, .pt,
    .safetensors). checkpoint_key: "teacher" or "student", where the file has both.
    spec: the architecture; by default the one stored in the file or read off its shapes.
    Calling the result on images [B, 3, H, W] gives (image feature [B, D], patch features
    [B, N, D]). Raises InputError naming what does not fit.
    """
    return WeightsFile.read(path, checkpoint_key, spec).backbone()


@dataclass(frozen=True)
class WeightsFile:
    """One network's weights in a file.

    contents: all that the file holds. metadata: what a safetensors file says beside it. state:
    the network's weights in EsViT's names. spec: the architecture.
    """

    path: Path
    key: str
    contents: dict
    metadata: dict[str, str]
    state: dict[str, Tensor]
    spec: BackboneSpec

    @classmethod
    def read(
        cls, path: str | Path, key: str = "teacher", spec: BackboneSpec | None = None
    ) -> "WeightsFile":
        """Read a file; spec: by default the one stored in it or read off its shapes.

        Raises InputError where it is missing, damaged, or holds no known network.
        """
        contents = load_file(path)
        state = backbone_state(select_state(contents, key, path))
        metadata = checkpoint_metadata(path)
        if spec is None:
            spec = stored_spec(contents, metadata) or infer_spec(state, path)
        return cls(Path(path), key, contents, metadata, state, spec)

    def backbone(self) -> Backbone:
        """The backbone, in eval mode, on the CPU, without gradients; InputError if misfit."""
        backbone = build_backbone(self.spec)
        load_strictly(backbone, self.state, f"{self.path} ({self.spec.arch})", HEADS)
        return backbone.eval().requires_grad_(False)


def select_state(checkpoint: object, key: str, path: str | Path) -> dict[str, Tensor]:
    """The one network's weights in a file's contents, wrappers' prefixes removed."""
    if is_own(checkpoint):
        check_format(checkpoint, path)
    state = checkpoint
    if isinstance(checkpoint, dict):
        if key in checkpoint:
            state = checkpoint[key]
        elif "student" in checkpoint or "teacher" in checkpoint:
            held = [name for name in ("student", "teacher") if name in checkpoint]
            raise InputError(f"{path} has no '{key}' weights; it has: {', '.join(held)}.")
        elif key not in ("student", "teacher"):
            held = ", ".join(map(str, checkpoint))[:200]
            raise InputError(f"{path} has nothing under '{key}'; it has: {held}.")
        elif taken := next((name for name in ("model", "state_dict") if name in checkpoint), None):
            state = checkpoint[taken]
            names = _tensors(state).keys()
            others = {k: _tensors(held).keys() for k, held in checkpoint.items() if k != taken}
            for other in (k for k, theirs in others.items() if names and theirs == names):
                logger.warning(
                    f"{path}: the weights under '{taken}' are taken; those under '{other}' "
                    f"(--checkpoint_key {other}) may be their average"
                )
    tensors = _tensors(state)
    if not tensors:
        held = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else "no names"
        raise InputError(
            f"{path} holds no network weights under a name that is known (teacher, student, model, "
            f"state_dict, or the weights themselves); it has: {held[:200]}."
        )
    return tensors


def _tensors(state: object) -> dict[str, Tensor]:
    """The tensors of a state_dict, wrappers' prefixes removed; nothing of anything else."""
    items = state.items() if isinstance(state, dict) else ()
    return {
        _WRAPPERS.sub("", k): v for k, v in items if isinstance(k, str) and isinstance(v, Tensor)
    }


def backbone_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names brought to EsViT's: timm >= 0.9 numbers a Swin downsample with the stage after it.

    Told apart by layers.0.downsample, which only EsViT's numbering has.
    """
    downsamples = [name for name in state if re.match(r"layers\.\d+\.downsample\.", name)]
    if not downsamples or any(name.startswith("layers.0.") for name in downsamples):
        return state
    return _with_downsamples_moved(state, -1)


def timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `backbone_state`: EsViT's names brought to those of timm >= 0.9."""
    return _with_downsamples_moved(state, 1)


def _with_downsamples_moved(state: dict[str, Tensor], stages: int) -> dict[str, Tensor]:
    return {
        re.sub(
            r"^layers\.(\d+)\.downsample\.",
            lambda match: f"layers.{int(match[1]) + stages}.downsample.",
            name,
        ): value
        for name, value in state.items()
    }


def load_strictly(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str,
    expected_leftovers: str = r"$^",
    options: Sequence[str] = (),
) -> None:
    """Load all of `module` from `state`; name what is missing, left over or of another shape.

    expected_leftovers: a pattern of names that may be left over, besides buffers. options: those
    that shape the module. Raises InputError for these faults, and for numbers that are not finite.
    """
    wanted = module.state_dict()
    expected = re.compile(f"{BUFFERS}|{expected_leftovers}")
    faults = {
        "missing": [n for n in wanted if n not in state and not re.search(BUFFERS, n)],
        "left over": [n for n in state if n not in wanted and not expected.search(n)],
        "of another shape": [
            f"{name} is {list(state[name].shape)} in the file, {list(value.shape)} here"
            for name, value in wanted.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{what}: {_few(names)}" for what, names in faults.items() if names)
        raise InputError(
            f"{source}: the weights do not fit the network. {listed}."
            + (f" Check {', '.join(options)}." if options else "")
        )
    taken = {name: state[name] for name in wanted if name in state}
    if broken := [name for name, value in taken.items() if not value.isfinite().all()]:
        raise InputError(
            f"{source}: NaN or infinity stands in {len(broken)} of its {len(taken)} tensors "
            f"({_few(broken)}): the run that made it has diverged. Take an earlier checkpoint."
        )
    module.load_state_dict(taken, strict=False)


def _few(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def stored_spec(checkpoint: object, metadata: dict[str, str]) -> BackboneSpec | None:
    """The architecture that a checkpoint or an export of ours records; None for anyone else's."""
    if is_own(checkpoint):
        return BackboneSpec.from_dict(checkpoint["model"]["backbone"])
    try:
        return BackboneSpec.from_dict(json.loads(metadata[SPEC_IN_METADATA]))
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def infer_spec(state: dict[str, Tensor], path: str | Path) -> BackboneSpec:
    """Read an architecture off the shapes of a backbone's weights in EsViT's names."""
    if "conv1.weight" in state and "layer4.2.conv3.weight" in state:
        return BackboneSpec("resnet50")
    if "patch_embed.proj.weight" in state and "layers.0.blocks.0.norm1.weight" in state:
        return _infer_swin(state, path)
    if "patch_embed.proj.weight" in state and "pos_embed" in state:
        return _infer_vit(state)
    raise InputError(
        f"{path} holds none of the known backbones ({', '.join(ARCHITECTURES)}); "
        f"its first keys are: {_few(state)}."
    )


def _count(state: dict[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    return 1 + max(found, default=-1)


def _named(family: str, **figures) -> str:
    """The registry's name with these figures, else the family's first with them overridden."""
    for name, known in ARCHITECTURES.items():
        if known["family"] == family and all(known[k] == v for k, v in figures.items()):
            return name
    return next(name for name, known in ARCHITECTURES.items() if known["family"] == family)


def _infer_swin(state: dict[str, Tensor], path: str | Path) -> BackboneSpec:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    stages = _count(state, r"layers\.(\d+)\.")
    depths = tuple(_count(state, rf"layers\.{s}\.blocks\.(\d+)\.") for s in range(stages))
    names = [f"layers.{s}.blocks.0.attn.relative_position_bias_table" for s in range(stages)]
    if lost := [name for name in names if name not in state]:
        raise InputError(f"{path} has weights of a Swin but not all: missing: {_few(lost)}.")
    tables = [state[name] for name in names]
    heads = tuple(table.shape[1] for table in tables)
    # A table has (2w - 1)^2 rows; later stages' windows shrink to their maps.
    window = (round(len(tables[0]) ** 0.5) + 1) // 2
    arch = _named("swin", embed_dim=width, depths=depths, num_heads=heads)
    return BackboneSpec(arch, width, depths, heads, window_size=window, patch_size=patch)


def _infer_vit(state: dict[str, Tensor]) -> BackboneSpec:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = _count(state, r"blocks\.(\d+)\.")
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    # Heads leave no trace in the shapes: the family has 64 channels a head.
    heads = max(1, width // 64)
    arch = _named("vit", embed_dim=width, depths=(depth,), num_heads=(heads,))
    return BackboneSpec(arch, width, (depth,), (heads,), patch_size=patch, img_size=side * patch)


def load_pretrained(network: nn.Module, path: str | Path, key: str) -> list[str]:
    """Start a network from someone's weights; returns the names of the parts that were read.

    The backbone must fit. A head, region head, pooling or LCR's branch is read too where the file
    has one of the same shape, and keeps its fresh initialisation otherwise.
    """
    state = backbone_state(select_state(load_file(path), key, path))
    load_strictly(network.backbone, state, str(path), HEADS, SHAPING)
    read = ["backbone"]
    for part in ("head", "head_dense", "pool", "rationale"):
        module = getattr(network, part)
        if module is None:
            continue
        own = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
        wanted = module.state_dict()
        if own.keys() == wanted.keys() and all(own[k].shape == wanted[k].shape for k in wanted):
            load_strictly(module, own, f"{path} ({part})")
            read.append(part)
    return read


@torch.no_grad()
def count_parameters(module: nn.Module) -> int:
    """Number of values in the module's parameters, trained or not."""
    return sum(parameter.numel() for parameter in module.parameters())
