"""Inter-level distillation, between bags of regions and images: L_S and L_T.

A bag is a view's patches, each an instance with the attention a_n. In L_S it is the bag
probability of multiple instance learning, the mixture of what the image head says of each patch in
these shares; in L_T it is the mean of the patches' region embeddings in these shares, which an
image must tell from the bags of other images (both ours).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.intra import pair_weights, paired_rows
from losses.mixture import mixture_cross_entropy
from losses.targets import image_targets
from utils import distributed
from utils.views import Views, in_full_precision


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


@in_full_precision
def teacher_loss(student: Views, teacher: Views, temperature: float) -> Tensor:
    """L_T = mean over pairs of -log( exp(b_v . e_i / t) / sum over images of exp(b_v . e'_i / t) ).

    The student's image, b_v by the bag head, recognises the teacher's bag of its own image among
    those of all images of the micro-batch, on all processes; e = normalize(sum_m a_m u_m), u the
    region embeddings. A scalar, float32, with gradient to the student's images alone; 0 where
    there is but one image.
    """
    (log_attention,), (regions,) = teacher.log_attention, teacher.patch_embeddings
    bags = torch.einsum("tn,tnd->td", log_attention.detach().exp(), regions.detach())
    bags = F.normalize(bags, dim=-1).unflatten(0, (teacher.count, teacher.batch))
    keys = distributed.gather(bags.transpose(0, 1))  # [P * B, I, d], by image
    queries = student.bag_embeddings.unflatten(0, (student.count, student.batch))
    scores = torch.einsum("vbd,kid->vibk", queries / temperature, keys).log_softmax(-1)
    first = distributed.position() * student.batch
    own = scores[..., first : first + student.batch].diagonal(dim1=-2, dim2=-1)  # [V, I, B]
    weights = pair_weights(teacher.count, student.count, own)
    return -(weights * own.mean(-1)).sum()
