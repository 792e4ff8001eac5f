"""Inter-level distillation, between a network's region bags and its images: L_S and L_T."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.cross_entropy import Targets, soft_cross_entropy
from losses.intra import pair_weights
from losses.targets import image_targets
from utils import distributed
from utils.views import Views, image_major, in_full_precision

DIVERSE_TEMPERATURE = 0.02
RESIDUAL_TEMPERATURE = 0.1
CONTRAST_TEMPERATURE = 0.1
# Elements of one similarity matrix of diverse density: 2^25 float32 are 128 MiB.
CHUNK_ELEMENTS = 2**25


def student_loss(
    student: Views, teacher_views: int, student_temp: float, train_bag: bool = False
) -> Tensor:
    """L_S = KL(p^B_v || p^I_v), the bag of regions teaches its image.

    Averaged over the same pairs as the intra-level terms, so a local crop counts twice and a
    global one once. The bag is fixed (ours; through both sides the attention learns to avoid
    what decides the class) unless train_bag (CMD.LS_GRAD = both).
    """
    pairs = pair_weights(teacher_views, student.count, student.image_embeddings)
    weights = pairs.sum(dim=1).repeat_interleave(student.batch) / student.batch  # [V * B]
    if train_bag:
        log_p = _log_softmax(student.image_embeddings, student.image_prototypes, student_temp)
        log_bag = _log_softmax(student.bag_embeddings, student.region_prototypes, student_temp)
        return (weights * kl_divergence(log_bag, log_p)).sum()
    cross_entropy, entropy = soft_cross_entropy(
        student.image_embeddings,
        student.image_prototypes,
        student_temp,
        Targets(student.bag_embeddings, student.region_prototypes, student_temp),
        torch.arange(len(weights), device=weights.device)[:, None],
        weights[:, None],
    )
    return cross_entropy - (weights * entropy).sum()


@in_full_precision
def _log_softmax(embeddings: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(embeddings @ prototypes.T / temperature, dim=-1)


def kl_divergence(log_target: Tensor, log_input: Tensor) -> Tensor:
    """KL(target || input) over the last dimension, in nats, with gradient to both."""
    return (log_target.exp() * (log_target - log_input)).sum(-1)


@in_full_precision
def diverse_density(teacher: Views, k: int, residual: bool = False) -> Tensor:
    """L_T, diverse: attend to patches that recur in some other images and not in all (ours).

    After diverse density (Maron & Lozano-Pérez 1998), without labels. For patch n of view i
    of image b, and every bag (j, b') of another image, both views and all processes:
        s(j, b') = max_m cos(u_{i,b,n}, u_{j,b',m})
        r_n = mean of the k largest s - mean of all s
        L_T = KL( softmax_n(r_n / 0.02) || a_{i,b} ), mean over i and b.
    The target has no gradient; the attention's reaches the pooling alone. 0 where the batch
    has a single image: there is no other bag.

    residual: the same of what a patch has beyond its image (ours). u - the mean of the bag's u,
    in units of its root mean square over the bag, takes the place of u, and the inner product
    that of the cosine; temperature 0.1. What all patches of an image share, such as the hue of its
    background, then recurs nowhere, and a patch that is like its image weighs little.
    """
    (log_attention,) = teacher.log_attention
    target = diverse_targets(teacher, k, residual)
    if target is None:
        return 0 * log_attention.sum()
    return (target.exp() * (target - log_attention)).sum(-1).mean()


@torch.no_grad()
@in_full_precision
def diverse_targets(teacher: Views, k: int, residual: bool = False) -> Tensor | None:
    """log t [I * B, N], crop-major; None where no other image is at hand."""
    (patches,) = teacher.patch_embeddings
    patches = F.normalize(_float(patches), dim=-1)
    if residual:
        patches = _residuals(patches)
    temperature = RESIDUAL_TEMPERATURE if residual else DIVERSE_TEMPERATURE
    own = image_major(patches, teacher.batch)  # [B, I, N, d]
    everyone = distributed.gather(own)  # [B', I, N, d]
    total, views, count, _ = everyone.shape
    if total < 2:
        return None
    bags, others = everyone.flatten(0, 1), (total - 1) * views  # [B' * I, N, d]
    first_own = distributed.position() * teacher.batch
    # In chunks of images, and where one image is too much, of bags.
    per_bag = views * count * count
    images_at_once = max(1, CHUNK_ELEMENTS // (per_bag * len(bags)))
    bags_at_once = max(1, CHUNK_ELEMENTS // (per_bag * images_at_once))
    recurrence = []
    for first in range(0, teacher.batch, images_at_once):
        queries = own[first : first + images_at_once].flatten(1, 2)  # [b, I * N, d]
        similarity = torch.cat(
            [
                torch.einsum("bqd,gnd->bqgn", queries, chunk).amax(-1)
                for chunk in bags.split(bags_at_once)
            ],
            dim=-1,
        )  # [b, I * N, B' * I]
        image = first_own + first + torch.arange(len(queries), device=bags.device)
        itself = image[:, None] * views + torch.arange(views, device=bags.device)  # [b, I]
        itself = itself[:, None].expand(-1, views * count, -1)
        top = similarity.scatter(-1, itself, -torch.inf).topk(min(k, others)).values.mean(-1)
        recurrence.append(top - similarity.scatter(-1, itself, 0).sum(-1) / others)
    recurrence = torch.cat(recurrence).unflatten(1, (views, count))
    recurrence = recurrence.transpose(0, 1).flatten(0, 1)
    return F.log_softmax(recurrence / temperature, dim=-1)


def _residuals(patches: Tensor) -> Tensor:
    """Patches [R, N, d] less their bag's mean, of mean square 1 over the bag, or all 0."""
    residuals = patches - patches.mean(dim=1, keepdim=True)
    square = residuals.square().sum(-1).mean(dim=1)[:, None, None]
    return residuals * square.clamp_min(1e-12).rsqrt()


