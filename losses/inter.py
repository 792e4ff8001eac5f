"""Inter-level distillation, between bags of regions and images: L_S and L_T.

A bag is a view's patches, each an instance with the attention a_n; its distribution is the bag
probability of multiple instance learning, the mixture of what a head says of each patch in these
shares: in L_S the image head, so that bags and images have one vocabulary; in L_T the region head,
whose vocabulary a head on the image feature learns to use (ours).
"""

from torch import Tensor

from losses.cross_entropy import Pairs
from losses.intra import paired_rows
from losses.mixture import mixture_cross_entropy
from losses.targets import image_targets
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
    return mixture_cross_entropy(
        list(zip(student.instance_embeddings, student.log_attention, strict=True)),
        student.image_prototypes,
        student_temp,
        image_targets(teacher, centre, teacher_temp),
        *paired_rows(student, teacher),
        chunk_mib,
    )


def bag_pairs(student: Views, teacher: Views, scale: float = 1.0) -> Pairs:
    """L_T = mean over pairs of CE(q^B_i, softmax(W_R b_v / tau_s)), q^B = sum_m a_m q_m.

    The student's image predicts the teacher's bag, what its region head says of the patches; b_v
    is the bag head's embedding. No gradient reaches the teacher.
    """
    (log_attention,) = teacher.log_attention
    shares = log_attention.detach().exp()
    return Pairs(student.bag_embeddings, *paired_rows(student, teacher), shares, scale)
