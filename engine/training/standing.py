"""How a run's features stand to those that it started from, and when they were at their best."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from utils import checkpoint

ERRORS = 2  # standard errors by which a figure must be below the start's to count as fallen


class Label(NamedTuple):
    """How a figure is written for people."""

    name: str
    digits: int
    unit: str = ""

    def of(self, value: float) -> str:
        return f"{self.name} {value:.{self.digits}f}{self.unit}"


LABELS = {
    "knn_top1": Label("k-NN top-1", 2, " %"),
    "knn_top5": Label("top-5", 2, " %"),
    "agreement": Label("agreement of neighbours", 2, " %"),
    "rank": Label("rank", 1),
    "alignment": Label("alignment", 4),
    "uniformity": Label("uniformity", 3),
}


@dataclass(frozen=True)
class Measured:
    """What a validation finds (validation.py).

    by: on what, in words: those of one text can be compared. figures: for the log; the first is
    the one that decides, percent. scores: float32 [n], of which it is the mean, in shares: of
    queries that were told right, or of neighbours in common.
    """

    by: str
    figures: dict[str, float]
    scores: Tensor

    @property
    def name(self) -> str:
        """Of the figure that decides."""
        return next(iter(self.figures))

    @property
    def value(self) -> float:
        """Of the figure that decides."""
        return self.figures[self.name]

    def line(self, start: "Measured | None") -> str:
        """All figures for people, the start's beside them where there is one to compare with."""
        words = []
        for name, value in self.figures.items():
            label = LABELS[name]
            beside = "" if start is None else f" (start {start.figures[name]:.{label.digits}f})"
            words.append(label.of(value) + beside)
        return ", ".join(words)

    def behind(self, start: "Measured") -> float:
        """By how many standard errors of their difference it is below the start's; 0: it is not.

        The difference is of each score, as both are of the same images; where some could be read
        but once, of the means.
        """
        if len(self.scores) == len(start.scores):
            parts = [start.scores - self.scores]
        else:
            parts = [start.scores, self.scores]
        error = math.sqrt(sum(p.var(correction=0).item() / len(p) for p in parts))
        fall = (start.value - self.value) / 100
        if fall <= 0:
            return 0.0
        return fall / error if error else math.inf


class Standing:
    """The start's figures, the best ones, and whether the latest have fallen below the start's.

    start: None where a run was measured first when it had begun. best: of the figure that decides:
    its name, value and epoch; None before the first. best_step: where it was taken in this
    process's steps, else -1.
    """

    def __init__(self) -> None:
        self.start: Measured | None = None
        self.best: dict[str, str | float | int] | None = None
        self.best_step = -1
        self._by, self._fallen = "", False

    def state_dict(self) -> dict:
        """Tensors and plain data."""
        start = None if self.start is None else vars(self.start).copy()
        return {"by": self._by, "start": start, "best": self.best, "fallen": self._fallen}

    def load_state_dict(self, state: dict) -> None:
        self._by, self.best, self._fallen = (state[name] for name in ("by", "best", "fallen"))
        self.start = None if state["start"] is None else Measured(**state["start"])

    def update(self, measured: Measured, epoch: int, step: int, from_weights: bool) -> list[str]:
        """Warnings that new figures give, after `step` steps.

        from_weights: whether the start was somebody's weights (INIT.WEIGHTS), not random ones.
        """
        warnings = []
        if measured.by != self._by:
            if self._by:
                warnings.append(
                    f"the features were measured by {self._by}, and are by {measured.by} from here "
                    f"on: these are compared with no start, and the best is taken anew"
                )
            self.start, self.best = measured if step == 0 else None, None
            self._by, self._fallen = measured.by, False
        if self.best is None or measured.value > self.best["value"]:
            self.best = {"figure": measured.name, "value": measured.value, "epoch": epoch}
            self.best_step = step
        if self.start is not None:
            behind = measured.behind(self.start)
            if behind > ERRORS and not self._fallen:
                warnings.append(_fall(measured, self.start, behind, from_weights))
            self._fallen = behind > ERRORS
        return warnings

    def verdict(self, kept: bool) -> str:
        """What a run that has ended says of its best; empty where it was not measured.

        kept: whether checkpoint_best.pth holds the best state.
        """
        if self.best is None:
            return ""
        value, epoch = LABELS[self.best["figure"]].of(self.best["value"]), self.best["epoch"]
        if epoch == 0:
            where = f"; {checkpoint.BEST} holds those" if kept else ""
            return (
                f"no checkpoint is better than the weights that the run started from ({value})"
                f"{where}"
            )
        start = "" if self.start is None else f" (start {self.start.value:.2f})"
        where = f", in {checkpoint.BEST}" if kept else ""
        return f"the best features were those after epoch {epoch}: {value}{start}{where}"


def _fall(now: Measured, start: Measured, behind: float, from_weights: bool) -> str:
    """The warning of features that have become worse than the start's."""
    label = LABELS[now.name]
    lost = (
        "than the weights that the run started from: it unlearns them. Lower the learning rate "
        "(--lr), let the heads warm up for more epochs (INIT.HEADS_EPOCHS), freeze more of the "
        "lower blocks (INIT.FROZEN), let the rate decay faster by layer (INIT.LAYER_DECAY) or "
        "train for fewer epochs"
        if from_weights
        else "than the random network that the run started from. Lower the learning rate (--lr); "
        "whether it has collapsed feature_rank and teacher_information in log.txt say"
    )
    return (
        f"{label.of(now.value)} is below the start's {start.value:.2f}, by {behind:.1f} standard "
        f"errors of the difference: the teacher's features are worse {lost}; --keep best keeps the "
        f"best checkpoint, the start's among them"
    )
