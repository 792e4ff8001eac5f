"""Intra-level distillation: L_I between images, L_R between matched regions [esvit].

Pairs (i, v): i an image-level view of the teacher, v any view of the student, v != i. Every
term is the mean over the pairs and the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.cross_entropy import soft_cross_entropy
from losses.targets import image_targets, region_targets
from utils.views import Views, image_major, in_full_precision


def pair_weights(teacher_views: int, student_views: int, like: Tensor) -> Tensor:
    """[V, I]: 1 / number of pairs where v != i, else 0."""
    weights = torch.ones(student_views, teacher_views, device=like.device, dtype=like.dtype)
    weights.fill_diagonal_(0)
    return weights / weights.sum()


def image_loss(
    student: Views, teacher: Views, centre: Tensor, student_temp: float, teacher_temp: float
) -> tuple[Tensor, Tensor]:
    """L_I = mean over pairs of CE(q^I_i, p^I_v); DINO's loss.

    Returns the loss (scalar) and the entropy of each q^I [B, I] in nats, without gradient.
    """
    weights = pair_weights(teacher.count, student.count, student.image_embeddings)
    return soft_cross_entropy(
        image_major(student.image_embeddings, student.batch),
        student.image_prototypes,
        student_temp,
        image_targets(teacher, centre, teacher_temp),
        (weights / student.batch).expand(student.batch, -1, -1),
    )


def region_loss(
    student: Views,
    teacher: Views,
    centre: Tensor,
    student_temp: float,
    teacher_temp: float,
    attention_mix: bool = False,
) -> Tensor:
    """L_R = mean over pairs of mean_n CE(q_{i,m*(n)}, p_{v,n}); EsViT's region loss.

    m*(n) is the teacher patch of view i of the same image that is most similar, in backbone
    features, to student patch n. attention_mix: patch n of a view counts ½/N + ½ a_n instead
    of 1/N, with the student's attention fixed (CMD.REGION_WEIGHT = mix, ours).
    """
    pairs = pair_weights(teacher.count, student.count, student.image_embeddings)
    embeddings, features, weights = [], [], []
    first = 0
    for group, patches in enumerate(student.patch_embeddings):
        views, count = len(patches) // student.batch, patches.shape[1]
        embeddings.append(image_major(patches, student.batch).flatten(1, 2))
        features.append(image_major(student.patch_features[group], student.batch).flatten(1, 2))
        share = patches.new_full((len(patches), count), 1 / count)
        if attention_mix:
            share = (share + student.log_attention[group].detach().exp()) / 2
        share = image_major(share, student.batch)  # [B, views, N]
        pair = pairs[first : first + views]
        weights.append((share[..., None] * pair[:, None]).flatten(1, 2))
        first += views
    rows = torch.cat(embeddings, dim=1)
    matches = match_patches(torch.cat(features, dim=1), teacher)
    loss, _ = soft_cross_entropy(
        rows,
        student.region_prototypes,
        student_temp,
        region_targets(teacher, centre, teacher_temp),
        _assignment(matches, torch.cat(weights, dim=1) / student.batch, teacher),
    )
    return loss


@torch.no_grad()
@in_full_precision
def match_patches(student_features: Tensor, teacher: Views) -> Tensor:
    """m*(n): for each student patch [B, S, D], its best patch in each teacher view: [B, S, I].

    Highest cosine of backbone features; the first of equals.
    """
    (features,) = teacher.patch_features
    patches = F.normalize(image_major(features, teacher.batch).float(), dim=-1)  # [B, I, N, D]
    queries = F.normalize(student_features.float(), dim=-1)
    return torch.einsum("bsd,bind->bsin", queries, patches).argmax(dim=-1)


def _assignment(matches: Tensor, weights: Tensor, teacher: Views) -> Tensor:
    """Matches [B, S, I] with weights [B, S, I] -> A [B, S, I * N], one entry a match."""
    (patches,) = teacher.patch_embeddings
    count = patches.shape[1]
    table = weights.new_zeros(*matches.shape, count)
    table.scatter_(-1, matches[..., None], weights[..., None])
    return table.flatten(2)
