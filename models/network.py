"""A network: backbone, heads and pooling over a list of crops."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.heads import DINOHead
from models.mil import GatedAttention
from models.rationale import RationaleBranch
from utils.views import Views

STUDENT_ONLY = ("head_bag.", "rationale.")  # parts that the teacher has no average of


@dataclass(frozen=True)
class HeadSpec:
    """Shape of the heads and of the pooling; see DINOHead and GatedAttention.

    projects: MoCo v2's projection in the place of DINO's head, without prototypes.
    """

    out_dim: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    layers: int = 3
    use_bn: bool = False
    norm_last_layer: bool = True
    pool_hidden: int = 128
    projects: bool = False

    def build(self, in_dim: int, prototypes: bool = True) -> DINOHead:
        """A freshly initialised head on features of width `in_dim`."""
        return DINOHead(
            in_dim,
            self.out_dim if prototypes else 0,
            self.hidden_dim,
            self.bottleneck_dim,
            self.layers,
            self.use_bn,
            self.norm_last_layer,
            self.projects,
        )


@dataclass(frozen=True)
class Parts:
    """What a network has beside its backbone, by the names by which a checkpoint says it.

    heads: None for a backbone alone, as files of others hold it: it has features and no
    embeddings, and is not called as a whole. bag_head: on the image feature, by which a student
    meets the teacher's bags of region embeddings; it has the heads' shape and no prototypes.
    rationale: the channels of LCR's branch; 0: none.
    """

    heads: HeadSpec | None = None
    region_head: bool = False
    pooling: bool = False
    rationale: int = 0
    bag_head: bool = False

    @classmethod
    def from_dict(cls, heads: dict | None, **parts: Any) -> "Parts":
        """Of plain data, as dataclasses.asdict gives it."""
        return cls(HeadSpec(**heads) if heads else None, **parts)


class Network(nn.Module):
    """Backbone + image head, and where the objective uses them region head, MIL pooling, bag head
    or LCR's branch, as `parts` says.

    Only what is used may be built: a parameter without gradient breaks DDP.
    State names: backbone.*, head.*, head_dense.* (EsViT's), pool.*, head_bag.*,
    rationale.* (ours).
    """

    def __init__(self, backbone: Backbone, parts: Parts) -> None:
        super().__init__()
        self.backbone, self.parts = backbone, parts
        heads, wide, width = parts.heads, backbone.num_features, backbone.num_patch_features
        self.head = heads.build(wide) if heads else None
        self.head_dense = heads.build(width) if parts.region_head else None
        self.pool = GatedAttention(width, heads.pool_hidden) if parts.pooling else None
        self.embeds_instances = False  # build.networks: where L_S reads them
        self.rationale = RationaleBranch(width, parts.rationale) if parts.rationale else None
        self.head_bag = heads.build(wide, prototypes=False) if parts.bag_head else None

    def forward(self, crops: Sequence[Tensor]) -> Views:
        """Crops (V tensors [B, 3, S_v, S_v], crop-major) -> Views.

        One backbone forward per run of equally sized crops; LCR's branch needs exactly one.
        With a pooling the attention is added; of a student of L_S, patches by the image head.
        """
        sizes = [list(run) for _, run in groupby(crops, key=lambda crop: crop.shape)]
        shared = zip(sizes, self.backbone.shared(len(sizes)), strict=True)
        outputs = [self.backbone(torch.cat(size), *arguments) for size, arguments in shared]
        image_features, patch_features = map(list, zip(*outputs, strict=True))
        features = torch.cat(image_features)
        if self.rationale is not None and torch.is_grad_enabled():
            features.requires_grad_()  # GradCAM reads its gradient, also of a frozen backbone
        views = Views(
            batch=len(crops[0]),
            image_features=features,
            image_embeddings=self.head(features),
            image_prototypes=self.head.prototypes(),
            patch_features=patch_features,
        )
        if self.head_dense is not None:
            views.patch_embeddings = _embed_patches(self.head_dense, patch_features)
            views.region_prototypes = self.head_dense.prototypes()
        if self.head_bag is not None:
            views.bag_embeddings = self.head_bag(features)
        if self.pool is not None:
            views.log_attention = [self.pool(patches) for patches in patch_features]
        if self.embeds_instances:
            views.instance_embeddings = _embed_patches(self.head, patch_features)
        if self.rationale is not None:
            (patches,) = patch_features
            views.predicted_map = self.rationale(patches)
        return views


def _embed_patches(head: DINOHead, patch_features: list[Tensor]) -> list[Tensor]:
    """A head over all patches of all crops at once, as EsViT calls it.

    One call is one larger product, and one set of statistics where the head has a BatchNorm.
    """
    rows = [patches.flatten(0, 1) for patches in patch_features]
    embedded = head(torch.cat(rows)).split([len(part) for part in rows])
    return [
        part.unflatten(0, patches.shape[:2])
        for part, patches in zip(embedded, patch_features, strict=True)
    ]


def make_teacher(student: Network, teacher: Network) -> Network:
    """Give `teacher` the student's weights and take it out of the gradient; returns it."""
    load_shared(teacher, student.state_dict())
    teacher.requires_grad_(False)
    return teacher


def load_shared(teacher: Network, state: dict[str, Tensor]) -> None:
    """Load a state of the student's form into a teacher, which lacks the STUDENT_ONLY parts."""
    teacher.load_state_dict({k: v for k, v in state.items() if not k.startswith(STUDENT_ONLY)})


def student_only(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a student's state that the teacher lacks."""
    return {k: v for k, v in state.items() if k.startswith(STUDENT_ONLY)}
