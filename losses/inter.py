"""Inter-level distillation, between bags of regions and images: L_S and L_T.

A bag is a view's patches, each an instance with the attention a_n. As an embedding it is the mean
of its instances' in these shares, on the unit sphere. A view of the student at one level recognises
its image, seen by the teacher at the other level, among the images of the batch (ours).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.intra import pair_weights
from utils import distributed
from utils.views import Views, in_full_precision


@in_full_precision
def student_loss(student: Views, teacher: Views, temperature: float) -> Tensor:
    """L_S: the student's bags, by the image head, recognise the teacher's images.

    A scalar, float32. It alone trains the attention.
    """
    bags = map(bag_embeddings, student.instance_embeddings, student.log_attention)
    return _recognition(torch.cat(list(bags)), teacher.image_embeddings, teacher, temperature)


@in_full_precision
def teacher_loss(student: Views, teacher: Views, temperature: float) -> Tensor:
    """L_T: the student's images, by the bag head, recognise the teacher's bags of regions.

    A scalar, float32.
    """
    (regions,), (log_attention,) = teacher.patch_embeddings, teacher.log_attention
    bags = bag_embeddings(regions, log_attention)
    return _recognition(student.bag_embeddings, bags, teacher, temperature)


def bag_embeddings(instances: Tensor, log_attention: Tensor) -> Tensor:
    """normalize(sum_n a_n e_n) [V * B, d] of instances [V * B, N, d] and log a [V * B, N]."""
    return F.normalize(torch.einsum("vn,vnd->vd", log_attention.exp(), instances), dim=-1)


def _recognition(queries: Tensor, keys: Tensor, teacher: Views, temperature: float) -> Tensor:
    """Mean over pairs (i, v) of -log( exp(q_v . k_i / t) / sum over k' of exp(q_v . k'_i / t) ).

    queries: of the student's views [V * B, d]; keys: of the teacher's [I * B, d], which get no
    gradient. k' are those of view i of all images of the micro-batch, on all processes; with one
    image the loss is 0.
    """
    keys = keys.unflatten(0, (teacher.count, teacher.batch)).transpose(0, 1)
    keys = distributed.gather(keys)  # [P * B, I, d], by image; no gradient
    queries = queries.unflatten(0, (-1, teacher.batch))
    scores = torch.einsum("vbd,kid->vibk", queries / temperature, keys).log_softmax(-1)
    first = distributed.position() * teacher.batch
    own = scores[..., first : first + teacher.batch].diagonal(dim1=-2, dim2=-1)  # [V, I, B]
    return (pair_weights(teacher.count, len(queries), own) * -own.mean(-1)).sum()
