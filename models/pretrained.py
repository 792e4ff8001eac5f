"""Reading weights: ours, and those of EsViT, CMD's release, DINO, torchvision, timm and others.

Every reader ends in a strict load: a key that is missing or left over is an error that
names it, but for the left-overs that are expected (buffers, and heads where only the
backbone is wanted), which are listed.
"""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.recognition import (
    FOREIGN,
    Doubts,
    few,
    normalisation_of,
    provenance,
    recognised,
    said_of_timm,
    stored_spec,
    timms_normalisation,
)
from models.registry import BackboneSpec, build_backbone, resolve
from models.timm_backbone import PREFIX, TimmBackbone
from utils.checkpoint import check_format, is_own, load_file, weights_file
from utils.checkpoint import metadata as checkpoint_metadata
from utils.errors import InputError
from utils.logging import logger
from utils.normalisation import IMAGENET, Normalisation

BUFFERS = r"(relative_position_index|attn_mask|num_batches_tracked)$"
# Options that shape a backbone.
SHAPING = ("MODEL.ARCH", "MODEL.WINDOW_SIZE", "MODEL.PATCH_SIZE", "MODEL.IMG_SIZE")
# Parts of a network of ours beside its backbone.
PARTS = ("head", "head_dense", "head_bag", "pool", "rationale")
HEADS = (
    rf"^(model\.)?(({'|'.join(PARTS)}|head_dist|fc|classifier|last_linear|projectors|"
    r"norms|dino_head|ibot_head|decoder_\w+)\.|(mask_token|decoder_pos_embed)$)"
)
# By which timm's files name what brings other people's weights to its names.
CONVERTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
# A query and a key encoder side by side: MoCo v3's and v2's. The first is the one in use.
ENCODERS = ("base_encoder.", "encoder_q.", "momentum_encoder.", "encoder_k.")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|backbone\.)+")


def load_backbone(
    path: str | Path, checkpoint_key: str = "teacher", spec: BackboneSpec | None = None
) -> Backbone:
    """The backbone in a checkpoint, in eval mode, on the CPU, without gradients.

    path: a file of this project, EsViT, CMD's release, DINO, torchvision, timm or another whose
    names are known (.pth, .pt, .bin, .safetensors), or a folder for timm. checkpoint_key: "teacher"
    or "student", where the file has both.
    spec: the architecture; by default the one stored in the file or read off its shapes.
    Calling the result on images [B, 3, H, W], normalised by its `normalisation`, gives (image
    feature [B, D], patch features [B, N, D]). Raises InputError naming what does not fit; a line
    says what is doubtful.
    """
    file = WeightsFile.read(path, checkpoint_key, spec)
    for doubt in file.doubts.values():
        logger.warning(f"{path}: {doubt}")
    return file.backbone()


@dataclass(frozen=True)
class WeightsFile:
    """One network's weights in a file.

    contents: all that the file holds. metadata: what a safetensors file says beside it. state:
    the network's weights in EsViT's names. spec: the architecture. doubts: what of it the file does
    not say; see models/recognition.py. whose: whose weights they are by their names, in words.
    normalisation: of the images that they were trained with.
    """

    path: Path
    key: str
    contents: dict
    metadata: dict[str, str]
    state: dict[str, Tensor]
    spec: BackboneSpec
    doubts: Doubts = field(default_factory=dict)
    whose: str = ""
    normalisation: Normalisation = IMAGENET

    @classmethod
    def read(
        cls, path: str | Path, key: str = "teacher", spec: BackboneSpec | None = None
    ) -> "WeightsFile":
        """Read a file; spec: by default the one stored in it or read off its shapes.

        Raises InputError where it is missing, damaged, or holds no known network.
        """
        path = weights_file(path)
        contents, metadata = load_file(path), checkpoint_metadata(path)
        state = select_state(contents, key, path)
        whose, near = provenance(contents, state)
        spec, doubts = spec or stored_spec(contents, metadata), {}
        if spec is None:
            spec, doubts = recognised(backbone_state(state), path, contents, near)
        by = normalisation_of(contents, metadata, path)
        if spec.arch.startswith(PREFIX):
            if by is None and "'s weights of" not in whose:  # the known makers' are ImageNet's
                by = timms_normalisation(spec.arch.removeprefix(PREFIX))
        else:
            state = backbone_state(state)
        by = by or IMAGENET
        return cls(path, key, contents, metadata, state, spec, doubts, whose, by)

    def lines(self) -> list[str]:
        """Whose weights they are, and how their images are normalised where not by ImageNet's."""
        said = [f"{self.path} holds {self.whose}"] if self.whose else []
        if self.normalisation != IMAGENET:
            said.append(f"images are normalised as for {self.path}: {self.normalisation}")
        return said

    def backbone(self) -> Backbone:
        """The backbone, in eval mode, on the CPU, without gradients; InputError if misfit."""
        backbone = build_backbone(self.spec)
        state = for_backbone(backbone, self.state)
        load_strictly(backbone, state, f"{self.path} ({self.spec.arch})", HEADS)
        backbone.normalisation = self.normalisation
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
    for prefix in ENCODERS:
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if own:
            logger.warning(f"{path} holds the encoders of MoCo: {prefix[:-1]} is read")
            return own
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


