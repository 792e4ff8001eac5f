"""Random inputs of the losses, as plain lists for plain_losses and as Views for losses/."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import inter, intra, released
from losses.objective import Objective
from losses.targets import Centres
from tests.losses import plain_losses as plain
from tests.losses.plain_losses import Side
from utils.views import Views

# Not the defaults, so that a constant in the wrong place shows.
STUDENT_TEMP, TEACHER_TEMP = 0.12, 0.05
TEMPS = (STUDENT_TEMP, TEACHER_TEMP)

# Runs of equally sized crops, as the student sees them: (views, patches a view).
LAYOUTS = {
    "no local crops": [(2, 6)],
    "local crops": [(2, 6), (3, 4)],
    "two local sizes": [(2, 6), (2, 4), (3, 1)],
    "local as large as global": [(4, 6)],
}


def goal_of(name: str, **options) -> Objective:
    return Objective(name, student_temp=STUDENT_TEMP, **options)


GOALS = {
    "dino": goal_of("dino"),
    "esvit": goal_of("esvit"),
    "released 0.1": goal_of("released", lambda1=0.1),
    "released 1": goal_of("released", lambda1=1.0),
    "cmd 0.3": goal_of("cmd", lambda1=0.3),
    "cmd 1": goal_of("cmd", lambda1=1.0),
    "cmd 0": goal_of("cmd", lambda1=0.0),
    "cmd, L_S alone": goal_of("cmd", lt=False),
    "cmd, L_T alone": goal_of("cmd", ls=False),
    "cmd, neither": goal_of("cmd", ls=False, lt=False),
}


@dataclass
class Case:
    """Inputs of one loss; embeddings and prototypes want gradients, of the teacher too."""

    layout: list[tuple[int, int]]
    student: Side
    teacher: Side
    centres: Centres

    def leaves(self, *sides: str) -> dict[str, Tensor]:
        """All that a gradient might reach, by name; of student, teacher or both."""
        found = {"student": self.student.leaves(), "teacher": self.teacher.leaves()}
        return {
            f"{side}.{name}": leaf for side in sides or found for name, leaf in found[side].items()
        }

    def to(
        self, dtype: torch.dtype, images: slice = slice(None), device: torch.device | str = "cpu"
    ) -> "Case":
        """Fresh leaves of another type, of some images only, on a device."""
        centres = Centres(len(self.centres.image), region=True)
        centres.load_state_dict(self.centres.state_dict())
        return replace(
            self,
            student=_leaves_of(self.student, dtype, images, device),
            teacher=_leaves_of(self.teacher, dtype, images, device),
            centres=centres.to(device, dtype),
        )

    def views(self) -> tuple[Views, Views]:
        """Student and teacher as the networks hand them over.

        All that the teacher hands over wants a gradient here, so that a loss that lets one through
        is seen.
        """
        return as_views(self.student, self.layout), as_views(self.teacher, [(2, self.layout[0][1])])


def make(
    layout: str | list[tuple[int, int]],
    batch: int,
    seed: int = 0,
    prototypes: int = 7,
    width: int = 5,
    features: int = 6,
) -> Case:
    """A float64 case whose numbers float32 holds exactly; width: of the embeddings."""
    generator = torch.Generator().manual_seed(1000 * batch + seed)
    runs = LAYOUTS[layout] if isinstance(layout, str) else layout
    counts = [count for views, count in runs for _ in range(views)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def side(counts: list[int]) -> Side:
        return Side(
            [F.normalize(normal(batch, width), dim=-1) for _ in counts],
            [F.normalize(normal(batch, count, width), dim=-1) for count in counts],
            [normal(batch, count).log_softmax(dim=-1) for count in counts],
            [F.normalize(normal(batch, count, width), dim=-1) for count in counts],
            [normal(batch, count, features) for count in counts],
            normal(prototypes, width) / width**0.5,
            normal(prototypes, width) / width**0.5,
            [F.normalize(normal(batch, width), dim=-1) for _ in counts],
        )

    centres = Centres(prototypes, region=True)
    for centre in (centres.image, centres.region):
        centre.copy_(normal(prototypes) / 5)
    case = Case(runs, side(counts), side(counts[:2]), centres)
    return case.to(torch.float64)


def _leaves_of(side: Side, dtype: torch.dtype, images: slice, device: torch.device | str) -> Side:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().to(device, dtype).requires_grad_()

    return Side(
        [leaf(view[images]) for view in side.images],
        [leaf(view[images]) for view in side.instances],
        [leaf(view[images].double().log_softmax(dim=-1)) for view in side.attention],
        [leaf(view[images]) for view in side.patches],
        [leaf(view[images]) for view in side.features],
        leaf(side.image_prototypes),
        leaf(side.region_prototypes),
        [leaf(view[images]) for view in side.bags],
    )


def as_views(side: Side, layout: list[tuple[int, int]]) -> Views:
    """Crop-major Views."""
    groups, first = [], 0
    for views, _ in layout:
        groups.append(slice(first, first + views))
        first += views

    def by_size(parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat(parts[group]) for group in groups]

    return Views(
        batch=side.batch,
        image_embeddings=torch.cat(side.images),
        image_prototypes=side.image_prototypes,
        image_features=torch.cat(side.images),
        bag_embeddings=torch.cat(side.bags),
        patch_features=by_size(side.features),
        patch_embeddings=by_size(side.patches),
        region_prototypes=side.region_prototypes,
        log_attention=by_size(side.attention),
        instance_embeddings=by_size(side.instances),
    )


def plain_objective(case: Case, goal: Objective) -> tuple[Tensor, dict[str, Tensor]]:
    """Total and terms of the objective, by plain_losses."""
    sides, centres, temps = (case.student, case.teacher), case.centres, TEMPS
    terms = {"L_I": plain.image_term(*sides, centres.image, *temps)}
    if goal.name == "dino":
        return terms["L_I"], terms
    terms["L_R"] = plain.region_term(*sides, centres.region, *temps)
    if goal.name == "released":
        views = len(case.student.images)
        terms["T"] = plain.released_teacher_term(
            case.teacher, views, centres.image, centres.region, TEACHER_TEMP
        )
        terms["S"] = plain.released_student_term(case.student, STUDENT_TEMP)
    if goal.name == "cmd" and goal.ls:
        terms["L_S"] = plain.student_term(*sides, STUDENT_TEMP)
    if goal.name == "cmd" and goal.lt:
        terms["L_T"] = plain.teacher_term(*sides, STUDENT_TEMP)
    between = [terms[name] for name in ("T", "S", "L_S", "L_T") if name in terms]
    return terms["L_I"] / 2 + terms["L_R"] / 2 + goal.lambda1 * sum(between), terms


def wide_case() -> Case:
    """In float32 and wide enough that bfloat16 would change matches and logits."""
    layout = [(2, 49), (2, 9)]
    return make(layout, 4, prototypes=100, width=32, features=48).to(torch.float32)


def gradients(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """d value / d leaf by name; None where there is no way from one to the other."""
    if not value.requires_grad:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
    return dict(zip(leaves, found, strict=True))


def assert_near(ours: Tensor, wanted: Tensor, tolerance: float, name: str, scale: float = 0.0):
    """max |ours - wanted| <= tolerance * the larger of max |wanted| and scale."""
    assert ours.shape == wanted.shape, f"{name}: shape {tuple(ours.shape)}"
    difference = float((ours.double() - wanted.double()).abs().max())
    limit = tolerance * max(float(wanted.abs().max()), scale)
    assert difference <= limit, f"{name}: differs by {difference:.3g}, limit {limit:.3g}"


def assert_same_gradients(
    ours: dict[str, Tensor | None], wanted: dict[str, Tensor | None], tolerance: float
):
    """Equal by name; None stands for exactly zero.

    Rounding counts against the largest gradient of all in float32, a hundredth of it in float64.
    """
    largest = max((float(g.abs().max()) for g in wanted.values() if g is not None), default=0.0)
    for name, gradient in wanted.items():
        if gradient is None:
            assert ours[name] is None or not ours[name].any(), f"{name} got a gradient"
        elif ours[name] is None:
            assert not gradient.any(), f"{name} got no gradient"
        else:
            scale = largest if ours[name].dtype == torch.float32 else largest / 100
            assert_near(ours[name], gradient, tolerance, f"d/d {name}", scale)


Ours = Callable[[Views, Views, Centres], Tensor]
Plain = Callable[[Case], Tensor]

TERMS: dict[str, tuple[Ours, Plain]] = {
    "L_I": (
        lambda s, t, c: intra.image_loss(s, t, c.image, *TEMPS)[0],
        lambda case: plain.image_term(case.student, case.teacher, case.centres.image, *TEMPS),
    ),
    "L_R": (
        lambda s, t, c: intra.region_loss(s, t, c.region, *TEMPS),
        lambda case: plain.region_term(case.student, case.teacher, case.centres.region, *TEMPS),
    ),
    "L_S": (
        lambda s, t, c: inter.student_loss(s, t, STUDENT_TEMP),
        lambda case: plain.student_term(case.student, case.teacher, STUDENT_TEMP),
    ),
    "L_T": (
        lambda s, t, c: inter.teacher_loss(s, t, STUDENT_TEMP),
        lambda case: plain.teacher_term(case.student, case.teacher, STUDENT_TEMP),
    ),
    "T": (
        lambda s, t, c: released.released_terms(s, t, c.image, c.region, *TEMPS)[0],
        lambda case: plain.released_teacher_term(
            case.teacher,
            len(case.student.images),
            case.centres.image,
            case.centres.region,
            TEACHER_TEMP,
        ),
    ),
    "S": (
        lambda s, t, c: released.released_terms(s, t, c.image, c.region, *TEMPS)[1],
        lambda case: plain.released_student_term(case.student, STUDENT_TEMP),
    ),
}


@functools.lru_cache
def plain_term(term: str, layout: str, batch: int) -> tuple[Case, Tensor, dict]:
    """A case with the term's value and gradients by plain_losses, in float64; none reaches the
    teacher."""
    case = make(layout, batch)
    value = TERMS[term][1](case)
    return case, value, gradients(value, case.leaves())
