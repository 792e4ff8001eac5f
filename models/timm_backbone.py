"""Any model of timm that has a map of patches, as a backbone.

What timm does not say of a model is measured on a copy of it without storage (torch's meta
device): which images it takes, the map's place among its tokens, the widths of its features, and
which parameters no image feature depends on.
"""

import bisect
import difflib
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models._manipulate import group_modules
from torch import Tensor, nn

from models.backbone import Backbone, check_depth
from utils.errors import InputError
from utils.logging import logger

PREFIX = "timm/"
# What the sides of images may have to be multiples of, besides the size that a model is built for.
MULTIPLES = (1, 2, 4, 7, 8, 14, 16, 28, 32, 64)
# More than any model's stride: an image larger by so many pixels has another map.
LARGER = 65
# Ways of asking a model for images of any size, the freest first; most models know none of them.
SIZED = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
# What a model may take when it is asked for the outputs of its blocks, the most first.
ASKED = ({"norm": True, "return_prefix_tokens": True}, {"norm": True}, {})


class NoMapError(Exception):
    """What comes out of a model is no map of patches."""


@dataclass(frozen=True)
class Shapes:
    """What comes out of a model for images of one size.

    grid: rows and columns of the map. prefix: tokens before the map's. features, patches: widths of
    the image feature and of the map's cells. convolves: whether it comes as [B, C, rows, columns],
    as from convolutions.
    """

    grid: tuple[int, int]
    prefix: int
    features: int
    patches: int
    convolves: bool


@dataclass(frozen=True)
class Measured:
    """What is known of a model of timm before it has weights.

    keywords: of timm.create_model. model: without storage, in eval mode. shapes: at the size it is
    built for. multiple: pixels that sides must be multiples of; 0 where it takes one size alone.
    depth: blocks, or stages, whose outputs it gives when asked with the keywords `asked`. unused:
    names of parameters that the image feature does not depend on.
    """

    keywords: dict
    model: nn.Module
    shapes: Shapes
    multiple: int
    depth: int
    asked: dict
    unused: frozenset[str]


