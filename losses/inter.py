"""Inter-level distillation, between a network's region bags and its images: L_S and L_T."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.cross_entropy import Targets, fast_products, soft_cross_entropy
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
    student: Views,
    teacher_views: int,
    student_temp: float,
    train_bag: bool = False,
    chunk_mib: int = 0,
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
        chunk_mib,
    )
    return cross_entropy - (weights * entropy).sum()


@in_full_precision
def _log_softmax(embeddings: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(embeddings @ prototypes.T / temperature, dim=-1)


def kl_divergence(log_target: Tensor, log_input: Tensor) -> Tensor:
    """KL(target || input) over the last dimension, in nats, with gradient to both."""
    return (log_target.exp() * (log_target - log_input)).sum(-1)


def draw_candidates(teacher: Views, count: int, seed: int) -> Tensor | None:
    """Places [count] of images among those of all processes, by rank; None (all) of no more.

    int64, on the teacher's device, without repeats. seed: the same on all processes.
    """
    images = distributed.size() * teacher.batch
    if images <= count:
        return None
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return order[:count].to(teacher.image_embeddings.device, non_blocking=True)


def diverse_density(
    teacher: Views, k: int, residual: bool = False, candidates: Tensor | None = None
) -> Tensor:
    """L_T, diverse: attend to patches that recur in some other images and not in all (ours).

    After diverse density (Maron & Lozano-Pérez 1998), without labels. For patch n of view i
    of image b, and every bag (j, b') of another image among the candidates, both views:
        s(j, b') = max_m cos(u_{i,b,n}, u_{j,b',m})
        r_n = mean of the k largest s - mean of all s
        L_T = KL( softmax_n(r_n / 0.02) || a_{i,b} ), mean over i and b.
    The target has no gradient; the attention's reaches the pooling alone. 0 where the batch
    has a single image: there is no other bag.

    candidates: as draw_candidates gives them; None: the images of all processes. Every image
    meets as many others: one that is not among C candidates leaves the last of them out. So
    neither the cost nor what k of (C - 1) I bags means depends on the number of processes.

    residual: the same of what a patch has beyond its image (ours). u - the mean of the bag's u,
    in units of its root mean square over the bag, takes the place of u, and the inner product
    that of the cosine; temperature 0.1. What all patches of an image share, such as the hue of its
    background, then recurs nowhere, and a patch that is like its image weighs little.
    """
    (log_attention,) = teacher.log_attention
    target = diverse_targets(teacher, k, residual, candidates)
    if target is None:
        return 0 * log_attention.sum()
    return (target.exp() * (target - log_attention)).sum(-1).mean()


@torch.no_grad()
def diverse_targets(
    teacher: Views, k: int, residual: bool = False, candidates: Tensor | None = None
) -> Tensor | None:
    """log t [I * B, N], crop-major; None where no other image is at hand."""
    (patches,) = teacher.patch_embeddings
    patches = F.normalize(_float(patches), dim=-1)
    if residual:
        patches = _residuals(patches)
    own = image_major(patches, teacher.batch)  # [B, I, N, d]
    first = distributed.position() * teacher.batch
    itself = torch.arange(first, first + teacher.batch, device=own.device)
    if candidates is None:
        met = distributed.gather(own)  # [C, I, N, d]
    else:
        met = distributed.pick(own, candidates)
        same = itself[:, None] == candidates
        same[:, -1] = True
        itself = same.int().argmax(1)  # the first of equals
    if len(met) < 2:
        return None
    temperature = RESIDUAL_TEMPERATURE if residual else DIVERSE_TEMPERATURE
    with fast_products(own.device.type, temperature):
        recurrence = _recurrence(own, met, itself, k)
    return F.log_softmax(recurrence.transpose(0, 1).flatten(0, 1) / temperature, dim=-1)


def _recurrence(own: Tensor, met: Tensor, itself: Tensor, k: int) -> Tensor:
    """r [B, I, N] of patches [B, I, N, d] by those that they meet [C, I, N, d].

    itself [B]: which of the C an image does not meet. In chunks of images, and where one image
    is too much, of bags.
    """
    views, count = own.shape[1:3]
    bags, others = met.flatten(0, 1), (len(met) - 1) * views  # [C * I, N, d]
    itself = itself[:, None] * views + torch.arange(views, device=own.device)  # [B, I]
    per_bag = views * count * count
    images_at_once = max(1, CHUNK_ELEMENTS // (per_bag * len(bags)))
    bags_at_once = max(1, CHUNK_ELEMENTS // (per_bag * images_at_once))
    recurrence = []
    for queries, left_out in zip(
        own.flatten(1, 2).split(images_at_once), itself.split(images_at_once), strict=True
    ):
        similarity = torch.cat(
            [
                torch.einsum("bqd,gnd->bqgn", queries, chunk).amax(-1)
                for chunk in bags.split(bags_at_once)
            ],
            dim=-1,
        )  # [b, I * N, C * I]
        left_out = left_out[:, None].expand(-1, views * count, -1)
        top = similarity.scatter(-1, left_out, -torch.inf).topk(min(k, others)).values.mean(-1)
        recurrence.append(top - similarity.scatter(-1, left_out, 0).sum(-1) / others)
    return torch.cat(recurrence).unflatten(1, (views, count))


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
