"""Inter-level distillation, between bags of regions and images: L_S and L_T.

A bag is a view's patches, each an instance with the attention a_n; its distribution is the bag
probability of multiple instance learning, the mixture sum_n a_n p^I_n of what the image head says
of each patch. So bags and images are distributions over one vocabulary (ours).
"""

import torch
from torch import Tensor

from losses.cross_entropy import soft_cross_entropy
from losses.intra import pair_weights, teacher_rows
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
    pairs = pair_weights(teacher.count, student.count, student.image_embeddings) / student.batch
    targets = image_targets(teacher, centre, teacher_temp)
    rows, first, losses = teacher_rows(teacher, student.count), 0, []
    for instances, log_attention in zip(
        student.instance_embeddings, student.log_attention, strict=True
    ):
        these = slice(first, first + len(instances) // student.batch)
        losses.append(
            mixture_cross_entropy(
                instances,
                log_attention,
                student.image_prototypes,
                student_temp,
                targets,
                rows[these].flatten(0, 1),
                pairs[these].repeat_interleave(student.batch, dim=0),
                chunk_mib,
            )
        )
        first = these.stop
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
    pairs = pair_weights(teacher.count, student.count, student.image_embeddings) / student.batch
    return soft_cross_entropy(
        student.image_embeddings,
        student.image_prototypes,
        student_temp,
        instance_targets(teacher, bag_centre, teacher_temp),
        teacher_rows(teacher, student.count).flatten(0, 1),
        pairs.repeat_interleave(student.batch, dim=0),
        chunk_mib,
        entropies=False,
        shares=log_attention.exp(),
    )[0]
