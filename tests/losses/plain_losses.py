"""The terms of the objective once more, one sum at a time, straight from docs' equations.

Slow and without any batching: one pair of views, one image, one patch after the other, every
distribution built in full. Shares nothing with losses/, so that the two can disagree.
Gradients come from autograd through these very sums.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass
class Side:
    """One network's outputs on V views of B images; lists have one entry a view.

    images [B, d]; patches [B, N_v, d]; features [B, N_v, D]; image_prototypes and
    region_prototypes [K, d].
    """

    images: list[Tensor]
    patches: list[Tensor]
    features: list[Tensor]
    image_prototypes: Tensor
    region_prototypes: Tensor

    @property
    def batch(self) -> int:
        return len(self.images[0])

    def leaves(self) -> dict[str, Tensor]:
        """Everything a gradient might reach, by name."""
        named = {"W_I": self.image_prototypes, "W_R": self.region_prototypes}
        for kind in ("images", "patches", "features"):
            for view, tensor in enumerate(getattr(self, kind)):
                named[f"{kind}[{view}]"] = tensor
        return named


def log_softmax(logits: Tensor) -> Tensor:
    shifted = logits - logits.max().detach()
    return shifted - shifted.exp().sum().log()


def softmax(logits: Tensor) -> Tensor:
    return log_softmax(logits).exp()


def cross_entropy(target: Tensor, log_input: Tensor) -> Tensor:
    return -(target * log_input).sum()


def kl(target: Tensor, log_target: Tensor, log_input: Tensor) -> Tensor:
    return (target * (log_target - log_input)).sum()


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)


def pairs(views: int) -> list[tuple[int, int]]:
    """(i, v): i one of the two image-level views, v any view, v != i."""
    return [(i, v) for i, v in product(range(2), range(views)) if v != i]


def image_target(teacher: Side, i: int, b: int, centre: Tensor, temp: float) -> Tensor:
    logits = teacher.image_prototypes @ teacher.images[i][b]
    return softmax((logits - centre) / temp).detach()


def region_target(teacher: Side, i: int, b: int, m: int, centre: Tensor, temp: float) -> Tensor:
    logits = teacher.region_prototypes @ teacher.patches[i][b, m]
    return softmax((logits - centre) / temp).detach()


def image_log_p(student: Side, v: int, b: int, temp: float) -> Tensor:
    return log_softmax(student.image_prototypes @ student.images[v][b] / temp)


def image_term(student: Side, teacher: Side, centre: Tensor, student_temp, teacher_temp) -> Tensor:
    """L_I."""
    return mean(
        [
            cross_entropy(
                image_target(teacher, i, b, centre, teacher_temp),
                image_log_p(student, v, b, student_temp),
            )
            for i, v in pairs(len(student.images))
            for b in range(student.batch)
        ]
    )


def image_entropies(teacher: Side, centre: Tensor, temp: float) -> Tensor:
    """H(q^I_i) of image b: [B, 2]."""
    rows = []
    for b in range(teacher.batch):
        targets = [image_target(teacher, i, b, centre, temp) for i in range(2)]
        rows.append(torch.stack([cross_entropy(q, q.log()) for q in targets]))
    return torch.stack(rows)


def best_match(student: Side, teacher: Side, v: int, i: int, b: int, n: int) -> int:
    """m*(n)."""
    own = student.features[v][b, n].detach()
    others = teacher.features[i][b].detach()
    cosines = [float(own @ other / (own.norm() * other.norm())) for other in others]
    return cosines.index(max(cosines))


def region_term(
    student: Side, teacher: Side, centre: Tensor, student_temp, teacher_temp, mix_pool=None
) -> Tensor:
    """L_R; with mix_pool, the weights ½/N + ½ a_n."""
    terms = []
    for i, v in pairs(len(student.images)):
        for b in range(student.batch):
            patches = student.patches[v][b]
            count = len(patches)
            weights = [1 / count] * count
            if mix_pool is not None:
                share = attention(mix_pool, patches).tolist()
                weights = [0.5 / count + 0.5 * a for a in share]
            total = 0
            for n in range(count):
                m = best_match(student, teacher, v, i, b, n)
                q = region_target(teacher, i, b, m, centre, teacher_temp)
                log_p = log_softmax(student.region_prototypes @ patches[n] / student_temp)
                total = total + weights[n] * cross_entropy(q, log_p)
            terms.append(total)
    return mean(terms)


def attention(pool: dict[str, Tensor], patches: Tensor) -> Tensor:
    """a [N] of patches [N, d]; pool: parameters by name."""
    scores = []
    for patch in patches:
        wide = patch * len(patch) ** 0.5
        tanh = torch.tanh(pool["tanh.weight"] @ wide + pool["tanh.bias"])
        gate = 1 / (1 + torch.exp(-(pool["gate.weight"] @ wide + pool["gate.bias"])))
        scores.append((pool["score.weight"][0] * tanh * gate).sum() + pool["score.bias"][0])
    return softmax(torch.stack(scores))


def bag(pool: dict[str, Tensor], patches: Tensor) -> Tensor:
    """e^B [d] of patches [N, d]."""
    total = sum(a * u for a, u in zip(attention(pool, patches), patches, strict=True))
    return total / (total**2).sum().sqrt()


def student_term(student: Side, pool, student_temp: float, both: bool = False) -> Tensor:
    """L_S."""
    terms = []
    for _, v in pairs(len(student.images)):
        for b in range(student.batch):
            own_bag = bag(pool, student.patches[v][b])
            log_bag = log_softmax(student.region_prototypes @ own_bag / student_temp)
            if not both:
                log_bag = log_bag.detach()
            terms.append(kl(log_bag.exp(), log_bag, image_log_p(student, v, b, student_temp)))
    return mean(terms)


def _residuals(patches: Tensor) -> list[Tensor]:
    """What each patch has beyond the mean of its bag, in units of their root mean square."""
    unit = [patch / patch.norm() for patch in patches]
    rest = [patch - mean(unit) for patch in unit]
    scale = mean([patch @ patch for patch in rest]).sqrt()
    return [patch / scale for patch in rest]


def _cosines(patches: Tensor) -> list[Tensor]:
    return [patch / patch.norm() for patch in patches]


def diverse_term(
    teacher: Side, pool, k: int, residual: bool = False, candidates: list[int] | None = None
) -> Tensor:
    """L_T, diverse or residual; 0 where there is no other image. candidates: None for all."""
    form, temperature = (_residuals, 0.1) if residual else (_cosines, 0.02)
    if teacher.batch == 1:
        return 0 * attention(pool, teacher.patches[0][0].detach()).sum()
    candidates = list(range(teacher.batch)) if candidates is None else candidates
    terms = []
    for i, b in product(range(2), range(teacher.batch)):
        met = [c for c in candidates if c != b] if b in candidates else candidates[:-1]
        assert len(met) == len(candidates) - 1
        patches = teacher.patches[i][b].detach()
        recurrence = []
        for patch in form(patches):
            best = []
            for j, other in product(range(2), met):
                theirs = form(teacher.patches[j][other].detach())
                best.append(max(float(patch @ u) for u in theirs))
            top = sorted(best, reverse=True)[:k]
            recurrence.append(sum(top) / len(top) - sum(best) / len(best))
        log_target = log_softmax(patches.new_tensor(recurrence) / temperature)
        terms.append(kl(log_target.exp(), log_target, attention(pool, patches).log()))
    return mean(terms)


def contrast_term(teacher: Side, pool) -> Tensor:
    """L_T, contrast."""
    terms = []
    for i, b in product(range(2), range(teacher.batch)):
        own = bag(pool, teacher.patches[i][b].detach())
        agreement, everyone = None, []
        for j, other in product(range(2), range(teacher.batch)):
            if (j, other) == (i, b):
                continue
            fixed = bag(pool, teacher.patches[j][other].detach()).detach()
            everyone.append(torch.exp(own @ fixed / 0.1))
            if other == b:
                agreement = everyone[-1]
        terms.append(-torch.log(agreement / sum(everyone)))
    return mean(terms)


def _log_bag(teacher: Side, pool, i: int, b: int, bag_centre: Tensor, temp: float) -> Tensor:
    own = bag(pool, teacher.patches[i][b].detach())
    return log_softmax((teacher.region_prototypes.detach() @ own - bag_centre) / temp)


def cross_term(
    teacher: Side, pool, centre, bag_centre, student_temp: float, teacher_temp: float
) -> Tensor:
    """L_T, cross."""
    terms = []
    for i, b in product(range(2), range(teacher.batch)):
        q = image_target(teacher, 1 - i, b, centre, teacher_temp)
        terms.append(kl(q, q.log(), _log_bag(teacher, pool, i, b, bag_centre, student_temp)))
    return mean(terms)


def same_term(teacher: Side, pool, centre, bag_centre, teacher_temp: float) -> Tensor:
    """L_T, same."""
    terms = []
    for i, b in product(range(2), range(teacher.batch)):
        q = image_target(teacher, i, b, centre, teacher_temp)
        log_bag = _log_bag(teacher, pool, i, b, bag_centre, teacher_temp)
        terms.append(kl(log_bag.exp(), log_bag, q.log()))
    return mean(terms)


def kl_mean(inputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """The old kl_div(reduction="mean") over B rows of K elements; no gradient where target <= 0."""
    total, count = 0, 0
    for row, target in zip(inputs, targets, strict=True):
        for x, t in zip(row, target, strict=True):
            if t > 0:
                total = total + t * (t.log() - x)
            count += 1
    return total / count


def released_teacher_term(teacher: Side, views: int, centre, region_centre, temp: float) -> Tensor:
    """T of the released code."""
    terms = []
    for i, _ in pairs(views):
        images, sums = [], []
        for b in range(teacher.batch):
            images.append(image_target(teacher, i, b, centre, temp))
            count = len(teacher.patches[i][b])
            sums.append(
                sum(region_target(teacher, i, b, m, region_centre, temp) for m in range(count))
            )
        terms.append(kl_mean(images, sums))
    return mean(terms)


def released_student_term(student: Side, student_temp: float) -> Tensor:
    """S of the released code."""
    terms = []
    for _, v in pairs(len(student.images)):
        images, sums = [], []
        for b in range(student.batch):
            images.append(student.image_prototypes @ student.images[v][b] / student_temp)
            sums.append(
                sum(student.region_prototypes @ u / student_temp for u in student.patches[v][b])
            )
        terms.append(kl_mean(images, sums))
    return mean(terms)


def mean_logits(side: Side, pool=None) -> dict[str, Tensor]:
    """The batch's mean logits [K] that the centres follow: image, region and, with a pool, bag."""
    images = [side.image_prototypes @ row for view in side.images for row in view]
    regions = [side.region_prototypes @ u for view in side.patches for row in view for u in row]
    means = {"image": mean(images), "region": mean(regions)}
    if pool is not None:
        bags = [side.region_prototypes @ bag(pool, row) for view in side.patches for row in view]
        means["bag"] = mean(bags)
    return means
