"""How a live run differs from a dead one: entropies, norms and ranks, and a plain warning.

A loss can fall while the network collapses: all images get one target, or every target is
uniform. These figures are computed only when a line of the log is written.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from losses.contrastive import KeyQueue
from losses.targets import Centres, image_targets
from utils.views import Views

# Lines of the log for which a figure must stay bad before a warning is given. A healthy
# run starts with equal targets for all images (everything is still near its centre).
PATIENCE = 20
# Share of the most that targets have said of their images, below which a run is fading; and over
# how many lines that is averaged, for one batch's figure is rough.
FADED, AVERAGED = 2 / 3, 10


@torch.no_grad()
def measure(
    teacher: Views, carried: Centres | KeyQueue, per_image: Tensor, teacher_temp: float
) -> dict[str, Tensor]:
    """Figures of one micro-batch of this process, scalars on the device.

    per_image: the objective's third result, entropies or hits (losses/objective.py).
    Of every objective:
    feature_rank: effective rank of the teacher's image features in the batch: the
    exponential of the entropy of the normalised singular values after the mean is taken off.
    Of those that contrast:
    contrast_accuracy: percent of queries whose own key is nearer than all of the queue.
    Of those that distil:
    teacher_entropy: mean entropy of the teacher's image distributions, nats.
    teacher_kl_uniform: mean KL of them from the uniform distribution, nats: log K - entropy.
    teacher_information: entropy of their mean minus mean entropy, nats: how much a target
    says about which image it is for; 0 when all images get the same target, at most
    log(2 B).
    centre_norm, region_centre_norm: L2 norms of c_I, c_R.
    attention_entropy: mean entropy of the teacher-side MIL attention over log N; 1 is uniform.
    """
    figures = {"feature_rank": effective_rank(teacher.image_features)}
    if isinstance(carried, KeyQueue):
        return figures | {"contrast_accuracy": 100 * per_image.mean()}
    centres, entropy = carried, per_image
    figures |= {
        "teacher_entropy": entropy.mean(),
        "teacher_kl_uniform": math.log(len(teacher.image_prototypes)) - entropy.mean(),
        "centre_norm": centres.image.norm(),
    }
    q = image_targets(teacher, centres.image, teacher_temp).log_probabilities().exp()
    marginal = torch.special.entr(q.mean(0)).sum()
    figures["teacher_information"] = marginal - entropy.mean()
    if centres.region is not None:
        figures["region_centre_norm"] = centres.region.norm()
    if teacher.log_attention:
        (log_attention,) = teacher.log_attention
        attention_entropy = -(log_attention.exp() * log_attention).sum(-1).mean()
        figures["attention_entropy"] = attention_entropy / math.log(max(2, log_attention.shape[-1]))
    return figures


def effective_rank(features: Tensor) -> Tensor:
    """Effective rank of rows [n, D] about their mean (Roy & Vetterli 2007); 0 if all are equal."""
    # A run whose figures are NaN must reach the line that says so.
    features = torch.nan_to_num(features.float(), posinf=0.0, neginf=0.0)
    singular = torch.linalg.svdvals(features - features.mean(0))
    share = singular / singular.sum().clamp_min(1e-12)
    # Rows that differ by rounding alone have no rank.
    varies = singular.amax() > 1e-5 * features.norm(dim=1).mean()
    return torch.where(varies, torch.special.entr(share).sum().exp(), 0.0)


class CollapseWatch:
    """Warns, once for each cause, when a figure has been bad for PATIENCE lines in a row."""

    def __init__(self) -> None:
        self._bad: dict[str, int] = {}
        self._information: dict[str, float] = {}  # a running mean, and the most that it was

    def state_dict(self) -> dict:
        """For how many lines each cause has been bad, and how information went; plain data."""
        return self._bad | ({"of_information": self._information} if self._information else {})

    def load_state_dict(self, state: Mapping) -> None:
        self._bad = {cause: lines for cause, lines in state.items() if cause != "of_information"}
        information = state.get("of_information", {})
        # An earlier version let one NaN in, which stayed.
        self._information = dict(information) if math.isfinite(information.get("mean", 0)) else {}

    def _follow(self, information: float, temperature: float) -> None:
        """Targets of another temperature say more or less for that reason: they start anew."""
        if self._information.get("temperature") != temperature:
            start = {"lines": 0, "mean": 0.0, "most": 0.0, "temperature": temperature}
            self._information = start
        if not math.isfinite(information):  # of a step that is skipped
            return
        known = self._information
        lines = min(known["lines"] + 1, AVERAGED)
        mean = known["mean"] + (information - known["mean"]) / lines
        most = max(known["most"], mean) if lines == AVERAGED else 0.0
        self._information = {"lines": lines, "mean": mean, "most": most, "temperature": temperature}

    def update(self, figures: Mapping[str, float], images: int) -> list[str]:
        """Warnings that a log line's figures give. images: B of the batch they are from."""
        warnings = []
        if "teacher_information" in figures:
            self._follow(figures["teacher_information"], figures.get("teacher_temp", 0.0))
        for cause, (bad, text) in self._judge(figures, images).items():
            self._bad[cause] = self._bad.get(cause, 0) + 1 if bad else 0
            if self._bad[cause] == PATIENCE:
                warnings.append(text)
        return warnings

    def _judge(self, f: Mapping[str, float], images: int) -> dict[str, tuple[bool, str]]:
        causes = {
            "rank": (
                f["feature_rank"] < 1.5,
                f"the features of different images lie on a line (feature_rank "
                f"{f['feature_rank']:.3g}): the run looks collapsed. Lower the learning rate.",
            ),
        }
        if "teacher_information" in f:
            most = math.log(2 * images)
            causes["information"] = (
                f["teacher_information"] < 0.02 * most,
                "the teacher gives all images nearly the same target "
                f"(teacher_information {f['teacher_information']:.3g} of at most {most:.3g} "
                "nats): the run looks collapsed. Check the teacher temperature and the centring.",
            )
            mean, faded = self._information["mean"], FADED * self._information["most"]
            causes["fading"] = (
                mean < faded,
                "the teacher's targets say less and less of which image they are for "
                f"(teacher_information {mean:.3g} nats in the mean, once "
                f"{self._information['most']:.3g}): the run is fading to equal targets. Sharpen "
                "the teacher: halve LOSS.TEACHER_TEMP and LOSS.WARMUP_TEACHER_TEMP.",
            )
        if "attention_entropy" in f:
            causes["attention"] = (
                f["attention_entropy"] < 0.02,
                f"the MIL attention looks at one patch (attention_entropy "
                f"{f['attention_entropy']:.3g} of 1): its pooling looks collapsed.",
            )
        return causes
