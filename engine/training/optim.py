"""The optimizer's side of the recipe: parameter groups, clipping, the frozen last layer."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def parameter_groups(module: nn.Module) -> list[dict]:
    """Two groups: all that decays; biases and 1-D parameters, which do not [esvit].

    Parameters that are not trained are in neither. `weight_g` is [K, 1]: it decays.
    """
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            one_dimensional = name.endswith(".bias") or parameter.ndim == 1
            (plain if one_dimensional else decayed).append(parameter)
    return [{"params": decayed, "decays": True}, {"params": plain, "decays": False}]


def build_optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW with PyTorch's betas and eps, or SGD with momentum 0.9.

    The learning rate and the weight decay are set before each step by `set_rates`. Both are
    fused, because then `step_if` can skip a step.
    """
    groups = parameter_groups(module)
    if name != "sgd":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    # Where a parameter's very first step is skipped, torch would leave its momentum uninitialised.
    for group in groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def step_if(good: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step where `good` (a bool scalar on the device), else none: not even of the moments.

    It is how GradScaler hands `found_inf` to a fused optimizer: the host does not wait.
    """
    optimizer.found_inf = (~good).float()
    optimizer.step()


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """This step's learning rate, and weight decay where a group decays."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale each parameter's gradient on its own by limit / (norm + 1e-6) where that is < 1.

    Not the global norm [esvit]. limit 0 clips nothing. Returns the norms before clipping,
    float32 [P] for the parameters that have a gradient; nothing is fetched to the host.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    if limit > 0:
        scales = ((norms + 1e-6).reciprocal() * limit).clamp(max=1.0)
        for gradient, scale in zip(gradients, scales.unbind(), strict=True):
            gradient.mul_(scale)
    return norms


def cancel_last_layer(module: nn.Module) -> None:
    """Set the gradients of both heads' last layers to None: the step leaves them as they are.

    Not zero: weight decay and Adam's moments would still move them.
    """
    for name, parameter in module.named_parameters():
        if "last_layer" in name:
            parameter.grad = None