def for_backbone(backbone: Backbone, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's weights by the names of `backbone`: its own, or by those of timm or others.

    timm itself converts the originals' names and resizes position embeddings.
    """
    if not isinstance(backbone, TimmBackbone) or any(k.startswith("model.") for k in state):
        return state
    # Parts of ours keep their names; timm's own head is called `head` too.
    heads = ("head.mlp.", "head.last_layer.", *(f"{part}." for part in PARTS[1:]))
    found = in_timms_names(backbone.model, backbone.name, state)
    return {k if k.startswith(heads) else f"model.{k}": v for k, v in found.items()}


def in_timms_names(model: nn.Module, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as timm's model `name` has them; as they are, where timm cannot convert them."""
    wanted = model.state_dict()
    if all(k in state and state[k].shape == value.shape for k, value in wanted.items()):
        return state
    own = vars(sys.modules[timm.model_entrypoint(name.partition(".")[0]).__module__])
    convert = next((own[converter] for converter in CONVERTERS if converter in own), None)
    known = signature(convert).parameters if convert else {}
    more = {"adapt_layer_scale": True} if "adapt_layer_scale" in known else {}
    # timm's converters print, take things out of what they are given, and raise anything of
    # weights that they do not know.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        return convert(*(dict(state), model)[: len(known)], **more) if convert else state
    return state


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
        listed = "; ".join(f"{what}: {few(names)}" for what, names in faults.items() if names)
        left = faults["left over"]
        foreign = [what for name, what in FOREIGN.items() if any(re.search(name, n) for n in left)]
        if foreign:
            raise InputError(
                f"{source}: the weights are of a network with {', '.join(foreign)}, which only "
                f"those of timm have here (--arch timm/NAME). {listed}."
            )
        raise InputError(
            f"{source}: the weights do not fit the network. {listed}."
            + (f" Check {', '.join(options)}." if options else "")
        )
    taken = {name: state[name] for name in wanted if name in state}
    if broken := [name for name, value in taken.items() if not value.isfinite().all()]:
        raise InputError(
            f"{source}: NaN or infinity stands in {len(broken)} of its {len(taken)} tensors "
            f"({few(broken)}): the run that made it has diverged. Take an earlier checkpoint."
        )
    module.load_state_dict(taken, strict=False)


def load_pretrained(
    network: nn.Module, path: str | Path, key: str, spec: BackboneSpec
) -> list[str]:
    """Start a network from someone's weights; returns the names of the parts that were read.

    Lines say whose they are and what of the file was not read, and the backbone's `normalisation`
    becomes theirs.

    spec: what the backbone is built from. It must fit, also in what shapes do not show. A head,
    region head, bag head, pooling or LCR's branch is read too where the file has one of the same
    shape, and keeps its fresh initialisation otherwise.
    """
    backbone, is_timms = network.backbone, spec.arch.startswith(PREFIX)
    file = WeightsFile.read(path, key, spec if is_timms else None)
    path, state = file.path, for_backbone(backbone, file.state)
    for line in file.lines():
        logger.info(line)
    said, _ = said_of_timm(file.contents, path)
    theirs = f"{PREFIX}{said}" if is_timms and said else file.spec.arch
    if PREFIX in theirs and theirs.partition(".")[0] != spec.arch.partition(".")[0]:
        raise InputError(
            f"{path} holds weights of {theirs}, and MODEL.ARCH is {spec.arch}: give --arch "
            f"{theirs}, or weights of {spec.arch}."
        )
    load_strictly(backbone, state, str(path), HEADS, SHAPING)
    _check_unseen(file, spec)
    backbone.normalisation = file.normalisation
    read = ["backbone"]
    for part in PARTS:
        module = getattr(network, part)
        if module is None:
            continue
        own = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
        wanted = module.state_dict()
        if own.keys() == wanted.keys() and all(own[k].shape == wanted[k].shape for k in wanted):
            load_strictly(module, own, f"{path} ({part})")
            read.append(part)
    wanted = backbone.state_dict().keys()
    left = [name for name in state if name not in wanted and name.split(".")[0] not in read]
    if left := [name for name in left if not re.search(BUFFERS, name)]:
        logger.info(f"{path}: not read: {few(left)}")
    return read


def _check_unseen(file: WeightsFile, spec: BackboneSpec) -> None:
    """Raise InputError where a ViT has other heads; say what else is doubtful or different."""
    theirs, ours = resolve(file.spec), resolve(spec)
    doubts = dict(file.doubts)
    if theirs["family"] == ours["family"] == "vit" and theirs["num_heads"] != ours["num_heads"]:
        heads, wanted = theirs["num_heads"][0], ours["num_heads"][0]
        if not spec.num_heads:
            said = doubts.get("num_heads", f"it has {heads} attention heads")
            raise InputError(
                f"{file.path}: {said}; the network to train has {wanted}: give MODEL.NUM_HEADS "
                f"[{heads}], or MODEL.NUM_HEADS [{wanted}] if you know it better."
            )
        if not doubts.pop("num_heads", None):
            doubts["num_heads"] = f"its {heads} attention heads become {wanted}, by MODEL.NUM_HEADS"
    elif spec.num_heads:
        doubts.pop("num_heads", None)
    elif "num_heads" in doubts:
        doubts["num_heads"] += "; MODEL.NUM_HEADS says otherwise"
    if theirs["family"] == ours["family"] == "swin" and file.spec.img_size != spec.img_size:
        doubts["img_size"] = (
            f"its windows are laid out for {file.spec.img_size} pixels, those of the network to "
            f"train for {spec.img_size} (MODEL.IMG_SIZE): where that shifts other stages, it "
            f"computes another function"
        )
    for doubt in doubts.values():
        logger.warning(f"{file.path}: {doubt}")


@torch.no_grad()
def count_parameters(module: nn.Module) -> int:
    """Number of values in the module's parameters, trained or not."""
    return sum(parameter.numel() for parameter in module.parameters())
