"""LCR, learning common rationale (Shu et al. 2023): a branch that predicts where GradCAM looks.

GradCAM (Selvaraju et al. 2017) of the contrastive loss says which cells of the feature map the
loss of an image hangs on. A branch fitted to it (models/rationale.py) says so without a loss, and
so at inference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.views import Views, in_full_precision


@in_full_precision
def gradcam(patch_features: Tensor, gradient: Tensor) -> Tensor:
    """ReLU( sum_c F_c * dloss/dx_c ), divided by its maximum for each image; no gradient.

    patch_features F [B, N, D]; gradient [B, D]: of the loss by the image feature x, the mean of
    the patches, which is GradCAM's channel weight up to a factor. Returns [B, N] in [0, 1]; all 0
    for an image that has no cell above 0.
    """
    features, gradient = patch_features.detach().float(), gradient.detach().float()
    cam = torch.einsum("bnd,bd->bn", features, gradient).relu()
    # A smallest positive number, not a comparison, which would hide what is not finite.
    return cam / cam.amax(dim=1, keepdim=True).clamp_min(1e-30)


def gradcam_of(loss: Tensor, student: Views) -> Tensor:
    """GradCAM [B, N] of a loss that is a mean over the images, of their only crop; no gradient.

    The graph stays, for the backward pass. Wants an image feature that is the mean of its patches.
    """
    # A map is divided by its maximum: the factor B only keeps an image's gradient out of half
    # precision's underflow.
    (gradient,) = torch.autograd.grad(
        student.batch * loss, student.image_features, retain_graph=True
    )
    (patches,) = student.patch_features
    return gradcam(patches, gradient)


@in_full_precision
def fitting_loss(predicted: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Sum over the images of KL( softmax(target / t) || softmax(predicted / t) ) over the cells.

    predicted, target: [B, N] in [0, 1]. The target has no gradient.
    """
    log_target = F.log_softmax(target.detach() / temperature, dim=1)
    log_predicted = F.log_softmax(predicted / temperature, dim=1)
    return (log_target.exp() * (log_target - log_predicted)).sum()