@in_full_precision
def contrast(teacher: Views) -> Tensor:
    """L_T, contrast: the bag of one view must recognise its image as the bag of the other (ours).

    -log( exp(e_{i,b}.sg[e_{j,b}]/0.1) / sum over (j',b') != (i,b) of exp(e_{i,b}.sg[..]/0.1) ),
    candidates from all processes, mean over i and b. Wants two image-level views.
    """
    bags = image_major(teacher.bag_embeddings, teacher.batch)  # [B, 2, d]
    everyone = distributed.gather(bags)
    first = distributed.position() * teacher.batch
    rows = torch.arange(teacher.batch, device=bags.device)
    terms = []
    for view in range(2):
        logits = torch.einsum("bd,cjd->bcj", bags[:, view], everyone) / CONTRAST_TEMPERATURE
        itself = torch.zeros_like(logits, dtype=torch.bool)
        itself[rows, first + rows, view] = True
        logits = logits.masked_fill(itself, -torch.inf).flatten(1)
        other = 2 * (first + rows) + (1 - view)
        terms.append(F.cross_entropy(logits, other))
    return torch.stack(terms).mean()


@in_full_precision
def cross_view(
    teacher: Views,
    centre: Tensor,
    bag_centre: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """L_T, cross: KL( q^I_j || softmax((z^B_i - c_B) / tau_s) ), j the other view (ours)."""
    log_q = image_targets(teacher, centre, teacher_temp).log_probabilities().detach()
    log_bag = _bag_log_probabilities(teacher, bag_centre, student_temp)
    # Crop-major rows: the other of the two views is half of them away.
    return kl_divergence(log_q.roll(teacher.batch, dims=0), log_bag).mean()


@in_full_precision
def same_view(teacher: Views, centre: Tensor, bag_centre: Tensor, teacher_temp: float) -> Tensor:
    """L_T, same: KL( softmax((z^B_i - c_B) / tau_t) || q^I_i ); nearest to the released line."""
    log_q = image_targets(teacher, centre, teacher_temp).log_probabilities().detach()
    log_bag = _bag_log_probabilities(teacher, bag_centre, teacher_temp)
    return kl_divergence(log_bag, log_q).mean()


def _bag_log_probabilities(teacher: Views, bag_centre: Tensor, temperature: float) -> Tensor:
    """[I * B, K], with gradient to the bags and so to the pooling."""
    logits = teacher.bag_embeddings @ teacher.region_prototypes.detach().T
    return F.log_softmax((logits - bag_centre) / temperature, dim=-1)


def _float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
