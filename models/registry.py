"""Architectures by name. A new backbone is one file beside this one and one entry here."""

import difflib
from dataclasses import asdict, dataclass

import timm

from models.backbone import Backbone
from models.resnet import ResNet
from models.swin import Swin
from models.timm_backbone import PREFIX, TimmBackbone, measured, timm_name
from models.vit import ViT
from utils.errors import InputError


@dataclass(frozen=True)
class BackboneSpec:
    """All that decides a backbone's parameters; stored in every checkpoint.

    arch: a name in ARCHITECTURES, or timm/ and a name of timm's, which leaves it all to timm but
    img_size. embed_dim, depths, num_heads: 0 or () for the architecture's own (a ViT has one depth
    and one number of heads; a Swin one a stage).
    window_size: Swin's window, patches. patch_size: pixels, 0 for the architecture's own.
    img_size: pixels for which windows and position embeddings are laid out.
    """

    arch: str
    embed_dim: int = 0
    depths: tuple[int, ...] = ()
    num_heads: tuple[int, ...] = ()
    window_size: int = 7
    patch_size: int = 0
    img_size: int = 224

    def to_dict(self) -> dict:
        """Plain data for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "BackboneSpec":
        """The inverse of `to_dict`."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


SHAPE = ("embed_dim", "depths", "num_heads", "patch_size")


def _shaped(family: str, *shape: int | tuple[int, ...]) -> dict:
    return {"family": family, **dict(zip(SHAPE, shape, strict=True))}


ARCHITECTURES = {
    "swin_tiny": _shaped("swin", 96, (2, 2, 6, 2), (3, 6, 12, 24), 4),
    "swin_small": _shaped("swin", 96, (2, 2, 18, 2), (3, 6, 12, 24), 4),
    "swin_base": _shaped("swin", 128, (2, 2, 18, 2), (4, 8, 16, 32), 4),
    "swin_large": _shaped("swin", 192, (2, 2, 18, 2), (6, 12, 24, 48), 4),
    "deit_tiny": _shaped("vit", 192, (12,), (3,), 16),
    "deit_small": _shaped("vit", 384, (12,), (6,), 16),
    "vit_small": _shaped("vit", 384, (12,), (6,), 16),
    "vit_base": _shaped("vit", 768, (12,), (12,), 16),
    "resnet50": {"family": "resnet"},
}


def resolve(spec: BackboneSpec) -> dict:
    """The architecture's figures with the spec's own put in; InputError where they cannot be."""
    if spec.arch.startswith(PREFIX):
        figures = {"family": "timm", "name": timm_name(spec.arch).partition(".")[0]}
    elif spec.arch not in ARCHITECTURES:
        near = difflib.get_close_matches(spec.arch, ARCHITECTURES, n=1)
        near = [PREFIX + spec.arch] if timm.is_model(spec.arch) else near
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(
            f"MODEL.ARCH: there is no architecture '{spec.arch}'.{hint} "
            f"Known: {', '.join(ARCHITECTURES)}, and those of timm as {PREFIX}NAME."
        )
    else:
        figures = dict(ARCHITECTURES[spec.arch])
    own = {name: getattr(spec, name) for name in SHAPE if getattr(spec, name)}
    if figures["family"] in ("resnet", "timm"):
        if own:
            options = ", ".join(f"MODEL.{name.upper()}" for name in own)
            raise InputError(f"{options}: {spec.arch} has nothing of the kind; leave them out.")
        if figures["family"] == "timm":
            measured(timm_name(spec.arch), spec.img_size)
        return figures
    figures.update(own)
    depths, heads = figures["depths"], figures["num_heads"]
    if not all(isinstance(value, int) for value in (*depths, *heads)):
        raise InputError("MODEL.DEPTHS and MODEL.NUM_HEADS must be whole numbers.")
    if len(depths) != len(heads) or min(depths) < 1 or min(heads) < 1:
        raise InputError(
            f"MODEL.DEPTHS {list(depths)} and MODEL.NUM_HEADS {list(heads)} must be equally "
            f"long, positive lists."
        )
    if figures["family"] == "vit" and len(depths) != 1:
        raise InputError(f"MODEL.DEPTHS: {spec.arch} has one stage; give one depth.")
    for stage, head in enumerate(heads):
        width = figures["embed_dim"] * 2**stage
        if width % head:
            raise InputError(
                f"MODEL.NUM_HEADS: {head} heads do not divide the width {width} of stage {stage}."
            )
    if spec.img_size % figures["patch_size"]:
        raise InputError(
            f"MODEL.IMG_SIZE {spec.img_size} is not a multiple of the patch size "
            f"{figures['patch_size']}."
        )
    if figures["family"] == "swin" and spec.window_size < 1:
        raise InputError(f"MODEL.WINDOW_SIZE must be positive, not {spec.window_size}.")
    return figures


def identity(spec: BackboneSpec) -> dict:
    """All that tells two backbones apart, defaults filled in: equal where the networks are."""
    figures = resolve(spec)
    is_laid_out = figures["family"] != "resnet"
    if figures["family"] == "timm":
        is_laid_out = "img_size" in measured(timm_name(spec.arch), spec.img_size).keywords
    if is_laid_out:
        figures["img_size"] = spec.img_size
    if figures["family"] == "swin":
        figures["window_size"] = spec.window_size
    return figures


def build_backbone(spec: BackboneSpec, drop_path: float = 0.0) -> Backbone:
    """A freshly initialised backbone. drop_path: stochastic depth of the last block.

    Raises InputError for an unknown architecture or figures that do not fit together.
    """
    figures = resolve(spec)
    family = figures["family"]
    if family == "timm":
        return TimmBackbone(timm_name(spec.arch), spec.img_size, drop_path)
    if family == "swin":
        return Swin(
            figures["embed_dim"],
            figures["depths"],
            figures["num_heads"],
            window_size=spec.window_size,
            patch_size=figures["patch_size"],
            img_size=spec.img_size,
            drop_path=drop_path,
        )
    if family == "vit":
        return ViT(
            figures["embed_dim"],
            figures["depths"][0],
            figures["num_heads"][0],
            patch_size=figures["patch_size"],
            img_size=spec.img_size,
            drop_path=drop_path,
        )
    return ResNet()
