"""Intra-level distillation: L_I between images, L_R between matched regions [esvit].

Pairs (i, v): i an image-level view of the teacher, v any view of the student, v != i. Every
term is the mean over the pairs and the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.cross_entropy import soft_cross_entropy
from losses.targets import image_targets, region_targets
from utils.views import Views, in_full_precision


def pair_weights(teacher_views: int, student_views: int, like: Tensor) -> Tensor:
    """[V, I]: 1 / number of pairs where v != i, else 0."""
    weights = torch.ones(student_views, teacher_views, device=like.device, dtype=like.dtype)
    weights.fill_diagonal_(0)
    return weights / weights.sum()


def image_loss(
    student: Views,
    teacher: Views,
    centre: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk_mib: int = 0,
) -> tuple[Tensor, Tensor]:
    """L_I = mean over pairs of CE(q^I_i, p^I_v); DINO's loss.

    Returns the loss (scalar) and the entropy of each q^I [I * B], crop-major, in nats, without
    gradient.
    """
    pairs = pair_weights(teacher.count, student.count, student.image_embeddings) / student.batch
    return soft_cross_entropy(
        student.image_embeddings,
        student.image_prototypes,
        student_temp,
        image_targets(teacher, centre, teacher_temp),
        teacher_rows(teacher, student.count).flatten(0, 1),
        pairs.repeat_interleave(student.batch, dim=0),
        chunk_mib,
    )


def teacher_rows(teacher: Views, student_views: int) -> Tensor:
    """[V, B, I]: for each student view of each image, the image's row in each teacher view."""
    rows = torch.arange(teacher.count * teacher.batch, device=teacher.image_embeddings.device)
    return rows.view(teacher.count, teacher.batch).T.expand(student_views, -1, -1)


def region_loss(
    student: Views,
    teacher: Views,
    centre: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk_mib: int = 0,
) -> Tensor:
    """L_R = mean over pairs of mean_n CE(q_{i,m*(n)}, p_{v,n}); EsViT's region loss.

    m*(n) is the teacher patch of view i of the same image that is most similar, in backbone
    features, to student patch n.
    """
    (teacher_patches,) = teacher.patch_embeddings
    pairs = pair_weights(teacher.count, student.count, student.image_embeddings) / student.batch
    own_rows = teacher_rows(teacher, student.count)
    matches, weights = [], []
    first = 0
    for group, patches in enumerate(student.patch_embeddings):
        views = len(patches) // student.batch
        these = slice(first, first + views)
        best = match_patches(student.patch_features[group], teacher)  # [V_g * B, N, I]
        # Patch m of the teacher's row t stands in row t * N + m of its patches.
        start = own_rows[these].flatten(0, 1)[:, None] * teacher_patches.shape[1]
        matches.append((start + best).flatten(0, 1))
        share = patches.new_full(patches.shape[:2], 1 / patches.shape[1])
        pair = pairs[these].repeat_interleave(student.batch, dim=0)  # [V_g * B, I]
        weights.append((share[..., None] * pair[:, None]).flatten(0, 1))
        first += views
    loss, _ = soft_cross_entropy(
        torch.cat([patches.flatten(0, 1) for patches in student.patch_embeddings]),
        student.region_prototypes,
        student_temp,
        region_targets(teacher, centre, teacher_temp),
        torch.cat(matches),
        torch.cat(weights),
        chunk_mib,
        entropies=False,
    )
    return loss


@torch.no_grad()
@in_full_precision
def match_patches(student_features: Tensor, teacher: Views) -> Tensor:
    """m*(n): for each patch of student views [V * B, N, D], its best patch in each teacher view.

    [V * B, N, I], int64. Highest cosine of backbone features; the first of equals.
    """
    (features,) = teacher.patch_features
    # Images first, and one product for each: [B, V * N, D] and [B, I * M, D].
    views, batch = len(student_features) // teacher.batch, teacher.batch
    queries = F.normalize(student_features.float(), dim=-1).unflatten(0, (views, batch))
    patches = F.normalize(features.float(), dim=-1).unflatten(0, (teacher.count, batch))
    cosines = queries.transpose(0, 1).flatten(1, 2) @ patches.transpose(0, 1).flatten(1, 2).mT
    best = cosines.unflatten(2, (teacher.count, -1)).argmax(dim=-1)  # [B, V * N, I]
    return best.unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 1)
