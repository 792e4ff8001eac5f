"""The objective: DINO, EsViT and CMD are one weighted sum with terms switched off.

    L = w_I L_I + w_R L_R + lambda1 (L_S + L_T)

dino: L_I alone, weight 1. esvit: ½ L_I + ½ L_R. cmd: all of it. released: ½ L_I + ½ L_R +
lambda1 (T + S), the authors' code as released.
"""

from dataclasses import dataclass

from torch import Tensor

from losses import inter
from losses.intra import image_loss, region_loss
from losses.released import released_terms
from losses.targets import Centres
from utils.options import CHOICES
from utils.views import Views


@dataclass(frozen=True)
class Objective:
    """Which terms are on, and their constants; see the CMD.* and LOSS.* options.

    Calling it on student views, teacher views, centres and the teacher's temperature gives
    (total, terms, entropy): a scalar with gradient; each active term by its name (L_I, L_R,
    L_S, L_T; T, S for released), detached and unweighted; the entropy [I * B] of the teacher's
    image distributions in nats.
    """

    name: str = "cmd"
    lambda1: float = 0.3
    ls: bool = True
    ls_grad: str = "image"
    lt: str = "diverse"
    diverse_k: int = 6
    region_weight: str = "uniform"
    student_temp: float = 0.1

    def __post_init__(self) -> None:
        named = {
            "LOSS.OBJECTIVE": self.name,
            "CMD.LS_GRAD": self.ls_grad,
            "CMD.LT": self.lt,
            "CMD.REGION_WEIGHT": self.region_weight,
        }
        for option, value in named.items():
            if value not in CHOICES[option]:
                raise ValueError(f"{option} must be one of {CHOICES[option]}, not {value!r}")

    @property
    def needs_region_head(self) -> bool:
        return self.name != "dino"

    @property
    def needs_pooling(self) -> bool:
        """Whether any term reads the attention."""
        return self.name == "cmd" and (self.ls or self.lt != "none" or self.region_weight == "mix")

    @property
    def trains_pooling(self) -> bool:
        """Whether any term has a gradient to the pooling."""
        return self.needs_pooling and (self.lt != "none" or (self.ls and self.ls_grad == "both"))

    @property
    def needs_bag_centre(self) -> bool:
        return self.needs_pooling and self.lt in ("cross", "same")

    def make_centres(self, prototypes: int, momentum: float = 0.9) -> Centres:
        """Zero centres of the kinds that this objective reads."""
        return Centres(prototypes, self.needs_region_head, self.needs_bag_centre, momentum)

    def __call__(
        self, student: Views, teacher: Views, centres: Centres, teacher_temp: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        temps = (self.student_temp, teacher_temp)
        terms: dict[str, Tensor] = {}
        terms["L_I"], entropy = image_loss(student, teacher, centres.image, *temps)
        if self.name == "dino":
            return terms["L_I"], _detached(terms), entropy
        terms["L_R"] = region_loss(
            student,
            teacher,
            centres.region,
            *temps,
            attention_mix=self.needs_pooling and self.region_weight == "mix",
        )
        total = (terms["L_I"] + terms["L_R"]) / 2
        if self.name == "released":
            terms["T"], terms["S"] = released_terms(
                student, teacher, centres.image, centres.region, *temps
            )
            total = total + self.lambda1 * (terms["T"] + terms["S"])
        if self.name == "cmd" and self.ls:
            terms["L_S"] = inter.student_loss(
                student, teacher.count, self.student_temp, train_bag=self.ls_grad == "both"
            )
            total = total + self.lambda1 * terms["L_S"]
        if self.name == "cmd" and self.lt != "none":
            terms["L_T"] = self._teacher_term(teacher, centres, teacher_temp)
            total = total + self.lambda1 * terms["L_T"]
        return total, _detached(terms), entropy

    def _teacher_term(self, teacher: Views, centres: Centres, teacher_temp: float) -> Tensor:
        if self.lt == "diverse":
            return inter.diverse_density(teacher, self.diverse_k)
        if self.lt == "contrast":
            return inter.contrast(teacher)
        if self.lt == "cross":
            return inter.cross_view(
                teacher, centres.image, centres.bag, self.student_temp, teacher_temp
            )
        return inter.same_view(teacher, centres.image, centres.bag, teacher_temp)


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in terms.items()}
