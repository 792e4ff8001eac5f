"""Steps whose numbers went wrong: skipped on all processes together, counted and reported.

A loss or a gradient that is not finite must leave nothing behind: not in the weights, the
optimizer's moments, the teacher, the centres, or BatchNorm's running statistics. Whether a step
is good is a number on the device which gates them all, so that the host need not wait for it.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.grouped_norm import batch_norms
from utils import distributed
from utils.errors import InputError
from utils.files import write_json

BAD_STEPS = "bad_steps.json"
_REMEMBERED = 20  # of the latest steps, for the dump


class StepGuard:
    """Keeps count of the bad steps and remembers the latest ones.

    skipped: bad steps of the run; row: bad ones up to now without a good one between; longest:
    the longest row since `counts` was last called: scalars on the device, int64. reported: how
    many bad steps the log's lines have counted.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        self.statistics = RunningStatistics(networks)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = self.row = self.longest = zero
        self.reported = 0
        self._latest: deque[tuple[int, list[Tensor], dict[str, Tensor], Tensor]] = deque(
            maxlen=_REMEMBERED
        )

    def note(
        self,
        step: int,
        indices: list[Tensor],
        figures: dict[str, Tensor],
        norms: Tensor,
        good: Tensor,
    ) -> None:
        """Count a step, and remember it.

        indices: int64 [B] for each micro-batch; figures: the step's; norms: float32 [P], those of
        the parameters' gradients; good: a bool scalar on the device, the same on every process.
        """
        self._latest.append((step, indices, figures, norms))
        self.skipped = self.skipped + ~good
        self.row = (self.row + 1) * ~good
        self.longest = torch.maximum(self.longest, self.row)

    def counts(self) -> dict[str, Tensor]:
        """For a line of the log; the longest row starts anew at the present one."""
        found = {"skipped_steps": self.skipped, "longest_row": self.longest}
        self.longest = self.row
        return found

    def in_row(self) -> bool:
        """Whether the latest two steps at least were bad; waits for the device."""
        return self.row.item() > 1

    def forget_row(self) -> None:
        """Begin a new row of bad steps."""
        self.row = self.longest = torch.zeros_like(self.row)

    def state_dict(self) -> dict[str, Tensor | int]:
        counts = {"skipped": self.skipped, "row": self.row, "longest": self.longest}
        return {**counts, "told": self.reported}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        device = self.skipped.device
        self.skipped, self.row, self.longest = (
            state[name].to(device) for name in ("skipped", "row", "longest")
        )
        self.reported = state["told"]

    def dump(self, folder: Path, names: Sequence[str]) -> Path:
        """Write what is known of the latest steps; all processes together. names: P of them.

        One entry a step: its number from 0, whether it was bad, each process's images and terms,
        and the norm of each parameter's gradient. Numbers that JSON does not have are texts.
        """
        mine = [
            (
                step,
                torch.cat(indices).tolist(),
                {name: float(value) for name, value in figures.items()},
            )
            for step, indices, figures, _ in self._latest
        ]
        path = folder / BAD_STEPS
        everyone = distributed.gather_objects(mine)
        steps = []
        for place, (step, _, _, norms) in enumerate(self._latest):
            ranks = [theirs[place] for theirs in everyone]
            steps.append(
                {
                    "step": step,
                    "bad": not all(_finite(terms) for _, _, terms in ranks),
                    "images_by_rank": [images for _, images, _ in ranks],
                    "terms_by_rank": [_for_json(terms) for _, _, terms in ranks],
                    "gradient_norms": _for_json(
                        # While the heads train alone, theirs, which come last.
                        dict(zip(names[-len(norms) :], norms.tolist(), strict=True))
                    ),
                }
            )
        distributed.on_main(lambda: write_json(path, {"steps": steps}))
        return path


class RunningStatistics:
    """BatchNorm's buffers in networks: they can be put back to what they were before a step."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        norms = [norm for network in networks for norm in batch_norms(network)]
        self._buffers = [buffer for norm in norms for buffer in norm.buffers()]

    def copy(self) -> list[Tensor]:
        """Their values now."""
        return [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def keep_if(self, good: Tensor, before: list[Tensor]) -> None:
        """Leave them as they are where `good`, else put `before` back; the host does not wait."""
        for buffer, old in zip(self._buffers, before, strict=True):
            buffer.copy_(torch.where(good, buffer, old))


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every number in them is finite, on all processes; waits for the device."""
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors])
    return distributed.total((~finite).sum()).item() == 0


def stop_sentence(
    row: int, folder: Path, dump: Path, saved: bool, precision: str, ever_good: bool
) -> InputError:
    """What the user reads when too many steps in a row were bad; ever_good: not all of the run."""
    held = (
        f"{folder} holds a checkpoint of the last finite state (if it stops again, that had gone "
        f"wrong before: put checkpoint_previous.pth or a kept one in its place)"
        if saved
        else f"the weights are not finite either, so they were not written: a checkpoint in "
        f"{folder}, if there is one, is from before"
    )
    ways = ["--lr with a lower learning rate"] if ever_good else []
    ways += [] if precision == "fp32" else ["--precision fp32"]
    advice = f" To go on: {' or '.join(ways)}, and --resume force." if ways else ""
    if not ever_good:
        # Weights that no step has changed owe nothing to the learning rate.
        advice += " No step of the run was finite: look there for the term that is not."
    return InputError(
        f"the loss or its gradient was not finite in {row} steps in a row (TRAIN.MAX_BAD_STEPS), "
        f"which were skipped, so the run stops; {held}. {dump} lists the images, terms and "
        f"gradient norms of these steps.{advice}"
    )


def _finite(terms: dict[str, float]) -> bool:
    return all(abs(value) < float("inf") for value in terms.values())


def _for_json(figures: dict[str, float]) -> dict[str, float | str]:
    return {k: v if abs(v) < float("inf") else str(v) for k, v in figures.items()}
