"""The authors' released inter-level terms, number for number; to compare with, not to use.

T is a constant and S compares sums of logits, which are no distributions. Under today's
torch.nn.functional.kl_div the released loss is NaN from the first step; here it has the value
that kl_div(reduction="mean") had before mid-2022, and gradient 0 where a target is not
positive (ours: the old gradient was NaN there).
"""

import torch
from torch import Tensor

from losses.intra import pair_weights
from losses.targets import image_targets, region_targets
from utils.views import Views, in_full_precision


def kl_mean_before_2022(inputs: Tensor, targets: Tensor) -> Tensor:
    """target * (log target - input) where target > 0, else 0; meant over the last dimension.

    The old kl_div(reduction="mean") over [rows, K] is the mean of the result.
    """
    positive = targets > 0
    logs = torch.where(positive, targets, 1).log()
    return torch.where(positive, targets * (logs - inputs), 0).mean(-1)


@in_full_precision
def released_terms(
    student: Views,
    teacher: Views,
    centre: Tensor,
    region_centre: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor]:
    """T and S of the released code, each the mean over the pairs (i, v).

    T = klmean(input q^I_i, target sum_m q_{i,m}); S = klmean(input z_v / tau_s, target
    sum_n z_{v,n} / tau_s). Holds [B, V, K].
    """
    pairs = pair_weights(teacher.count, student.count, student.image_embeddings) / student.batch
    q_image = image_targets(teacher, centre, teacher_temp).log_probabilities().detach().exp()
    q_sums = _sum_of_region_targets(teacher, region_centre, teacher_temp)
    teacher_term = kl_mean_before_2022(q_image, q_sums)  # [I * B]

    images = student.image_embeddings @ student.image_prototypes.T
    sums = torch.cat([patches.sum(1) for patches in student.patch_embeddings])
    regions = sums @ student.region_prototypes.T
    student_term = kl_mean_before_2022(images / student_temp, regions / student_temp)  # [V * B]
    return (
        teacher_term @ pairs.sum(0).repeat_interleave(student.batch),
        student_term @ pairs.sum(1).repeat_interleave(student.batch),
    )


@torch.no_grad()
def _sum_of_region_targets(teacher: Views, centre: Tensor, temperature: float) -> Tensor:
    """sum_m q_{i,m} [I * B, K], one view of one image at a time."""
    (patches,) = teacher.patch_embeddings
    targets = region_targets(teacher, centre, temperature)
    return torch.stack([torch.softmax(targets.logits(view), dim=-1).sum(0) for view in patches])
