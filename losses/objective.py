"""The objectives: weighted sums of terms, by distillation or by contrast.

Distillation: DINO, EsViT and CMD are one sum with terms switched off,

    L = w_I L_I + w_R L_R + lambda1 (L_S + L_T)

dino: L_I alone, weight 1. esvit: ½ L_I + ½ L_R. cmd: all of it. released: ½ L_I + ½ L_R +
lambda1 (T + S), the authors' code as released.

Contrast: moco_v2 is L_C, InfoNCE against a queue of keys; lcr is L_C + weight * L_F, which fits
a branch to GradCAM.

Both kinds are called in the same way and have the same properties, which say what networks,
crops and state between steps they need.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from losses import inter
from losses.contrastive import KeyQueue, info_nce
from losses.intra import image_loss, region_loss
from losses.rationale import fitting_loss, gradcam_of
from losses.released import released_terms
from losses.targets import Centres
from utils import distributed
from utils.options import CONTRASTIVE, DISTILLING
from utils.views import Views

EVERY_CROP, GLOBAL_CROPS = slice(None), slice(2)


@dataclass(frozen=True)
class Objective:
    """Distillation: which terms are on, and their constants; see the CMD.* and LOSS.* options.

    Calling it on student views, teacher views, centres and the teacher's temperature gives
    (total, terms, entropy): a scalar with gradient; each active term by its name (L_I, L_R, L_S,
    L_T; T, S for released), detached and unweighted; the entropy [I * B] of the teacher's image
    distributions in nats.

    student_crops, teacher_crops: which crops of an image they see.
    """

    student_crops: ClassVar[slice] = EVERY_CROP
    teacher_crops: ClassVar[slice] = GLOBAL_CROPS
    projects: ClassVar[bool] = False  # whether the head is a plain projection, without prototypes
    needs_rationale: ClassVar[bool] = False

    name: str = "cmd"
    lambda1: float = 0.3
    ls: bool = True
    lt: bool = True
    student_temp: float = 0.1
    chunk_mib: int = 0

    def __post_init__(self) -> None:
        if self.name not in DISTILLING:
            raise ValueError(f"LOSS.OBJECTIVE must be one of {DISTILLING}, not {self.name!r}")

    @property
    def needs_region_head(self) -> bool:
        return self.name != "dino"

    @property
    def needs_pooling(self) -> bool:
        """Whether any term reads the attention."""
        return self.name == "cmd" and (self.ls or self.lt)

    @property
    def needs_instances(self) -> bool:
        """Whether the student's image head reads patches, by which the attention is trained."""
        return self.name == "cmd" and self.ls

    @property
    def needs_bag_head(self) -> bool:
        return self.name == "cmd" and self.lt

    def make_centres(self, prototypes: int, momentum: float = 0.9) -> Centres:
        """Zero centres of the kinds that this objective reads."""
        return Centres(prototypes, self.needs_region_head, momentum)

    def __call__(
        self, student: Views, teacher: Views, centres: Centres, teacher_temp: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        temps = (self.student_temp, teacher_temp)
        terms: dict[str, Tensor] = {}
        terms["L_I"], entropy = image_loss(student, teacher, centres.image, *temps, self.chunk_mib)
        if self.name == "dino":
            return terms["L_I"], _detached(terms), entropy
        terms["L_R"] = region_loss(student, teacher, centres.region, *temps, self.chunk_mib)
        total = (terms["L_I"] + terms["L_R"]) / 2
        if self.name == "released":
            terms["T"], terms["S"] = released_terms(
                student, teacher, centres.image, centres.region, *temps
            )
            total = total + self.lambda1 * (terms["T"] + terms["S"])
        if self.needs_instances:
            terms["L_S"] = inter.student_loss(student, teacher, self.student_temp)
            total = total + self.lambda1 * terms["L_S"]
        if self.needs_bag_head:
            terms["L_T"] = inter.teacher_loss(student, teacher, self.student_temp)
            total = total + self.lambda1 * terms["L_T"]
        return total, _detached(terms), entropy


@dataclass(frozen=True)
class Contrastive:
    """Contrast of one crop of an image with the other; see the MOCO.* and LCR.* options.

    The student's first crop is the query, the teacher's second the key. Calling it on student
    views, teacher views, the queue, and a temperature that it does not read, gives
    (total, terms, hits): L_C, and for lcr L_F, a sum over the images of all processes; hits [B] is
    1 where a query's own key is nearer than the queue. lcr needs an image feature that is the mean
    of the patch features, and their predicted map in the student's views.
    """

    name: str = "moco_v2"
    queue: int = 65536
    temperature: float = 0.2
    fitting_weight: float = 0.01
    fitting_temperature: float = 0.4

    student_crops: ClassVar[slice] = slice(1)
    teacher_crops: ClassVar[slice] = slice(1, 2)
    projects: ClassVar[bool] = True
    needs_region_head: ClassVar[bool] = False
    needs_pooling: ClassVar[bool] = False
    needs_instances: ClassVar[bool] = False
    needs_bag_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.name not in CONTRASTIVE:
            raise ValueError(f"LOSS.OBJECTIVE must be one of {CONTRASTIVE}, not {self.name!r}")

    @property
    def needs_rationale(self) -> bool:
        return self.name == "lcr"

    def __call__(
        self, student: Views, teacher: Views, queue: KeyQueue, teacher_temp: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        terms: dict[str, Tensor] = {}
        terms["L_C"], hits = info_nce(
            student.image_embeddings, teacher.image_embeddings, queue.keys, self.temperature
        )
        if self.name == "moco_v2":
            return terms["L_C"], _detached(terms), hits.float()
        # DistributedDataParallel takes the mean over processes.
        terms["L_F"] = distributed.size() * fitting_loss(
            student.predicted_map, gradcam_of(terms["L_C"], student), self.fitting_temperature
        )
        total = terms["L_C"] + self.fitting_weight * terms["L_F"]
        return total, _detached(terms), hits.float()


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in terms.items()}
