"""Inter-level distillation, between bags of regions and images: L_S and L_T.

A bag is a view's patches, pooled by the MIL attention; its embedding is the image head's of the
pooled feature, so that bags and images speak of the same prototypes (ours).
"""

from torch import Tensor

from losses.intra import paired_cross_entropy
from losses.targets import bag_targets, image_targets
from utils.views import Views


def student_loss(
    student: Views,
    teacher: Views,
    centre: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk_mib: int = 0,
) -> Tensor:
    """L_S = mean over pairs of CE(q^I_i, p^B_v): the student's bag predicts the teacher's image.

    It alone trains the attention, and with it patches and image head (ours).
    """
    targets = image_targets(teacher, centre, teacher_temp)
    return paired_cross_entropy(
        student.bag_embeddings, student, teacher, targets, student_temp, chunk_mib
    )[0]


def teacher_loss(
    student: Views,
    teacher: Views,
    bag_centre: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk_mib: int = 0,
) -> Tensor:
    """L_T = mean over pairs of CE(q^B_i, p^I_v): the student's image predicts the teacher's bag."""
    targets = bag_targets(teacher, bag_centre, teacher_temp)
    return paired_cross_entropy(
        student.image_embeddings, student, teacher, targets, student_temp, chunk_mib
    )[0]
