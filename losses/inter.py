"""Inter-level distillation, between bags of regions and images: L_S and L_T.

A bag is a view's patches, each an instance with the attention a_n; its distribution is the bag
probability of multiple instance learning, the mixture sum_n a_n p^I_n of what the image head says
of each patch. So bags and images are distributions over one vocabulary (ours).
"""

import torch
from torch import Tensor

from losses.cross_entropy import soft_cross_entropy
from losses.intra import paired_rows
from losses.mixture import mixture_cross_entropy
from losses.targets import image_targets, instance_targets
from utils.views import Views


def student_loss(
    student: Views,
    teacher: Views,
    centre: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk_mib: int = 0,
) -> Tensor:
    """L_S = mean over pairs of CE(q^I_i, p^B_v), p^B = sum_n a_n p^I_n.

    The student's bag predicts the teacher's image. It alone trains the attention.
    """
    targets = image_targets(teacher, centre, teacher_temp)
    bags = [len(attention) for attention in student.log_attention]
    rows, weights = (part.split(bags) for part in paired_rows(student, teacher))
    losses = [
        mixture_cross_entropy(
            instances, attention, student.image_prototypes, student_temp, targets, *pairs, chunk_mib
        )
        for instances, attention, *pairs in zip(
            student.instance_embeddings, student.log_attention, rows, weights, strict=True
        )
    ]
    return torch.stack(losses).sum()


def teacher_loss(
    student: Views,
    teacher: Views,
    bag_centre: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk_mib: int = 0,
) -> Tensor:
    """L_T = mean over pairs of CE(q^B_i, p^I_v), q^B = sum_m a_m q^I_m.

    The student's image predicts the teacher's bag; no gradient reaches the teacher.
    """
    (log_attention,) = teacher.log_attention
    return soft_cross_entropy(
        student.image_embeddings,
        student.image_prototypes,
        student_temp,
        instance_targets(teacher, bag_centre, teacher_temp),
        *paired_rows(student, teacher),
        chunk_mib,
        entropies=False,
        shares=log_attention.exp(),
    )[0]
