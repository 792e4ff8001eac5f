"""Linear probes on frozen features: EsViT's SGD recipe, and logistic regression.

All heads of a probe see the same features, so several learning rates cost one pass.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.evaluation.knn import TOP, accuracy
from utils import distributed, seeding
from utils.distributed import World
from utils.seeding import derive_seed

# Rows of one block of test features.
BLOCK_ROWS = 8192
ITERATIONS = 1000  # of a logistic regression, at most


@dataclass(frozen=True)
class Recipe:
    """SGD of momentum 0.9 without weight decay, lr = base * batch / 256, a cosine to 0 by epoch.

    lrs: base learning rates at 256 images, one head each; with several, each has a twin that
    never sees the held-out images, on which the twins are compared. batch: images of all
    processes in one step. outputs: of the classifier. (EsViT; the twins are ours.)
    """

    lrs: tuple[float, ...]
    epochs: int
    batch: int
    val_freq: int
    outputs: int
    seed: int

    @property
    def has_twins(self) -> bool:
        return len(self.lrs) > 1

    @property
    def heads(self) -> int:
        return len(self.lrs) * (1 + self.has_twins)


@dataclass
class Probe:
    """Linear heads in training, the same on every process.

    held_out: bool [images], what the twins must not see. history: one dict for each tested
    epoch: epoch, loss, top1 and top5 (percent, one for each learning rate).
    """

    recipe: Recipe
    width: int
    held_out: Tensor
    world: World
    epoch: int = 0
    history: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        generator = torch.Generator().manual_seed(derive_seed(recipe.seed, seeding.PROBE))
        # All heads start alike: what differs in the end is their learning rate's doing.
        start = 0.01 * torch.randn(recipe.outputs, self.width, generator=generator)
        device = self.world.device
        self.weights = [start.to(device, copy=True).requires_grad_() for _ in range(recipe.heads)]
        self.biases = [
            torch.zeros(recipe.outputs, device=device, requires_grad=True)
            for _ in range(recipe.heads)
        ]
        self.rates = [lr * recipe.batch / 256 for lr in recipe.lrs] * (1 + recipe.has_twins)
        self.optimizer = torch.optim.SGD(
            [
                {"params": [weight, bias], "lr": rate}
                for weight, bias, rate in zip(self.weights, self.biases, self.rates, strict=True)
            ],
            momentum=0.9,
        )
        self.held_out = self.held_out.to(device)

    def logits(self, features: Tensor) -> Tensor:
        """Features [b, D] -> [b, heads, outputs]."""
        flat = F.linear(features, torch.cat(self.weights), torch.cat(self.biases))
        return flat.view(len(features), self.recipe.heads, self.recipe.outputs)

    def train_epoch(self, batches: Iterator[tuple[Tensor, Tensor, Tensor]], steps: int) -> Tensor:
        """`steps` steps on (features [b, D], labels [b], indices [b]) of this process.

        b may differ between processes and be 0: each image of the whole step weighs the same.
        Returns the epoch's mean loss of the first head, a scalar on the device.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = 0.5 * rate * (1 + math.cos(math.pi * self.epoch / self.recipe.epochs))
        total = torch.zeros((), device=self.world.device)
        for _ in range(steps):
            total += self._step(*next(batches))
        self.epoch += 1
        # Each process has its images' part of every mean.
        return distributed.total(total) / steps

    def _step(self, features: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        heads = self.recipe.heads
        losses = F.cross_entropy(
            self.logits(features).flatten(0, 1), labels.repeat_interleave(heads), reduction="none"
        ).view(-1, heads)
        seen = torch.ones_like(losses)
        if self.recipe.has_twins:
            seen[:, heads // 2 :] = (~self.held_out[indices]).float()[:, None]
        # Means over the images of all processes, whatever the share of each.
        counts = distributed.total(seen.sum(0)).clamp(min=1)
        means = (losses * seen).sum(0) / counts
        means.sum().backward()
        parameters = [*self.weights, *self.biases]
        if self.world.size > 1:
            sums = distributed.totals([parameter.grad for parameter in parameters])
            for parameter, gradient in zip(parameters, sums, strict=True):
                parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return means.detach()[0]

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
        """Top-1 and top-5 of every head, percent; with fewer than 5 outputs, top-5 is top-all.

        features [n, D], labels [n], the same on every process, on the CPU or the device; each
        process takes a share of the rows. The first of equal logits wins.
        """
        hits = torch.zeros(2, self.recipe.heads, device=self.world.device, dtype=torch.int64)
        rows = distributed.share(len(features), self.world)
        for first in range(rows.start, rows.stop, BLOCK_ROWS):
            block = slice(first, min(first + BLOCK_ROWS, rows.stop))
            targets = labels[block].to(self.world.device)[:, None, None]
            logits = self.logits(features[block].to(self.world.device))
            ranking = logits.topk(min(TOP, self.recipe.outputs), dim=2).indices
            hits[0] += (logits.argmax(dim=2) == targets[..., 0]).sum(0)
            hits[1] += (ranking == targets).any(2).sum(0)
        top1, top5 = (100 * distributed.total(hits).double() / len(features)).tolist()
        return top1, top5

    def finite(self) -> list[bool]:
        """Whether every weight of each head is finite."""
        heads = zip(self.weights, self.biases, strict=True)
        return [bool(weight.isfinite().all() & bias.isfinite().all()) for weight, bias in heads]

    def state(self) -> dict:
        """What a later process needs to go on: tensors and plain data."""
        return {
            "epoch": self.epoch,
            "history": self.history,
            "weights": [weight.detach() for weight in self.weights],
            "biases": [bias.detach() for bias in self.biases],
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        """Go on from `state`."""
        for own, stored in zip(
            [*self.weights, *self.biases], [*state["weights"], *state["biases"]], strict=True
        ):
            own.copy_(stored)
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.history = state["epoch"], state["history"]


def stratified(labels: Tensor, share: float, seed: int) -> Tensor:
    """Indices, rising, of about `share` of every class's images, at least one of each.

    The draw depends on (seed, class) alone, so a smaller share is part of a larger one.
    """
    places = [
        places[: max(1, round(share * len(places)))] for places in _drawn_by_class(labels, seed)
    ]
    return torch.cat(places).sort().values


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Bool [n]: about `share` of every class set aside, at least one, but never a whole class."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for places in _drawn_by_class(labels, derive_seed(seed, seeding.HELD_OUT)):
        wanted = max(1, round(share * len(places)))
        mask[places[: min(wanted, len(places) - 1)]] = True
    return mask


def _drawn_by_class(labels: Tensor, seed: int) -> Iterator[Tensor]:
    """The indices of each class in an order drawn by (seed, class)."""
    classes, counts = labels.unique(return_counts=True)
    by_class = labels.argsort(stable=True).split(counts.tolist())
    for label, places in zip(classes.tolist(), by_class, strict=True):
        generator = torch.Generator().manual_seed(derive_seed(seed, seeding.LABELS, label))
        yield places[torch.randperm(len(places), generator=generator)]


def logistic_scores(
    train: Tensor, labels: Tensor, test: Tensor, outputs: int, c: float
) -> tuple[Tensor, list[str]]:
    """Scores [m, outputs] of logistic regression (scikit-learn) on standardised features.

    train [n, D], labels [n], test [m, D]; c: inverse regularisation. A class without training
    images gets -inf. The list has scikit-learn's warnings, of no convergence above all.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = labels.unique()
    scores = torch.full((len(test), outputs), -torch.inf, dtype=torch.float64)
    if len(classes) == 1:
        scores[:, classes] = 0
        return scores, []
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=ITERATIONS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(train.numpy(), labels.numpy())
    remarks = [f"logistic regression, C {c:g}: {str(w.message).splitlines()[0]}" for w in caught]
    decision = torch.from_numpy(model.decision_function(test.numpy())).double()
    if decision.ndim == 1:  # two classes
        decision = torch.stack([-decision, decision], dim=1)
    scores[:, classes] = decision
    return scores, remarks


def top_accuracy(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5, percent, of scores [m, classes]; a score of -inf is never a hit."""
    ranking = scores.topk(min(TOP, scores.shape[1]), dim=1)
    return accuracy(ranking.indices.where(ranking.values.isfinite(), -1), labels)
