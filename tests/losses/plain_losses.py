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

    images [B, d]; instances and patches [B, N_v, d], by image and region head; attention [B, N_v],
    logarithms; features [B, N_v, D]; image_prototypes and region_prototypes [K, d]; bags [B, d],
    images by the bag head.
    """

    images: list[Tensor]
    instances: list[Tensor]
    attention: list[Tensor]
    patches: list[Tensor]
    features: list[Tensor]
    image_prototypes: Tensor
    region_prototypes: Tensor
    bags: list[Tensor]

    @property
    def batch(self) -> int:
        return len(self.images[0])

    def leaves(self) -> dict[str, Tensor]:
        """Everything a gradient might reach, by name."""
        named = {"W_I": self.image_prototypes, "W_R": self.region_prototypes}
        for kind in ("images", "instances", "attention", "patches", "features", "bags"):
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


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)


def pairs(views: int) -> list[tuple[int, int]]:
    """(i, v): i one of the two image-level views, v any view, v != i."""
    return [(i, v) for i, v in product(range(2), range(views)) if v != i]


def image_target(teacher: Side, i: int, b: int, centre: Tensor, temp: float) -> Tensor:
    """q^I_i of image b."""
    return softmax((teacher.image_prototypes @ teacher.images[i][b] - centre) / temp).detach()


def bag_embedding(log_attention: Tensor, instances: Tensor) -> Tensor:
    """Of one image: its instances' embeddings, in the attention's shares, on the unit sphere."""
    bag = sum(log_a.exp() * e for log_a, e in zip(log_attention, instances, strict=True))
    return bag / bag.norm()


def region_target(teacher: Side, i: int, b: int, m: int, centre: Tensor, temp: float) -> Tensor:
    logits = teacher.region_prototypes @ teacher.patches[i][b, m]
    return softmax((logits - centre) / temp).detach()


def log_image(student: Side, v: int, b: int, temp: float) -> Tensor:
    """log p^I_v of image b."""
    return log_softmax(student.image_prototypes @ student.images[v][b] / temp)


def image_term(student: Side, teacher: Side, centre: Tensor, *temps: float) -> Tensor:
    """L_I; temps: the student's, the teacher's."""
    return mean(
        [
            cross_entropy(
                image_target(teacher, i, b, centre, temps[1]), log_image(student, v, b, temps[0])
            )
            for i, v in pairs(len(student.images))
            for b in range(student.batch)
        ]
    )


def student_term(student: Side, teacher: Side, temp: float) -> Tensor:
    """L_S: of all images, the bag's own is the one to recognise."""
    return _recognition(_bags(student.attention, student.instances), teacher.images, temp)


def teacher_term(student: Side, teacher: Side, temp: float) -> Tensor:
    """L_T: of all images' bags, the view's own is the one to recognise."""
    return _recognition(student.bags, _bags(teacher.attention, teacher.patches), temp)


def _bags(attention: list[Tensor], instances: list[Tensor]) -> list[list[Tensor]]:
    """Of each view, each image's."""
    return [
        [bag_embedding(*of_image) for of_image in zip(*view, strict=True)]
        for view in zip(attention, instances, strict=True)
    ]


def _recognition(queries: list, keys: list, temp: float) -> Tensor:
    """Lists have one entry a view, and of that one an image."""
    terms = []
    for i, v in pairs(len(queries)):
        for own, query in enumerate(queries[v]):
            scores = torch.stack([query @ key.detach() / temp for key in keys[i]])
            terms.append(-log_softmax(scores)[own])
    return mean(terms)


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


def region_term(student: Side, teacher: Side, centre: Tensor, student_temp, teacher_temp) -> Tensor:
    """L_R."""
    terms = []
    for i, v in pairs(len(student.images)):
        for b in range(student.batch):
            each = []
            for n, patch in enumerate(student.patches[v][b]):
                m = best_match(student, teacher, v, i, b, n)
                q = region_target(teacher, i, b, m, centre, teacher_temp)
                log_patch = log_softmax(student.region_prototypes @ patch / student_temp)
                each.append(cross_entropy(q, log_patch))
            terms.append(mean(each))
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


def mean_logits(side: Side) -> dict[str, Tensor]:
    """The batch's mean logits [K] that the centres follow: image and region."""
    return {
        "image": mean([side.image_prototypes @ row for view in side.images for row in view]),
        "region": mean(
            [side.region_prototypes @ u for view in side.patches for row in view for u in row]
        ),
    }
