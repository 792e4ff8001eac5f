"""A backbone as others take it: stock timm's names and arguments, EsViT's names, ONNX.

Stock timm is a little less than equal to Swin and ViT here (models/swin.py, models/vit.py);
`timm_caveat` says at which image sizes.
"""

import importlib
import math
from typing import Any

import timm
import torch
from torch import Tensor

from models.backbone import Backbone
from models.pretrained import load_strictly, timm_state
from models.recognition import infer_spec
from models.registry import BackboneSpec, resolve
from models.timm_backbone import TimmBackbone
from utils.errors import InputError

# The ViTs go by DeiT's names: the same network, and timm's configuration of these names has
# ImageNet's mean and standard deviation, where that of its ViTs has 0.5.
TIMM_NAMES = {
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "swin_large": "swin_large_patch4_window7_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "vit_small": "deit_small_patch16_224",
    "vit_base": "deit_base_patch16_224",
    "resnet50": "resnet50",
}
# torch.onnx.export works through both.
ONNX_PACKAGES = ("onnx", "onnxscript")


def to_timm(
    backbone: Backbone, spec: BackboneSpec, size: int
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The weights of `backbone`, built from `spec`, for stock timm; its config.json; a caveat.

    The state loads strictly into `timm.create_model(architecture, num_classes=0, **model_args)`.
    size: pixels of an evaluation. The caveat says at which sizes the model gives the image feature
    [B, D]. Raises InputError where the installed timm builds a network that they do not fit.
    """
    if isinstance(backbone, TimmBackbone):
        name, kwargs = backbone.name.partition(".")[0], backbone.measured.keywords
        state = backbone.model.state_dict()
    else:
        name, kwargs = TIMM_NAMES[spec.arch], timm_arguments(spec)
        state = timm_state(backbone.state_dict())
    model = timm.create_model(name, num_classes=0, **kwargs)
    load_strictly(model, state, f"timm {timm.__version__} ({name})")
    timms, size = model.pretrained_cfg, kwargs.get("img_size", size)
    of_images = {
        "input_size": [3, size, size],
        "mean": list(backbone.normalisation.mean),
        "std": list(backbone.normalisation.std),
        "interpolation": "bicubic",
        "crop_mode": "center",
        "crop_pct": 224 / 256,
    }
    kept = {key: timms[key] for key in ("first_conv", "classifier") if timms.get(key)}
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": backbone.num_features,
        "model_args": kwargs,
        "pretrained_cfg": {**kept, **of_images, "num_classes": 0},
    }
    caveat = "" if isinstance(backbone, TimmBackbone) else timm_caveat(backbone, spec)
    return state, config, caveat


def pooling(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The MIL attention of a network's state, by which patch features [N, D] are pooled.

    tanh, gate, score: weight and bias of each. {} where the state has none.
    """
    return {k.removeprefix("pool."): v for k, v in state.items() if k.startswith("pool.")}


def timm_arguments(spec: BackboneSpec) -> dict:
    """The keyword arguments of `timm.create_model` besides num_classes, as plain data."""
    figures = resolve(spec)
    if figures["family"] == "resnet":
        return {}
    shared = {name: figures[name] for name in ("patch_size", "embed_dim")}
    shared["img_size"] = spec.img_size
    depths, heads = list(figures["depths"]), list(figures["num_heads"])
    if figures["family"] == "vit":
        return {**shared, "depth": depths[0], "num_heads": heads[0], "global_pool": "token"}
    return {**shared, "depths": depths, "num_heads": heads, "window_size": spec.window_size}


def timm_caveat(backbone: Backbone, spec: BackboneSpec) -> str:
    """At which image sizes stock timm gives the features of `backbone`, in plain words."""
    family = resolve(spec)["family"]
    if family == "resnet":
        return "Stock timm gives the source's features at every size."
    if family == "vit":
        return (
            f"Stock timm gives the source's features at {spec.img_size} pixels. At other sizes "
            f"(dynamic_img_size=True) it resizes the position embeddings with antialiasing, the "
            f"source without, and the features differ."
        )
    multiple = unpadded_multiple(backbone)
    own_size = (
        ""
        if spec.img_size % multiple == 0
        else f"This leaves out its own img_size, {spec.img_size}. "
    )
    return (
        f"Stock timm gives the source's features where no shifted window is padded: at sizes "
        f"that are multiples of {multiple} pixels. {own_size}At others it shifts the map before "
        f"it pads it, the source after, and the features differ. For sizes besides img_size "
        f"add strict_img_size=False and leave img_size as it is: windows are laid out for it."
    )


def unpadded_multiple(backbone: Backbone) -> int:
    """Multiples of this many pixels make a Swin's maps fill all windows that are shifted."""
    multiple = backbone.patch_size
    for index, stage in enumerate(backbone.layers):
        for block in stage.blocks:
            if any(block.shift_size):
                cell = backbone.patch_size * 2**index
                multiple = math.lcm(multiple, cell * block.window_size[0])
    return multiple


def esvit_caveat(backbone: Backbone, spec: BackboneSpec) -> str:
    """What names and shapes alone do not say of `backbone`; "" where they say all.

    Raises InputError for a model of timm's, whose weights have no such names.
    """
    if isinstance(backbone, TimmBackbone):
        raise InputError(f"EsViT has no names for the weights of {spec.arch}: take --format timm.")
    wanted = timm_arguments(spec)
    nowhere = "the export/of the weights"  # a folder without a config.json, which would be believed
    found = timm_arguments(infer_spec(backbone.state_dict(), nowhere)[0])
    lost = {name: value for name, value in wanted.items() if found.get(name) != value}
    if not lost:
        return ""
    figures = ", ".join(f"{name} {value}" for name, value in lost.items())
    return f"The shapes do not say {figures}: give them to whatever reads the file."


def require_onnx() -> None:
    """Raise InputError unless the packages that ONNX needs can be imported."""
    for package in ONNX_PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            raise InputError(
                f"--format onnx needs the package {package}, which cannot be imported: "
                f"pip install {' '.join(ONNX_PACKAGES)}."
            ) from None


def to_onnx(backbone: Backbone, size: int) -> "torch.onnx.ONNXProgram":
    """The whole forward as ONNX: images [B, 3, size, size] -> both features, any B.

    The input is called images; the outputs image_feature [B, D] and patch_features [B, N, D].
    Needs what `require_onnx` asks for.
    """
    images = torch.zeros(2, 3, size, size)
    # Shift masks are kept from the first images on; the traced forward then finds them.
    with torch.no_grad():
        backbone(images)
    # strict: only this way does len(images) stay a free number.
    exported = torch.export.export(
        backbone, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True
    )
    return torch.onnx.export(
        exported,
        input_names=["images"],
        output_names=["image_feature", "patch_features"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