def timm_name(arch: str) -> str:
    """timm's name in `arch`; InputError where the installed timm has no such model or weights."""
    name = arch.removeprefix(PREFIX)
    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f"; the nearest: {', '.join(PREFIX + other for other in near)}" if near else ""
        raise InputError(
            f"MODEL.ARCH: timm {timm.__version__} has no model '{model}'{hint} (a newer timm may "
            f"have it)."
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{model}.*")]
    if tag and tag not in tags:
        raise InputError(
            f"MODEL.ARCH: timm {timm.__version__} has no weights '{tag}' of {model}; it has: "
            f"{', '.join(filter(None, tags)) or 'none'}."
        )
    return name


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # it is kept beyond the call
def measured(name: str, img_size: int) -> Measured:
    """What is to be known of timm's model `name`, built for square images of `img_size` pixels.

    Raises InputError for a model without a map of patches, and for a size that it cannot have.
    """
    for keywords in (*({"img_size": img_size, **more} for more in SIZED), {}):
        try:
            model = _without_storage(name, keywords)
        except Exception as error:  # whatever an unknown keyword makes timm do
            reason = error
        else:
            break
    else:
        raise InputError(
            f"MODEL.ARCH {PREFIX}{name}: timm {timm.__version__} cannot build it: {reason}."
        )
    try:
        try:
            shapes = _shapes(model, img_size, img_size)
        except NoMapError:
            raise
        except Exception:  # each model has its own
            size = model.pretrained_cfg["input_size"][-1]
            model = _without_storage(name, {**keywords, "img_size": size} if keywords else {})
            _shapes(model, size, size)
            takes = _sizes(model, _multiple(model, size), size)
            raise InputError(f"MODEL.IMG_SIZE {img_size}: {PREFIX}{name} takes {takes}.") from None
    except NoMapError as error:
        raise InputError(
            f"MODEL.ARCH {PREFIX}{name}: {error}, and a backbone needs one: take another model."
        ) from None
    multiple, unused = _multiple(model, img_size), _unused(model, img_size)
    return Measured(keywords, model, shapes, multiple, *_outputs(model, img_size), unused)


def _without_storage(name: str, keywords: dict) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return timm.create_model(name, pretrained=False, num_classes=0, **keywords).eval()


def _images(height: int, width: int) -> Tensor:
    """Two, without storage: BatchNorm wants more than one."""
    return torch.empty(2, 3, height, width, device="meta")


@torch.no_grad()
def _shapes(model: nn.Module, height: int, width: int) -> Shapes:
    """Raises NoMapError, and anything for a size that the model cannot take."""
    with torch.device("meta"):
        images, prefix = _images(height, width), 0
        features = cells = model.forward_features(images)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise NoMapError("it gives no single map of patches")
        if features.ndim == 4:
            cells = _channels_last(model, features)
            rows, columns = cells.shape[1:3]
        elif hasattr(model, "forward_intermediates"):
            last = model.forward_intermediates(images, indices=1, intermediates_only=True)[-1]
            rows, columns = last.shape[-2:]
            prefix = features.shape[1] - rows * columns
        else:
            raise NoMapError("timm does not say which of its tokens are a map of patches")
        pooled = model.forward_head(features, pre_logits=True)
    if prefix < 0 or pooled.ndim != 2:
        raise NoMapError("it gives no single map of patches")
    convolves = features.ndim == 4 and cells is not features
    return Shapes((rows, columns), prefix, pooled.shape[1], cells.shape[-1], convolves)


def _channels_last(model: nn.Module, features: Tensor) -> Tensor:
    """A model's map as [B, rows, columns, P]."""
    is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return features if is_last else features.permute(0, 2, 3, 1)


def _multiple(model: nn.Module, size: int) -> int:
    """Pixels that sides must be multiples of, by images larger than `size`; 0: no other size."""
    for step in (*MULTIPLES, size):
        times = -(-LARGER // step)
        times += 1 - times % 2  # odd, or they would be multiples of twice the step
        try:
            for larger in (size + step * times, size + step * (times + 2)):
                _shapes(model, larger, larger)
        except Exception:  # each model has its own
            continue
        return step
    return 0


def _sizes(model: nn.Module, multiple: int, size: int) -> str:
    """In words, which images a model takes; of `size` pixels it does."""
    if not multiple:
        return f"images of {size} pixels alone"

    def takes(times: int) -> bool:
        try:
            return bool(times and _shapes(model, times * multiple, times * multiple))
        except Exception:  # each model has its own
            return False

    least = multiple * bisect.bisect_left(range(size // multiple), True, key=takes)
    if multiple == 1:
        return f"images of {least} pixels and more"
    return f"multiples of {multiple} pixels" + f", from {least}" * (least > multiple)


@torch.no_grad()
def _outputs(model: nn.Module, size: int) -> tuple[int, dict]:
    """`depth` and `asked` of Measured."""
    for asked in ASKED:
        try:
            with torch.device("meta"):
                outputs = model.forward_intermediates(
                    _images(size, size), intermediates_only=True, **asked
                )
        except Exception:  # a keyword that it does not know, or refuses
            continue
        return len(outputs), asked
    return 1, {}


@torch.enable_grad()
def _unused(model: nn.Module, size: int) -> frozenset[str]:
    """Names of the parameters without a gradient; in training, for some keep what they computed.

    The patches are cut out of what the image feature is made of, so no parameter is theirs alone.
    """
    model.train()
    with torch.device("meta"):
        features = model.forward_features(_images(size, size))
        model.forward_head(features, pre_logits=True).sum().backward()
    names = frozenset(name for name, p in model.named_parameters() if p.grad is None)
    model.zero_grad()
    model.eval()
    return names


@lru_cache(maxsize=256)
def _grid(name: str, img_size: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of the map of an image; None where the model cannot take it."""
    try:
        return _shapes(measured(name, img_size).model, height, width).grid
    except Exception:  # each model has its own
        return None


def _largest_modules(groups: dict[int, list[str]]) -> list[str]:
    """For each group of parameters' names, the module that holds most of it and of no other; ""
    where there is none."""
    holders: dict[str, list[int]] = {}
    for group, names in groups.items():
        for name in names:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                holders.setdefault(".".join(parts[:end]), []).append(group)
    found = []
    for group in groups:
        own = [name for name, of in holders.items() if set(of) == {group}]
        found.append(max(own, key=lambda name: (len(holders[name]), -len(name)), default=""))
    return found


class TimmBackbone(Backbone):
    """timm's model `name` without its classifier; its weights keep their names, under `model.`.

    The image feature is what timm's own head would read, before a classifier. img_size: pixels that
    position embeddings and windows are laid out for, where the model has any. drop_path: where the
    model has no stochastic depth, a line says so. Parameters that the image feature does not
    depend on are frozen, for DistributedDataParallel wants a gradient of all others. Raises
    InputError as `measured` does.
    """

    def __init__(self, name: str, img_size: int = 224, drop_path: float = 0.0) -> None:
        super().__init__()
        self.name, self.img_size = name, img_size
        known = measured(name, img_size)
        self.num_features, self.prefix = known.shapes.features, known.shapes.prefix
        self.patch_size = known.multiple or img_size
        self.stride = known.model.feature_info[-1]["reduction"]
        rate = {"drop_path_rate": drop_path} if drop_path else {}
        create = partial(timm.create_model, name, pretrained=False, num_classes=0, **known.keywords)
        try:
            self.model = create(**rate)
        except TypeError:
            self.model = create()
        # As ResNet (models/resnet.py): measured on a CPU, a fifth faster for an EfficientNet.
        convolves = known.shapes.convolves
        self.memory_format = torch.channels_last if convolves else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        if drop_path and not any(isinstance(part, DropPath) for part in self.model.modules()):
            logger.warning(f"MODEL.DROP_PATH: {PREFIX}{name} has no stochastic depth: it has none")
        for parameter_name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter_name not in known.unused)

    @property
    def measured(self) -> Measured:
        """Not an attribute: networks are copied and stored."""
        return measured(self.name, self.img_size)

    @property
    def num_patch_features(self) -> int:
        return self.measured.shapes.patches

    @property
    def depth(self) -> int:
        return self.measured.depth

    @cached_property
    @torch.no_grad()
    def mean_of_patches(self) -> bool:
        """Measured on an image of noise."""
        like, training = next(self.parameters()), self.training
        noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        noise = F.interpolate(noise, self.img_size).to(like)
        image, patches = self.eval()(noise)
        self.train(training)
        mean = patches.mean(dim=1)
        return image.shape == mean.shape and torch.allclose(image, mean, rtol=1e-3, atol=1e-4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_features(self._laid_out(images))
        return self._head(features), self._patches(features)

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.memory_format)

    def _head(self, features: Tensor) -> Tensor:
        return self.model.forward_head(features, pre_logits=True)

    def _patches(self, features: Tensor) -> Tensor:
        if features.ndim == 3:
            return features[:, self.prefix :]
        return _channels_last(self.model, features).flatten(1, 2)

    def last_blocks(
        self, images: Tensor, n: int, avgpool_patchtokens: bool = False
    ) -> tuple[Tensor, ...]:
        """The last is the image feature. Of a ViT the others are what timm's head reads of a
        block's normed tokens; of other models, the mean of a stage's map."""
        check_depth(n, self.depth)
        if n == 1:
            image, patches = self(images)
            found = [image]
        else:
            features, outputs = self.model.forward_intermediates(
                self._laid_out(images), indices=n, **self.measured.asked
            )
            patches = self._patches(features)
            found = [self._pooled(output) for output in outputs[:-1]] + [self._head(features)]
        if avgpool_patchtokens:
            found.append(patches.mean(dim=1))
        return tuple(found)

    def _pooled(self, output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """A block's or stage's map [B, C, rows, columns], with its prefix tokens where it has any.

        -> a feature [B, C].
        """
        if "return_prefix_tokens" not in self.measured.asked:
            return output.mean(dim=(2, 3))
        output, prefix = output if isinstance(output, tuple) else (output, None)
        tokens = output.flatten(2).transpose(1, 2)
        return self._head(tokens if prefix is None else torch.cat([prefix, tokens], dim=1))

    def all_blocks(self) -> list[nn.Module]:
        """For each group of parameters that timm makes after the stem's, the largest module that
        holds nothing of another; where timm makes no groups, its stages. None without a number in
        its name or with no more than a norm's parameters."""
        if hasattr(self.model, "group_matcher"):
            names = _largest_modules(group_modules(self.model, self.model.group_matcher()))[1:]
        else:
            names = [stage["module"] for stage in self.model.feature_info]
        numbered = [self.model.get_submodule(name) for name in names if re.search(r"\d", name)]
        return [part for part in numbered if any(p.ndim > 1 for p in part.parameters())]

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        grid = _grid(self.name, self.img_size, height, width)
        if grid is None:
            raise ValueError(f"images of {height}x{width} pixels: {PREFIX}{self.name} takes none")
        return grid

    def misfit(self, size: int) -> str:
        if _grid(self.name, self.img_size, size, size):
            return ""
        takes = _sizes(self.measured.model, self.measured.multiple, self.img_size)
        return f"does not fit: with MODEL.IMG_SIZE {self.img_size}, {takes} go into"
