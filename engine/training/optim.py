"""The optimizer's side of the recipe: groups, clipping, the step, the teacher's average."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from models.network import Network


def parameter_groups(
    network: Network, layer_decay: float = 1.0, attention_rate: float = 1.0
) -> list[dict]:
    """Two groups: all that decays; biases and 1-D parameters, which do not [esvit].

    Parameters that are not trained are in neither. `weight_g` is [K, 1]: it decays.
    layer_decay: other than 1, two groups for each height of the backbone, from the top, whose
    "rate" is a factor of the learning rate: 1 above the blocks and in the heads, and once more
    times layer_decay for each block below (ELECTRA, Clark et al. 2020; BEiT, Bao et al. 2022).
    attention_rate: the factor of the MIL attention's (ours).
    """
    backbone, rates = network.backbone, {}
    for owner, depth in backbone.depths().items():
        rate = layer_decay ** (len(backbone.all_blocks()) + 1 - depth)
        rates |= dict.fromkeys(owner.parameters(recurse=False), rate)
    if network.pool is not None:
        rates |= dict.fromkeys(network.pool.parameters(), attention_rate)
    groups: dict[tuple[float, bool], list[str]] = {(1.0, True): [], (1.0, False): []}
    parameters = dict(network.named_parameters())
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            decays = not (name.endswith(".bias") or parameter.ndim == 1)
            groups.setdefault((rates.get(parameter, 1.0), decays), []).append(name)
    return [
        {"params": [parameters[name] for name in names], "names": names}
        | {"decays": decays, "rate": rate}
        for (rate, decays), names in sorted(groups.items(), reverse=True)
    ]


def build_optimizer(
    name: str, network: Network, layer_decay: float = 1.0, attention_rate: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW with PyTorch's betas and eps, or SGD with momentum 0.9.

    The learning rate and the weight decay are set before each step by `set_rates`. Both are
    fused, because then `step_if` can skip a step.
    """
    groups = parameter_groups(network, layer_decay, attention_rate)
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
    """This step's learning rate, times the group's own, and weight decay where a group decays."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def take_moments(optimizer: torch.optim.Optimizer, saved: dict) -> bool:
    """Load the state of an optimizer of the same kind, by the parameters' names.

    Its groups may have been others: what was not among them begins without moments. Whether that
    could be: of an earlier version, which kept no names, only where all is as it was.
    """
    own = optimizer.state_dict()
    names = [name for group in own["param_groups"] for name in group["names"]]
    before = [name for group in saved["param_groups"] for name in group.get("names", ())]
    if not before:
        numbers = [[group["params"] for group in s["param_groups"]] for s in (own, saved)]
        if numbers[0] != numbers[1]:
            return False
        before = names
    places = {name: place for place, name in enumerate(before)}
    found = {
        number: saved["state"][places[name]]
        for number, name in enumerate(names)
        if places.get(name) in saved["state"]
    }
    # How a step is computed belongs to this machine, and rates are set before each step.
    optimizer.load_state_dict(own | {"state": own["state"] | found})
    return True


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale each gradient on its own by limit / (norm + 1e-6) where that is < 1; limit 0: none.

    Not by the global norm [esvit]. Returns the norms before clipping of the gradients that there
    are, float32 [P]; nothing is fetched to the host.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if limit > 0:
        scales = ((norms + 1e-6).reciprocal() * limit).clamp(max=1.0)
        torch._foreach_mul_(gradients, scales.unbind())
    return norms


def cancel_last_layer(module: nn.Module) -> None:
    """Set the gradients of both heads' last layers to None: the step leaves them as they are.

    Not zero: weight decay and Adam's moments would still move them.
    """
    for name, parameter in module.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


class TeacherEMA:
    """teacher <- m * teacher + (1 - m) * student, over backbone, heads [esvit] and pooling.

    The parameter lists are paired by name once; what is frozen in the student, and so the same in
    both, is in neither. BatchNorm statistics are not averaged: the
    teacher keeps its own, from its own forward passes [esvit].
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        teachers = dict(teacher.named_parameters())
        pairs = [
            (teachers[name], parameter)
            for name, parameter in student.named_parameters()
            if parameter.requires_grad and name in teachers
        ]
        if any(own.stride() != other.stride() for own, other in pairs):
            raise ValueError("student and teacher differ in layout, and the kernel goes by address")
        self._teacher, self._student = map(list, zip(*pairs, strict=True))
        self._no_buffers = [None] * len(self._teacher)

    @torch.no_grad()
    def update(self, momentum: float, good: Tensor | None = None) -> None:
        """One step of the average; in place, no host sync, one kernel for many parameters.

        good: a bool scalar on the device; where it is false, the teacher stays as it is.
        """
        # Fused SGD, which a number on the device can hold back, as torch's lerp cannot: with the
        # student in the gradient's place, a weight decay of -1 makes it student - teacher. From a
        # momentum of a half on, a CPU gives lerp's bits.
        sgd(
            self._teacher,
            self._student,
            self._no_buffers,
            fused=True,
            found_inf=None if good is None else (~good).float(),
            lr=momentum - 1,
            weight_decay=-1,
            momentum=0,
            dampening=0,
            nesterov=False,
            maximize=False,
        )
