"""Every term of the objective against plain_losses; gradients, centres, precision, memory."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import build
from engine.training.step import Pretraining
from losses import cross_entropy, inter, intra, released
from losses.cross_entropy import Targets, soft_cross_entropy
from losses.objective import Objective
from losses.targets import Centres, image_targets, region_targets
from models.mil import GatedAttentionPool, bag_embedding
from models.network import HeadSpec, Network, add_attention, make_teacher
from models.registry import BackboneSpec, build_backbone
from tests.losses import plain_losses as plain
from tests.losses.loss_cases import (
    DIVERSE_K,
    LAYOUTS,
    STUDENT_TEMP,
    TEACHER_TEMP,
    Case,
    as_views,
    assert_near,
    assert_same_gradients,
    gradients,
    make,
    plain_objective,
)
from tests.runs import batch_of, pretraining, small_config
from utils.seeding import CANDIDATES, derive_seed
from utils.views import Views

TEMPS = (STUDENT_TEMP, TEACHER_TEMP)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def tolerance_of(term: str, dtype: torch.dtype) -> float:
    """Diverse density divides float32 cosines by 0.02: its target is coarser than the rest."""
    return 5e-5 if (term, dtype) == ("L_T diverse", torch.float32) else TOLERANCE[dtype]


def drawn_of(images: int) -> Tensor | None:
    """Two candidates of more images, in an order of their own."""
    return torch.tensor([images - 1, 0]) if images > 2 else None


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
    "L_R mix": (
        lambda s, t, c: intra.region_loss(s, t, c.region, *TEMPS, attention_mix=True),
        lambda case: plain.region_term(
            case.student, case.teacher, case.centres.region, *TEMPS, mix_pool=case.pool_parameters
        ),
    ),
    "L_S image": (
        lambda s, t, c: inter.student_loss(s, t.count, STUDENT_TEMP),
        lambda case: plain.student_term(case.student, case.pool_parameters, STUDENT_TEMP),
    ),
    "L_S both": (
        lambda s, t, c: inter.student_loss(s, t.count, STUDENT_TEMP, train_bag=True),
        lambda case: plain.student_term(case.student, case.pool_parameters, STUDENT_TEMP, True),
    ),
    "L_T diverse": (
        lambda s, t, c: inter.diverse_density(t, DIVERSE_K),
        lambda case: plain.diverse_term(case.teacher, case.pool_parameters, DIVERSE_K),
    ),
    "L_T residual": (
        lambda s, t, c: inter.diverse_density(t, DIVERSE_K, residual=True),
        lambda case: plain.diverse_term(case.teacher, case.pool_parameters, DIVERSE_K, True),
    ),
    "L_T residual, drawn": (
        lambda s, t, c: inter.diverse_density(t, DIVERSE_K, True, drawn_of(t.batch)),
        lambda case: plain.diverse_term(
            case.teacher, case.pool_parameters, DIVERSE_K, True, drawn_of(case.teacher.batch)
        ),
    ),
    "L_T contrast": (
        lambda s, t, c: inter.contrast(t),
        lambda case: plain.contrast_term(case.teacher, case.pool_parameters),
    ),
    "L_T cross": (
        lambda s, t, c: inter.cross_view(t, c.image, c.bag, *TEMPS),
        lambda case: plain.cross_term(
            case.teacher, case.pool_parameters, case.centres.image, case.centres.bag, *TEMPS
        ),
    ),
    "L_T same": (
        lambda s, t, c: inter.same_view(t, c.image, c.bag, TEACHER_TEMP),
        lambda case: plain.same_term(
            case.teacher, case.pool_parameters, case.centres.image, case.centres.bag, TEACHER_TEMP
        ),
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


def goal_of(name: str, **options) -> Objective:
    return Objective(name, diverse_k=DIVERSE_K, student_temp=STUDENT_TEMP, **options)


GOALS = {
    "dino": goal_of("dino"),
    "esvit": goal_of("esvit"),
    "released 0.1": goal_of("released", lambda1=0.1),
    "released 1": goal_of("released", lambda1=1.0),
    "cmd 0.3": goal_of("cmd", lambda1=0.3),
    "cmd 1 mix": goal_of("cmd", lambda1=1.0, region_weight="mix"),
    "cmd 0": goal_of("cmd", lambda1=0.0),
    "cmd both": goal_of("cmd", lambda1=0.1, ls_grad="both"),
    "cmd residual": goal_of("cmd", lt="residual"),
    "cmd contrast": goal_of("cmd", lambda1=0.7, lt="contrast"),
    "cmd cross": goal_of("cmd", lt="cross"),
    "cmd same": goal_of("cmd", lt="same"),
    "cmd, L_S alone": goal_of("cmd", lt="none"),
    "cmd, L_T alone": goal_of("cmd", ls=False),
    "cmd, neither": goal_of("cmd", ls=False, lt="none"),
}


@functools.lru_cache
def plain_term(term: str, layout: str, batch: int) -> tuple[Case, Tensor, dict]:
    """A case with the term's value and gradients by plain_losses, in float64."""
    case = make(layout, batch)
    value = TERMS[term][1](case)
    return case, value, gradients(value, case.leaves("student", "pool"))


# --- Values and gradients


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_the_plain_sum_and_so_are_its_gradients(term, layout, batch, dtype):
    case, wanted, wanted_gradients = plain_term(term, layout, batch)
    typed = case.to(dtype)
    value = TERMS[term][0](*typed.views(), typed.centres)
    assert value.dtype == dtype
    tolerance = tolerance_of(term, dtype)
    assert_near(value.detach(), wanted.detach(), tolerance, term)
    assert_same_gradients(
        gradients(value, typed.leaves("student", "pool")), wanted_gradients, tolerance
    )


@pytest.mark.parametrize(("layout", "batch"), [("two local sizes", 3), ("no local crops", 2)])
@pytest.mark.parametrize("name", GOALS)
def test_the_objective_is_the_weighted_sum_of_its_terms(name, layout, batch):
    case, goal = make(layout, batch, seed=1), GOALS[name]
    wanted, wanted_terms = plain_objective(case, goal)
    total, terms, entropy = goal(*case.views(), case.centres, TEACHER_TEMP)
    assert_near(total.detach(), wanted.detach(), 1e-9, "total")
    assert list(terms) == list(wanted_terms)
    for term, value in terms.items():
        assert not value.requires_grad
        assert_near(value, wanted_terms[term].detach(), 1e-9, term)
    assert not entropy.requires_grad
    entropies = plain.image_entropies(case.teacher, case.centres.image, TEACHER_TEMP)
    assert_near(entropy, entropies.T.flatten(), 1e-9, "entropy of the teacher")
    leaves = case.leaves("student", "pool")
    assert_same_gradients(gradients(total, leaves), gradients(wanted, leaves), tolerance=1e-9)


def test_a_single_image_without_l_t_trains_as_the_plain_sum():
    case, goal = make("local crops", 1, seed=2), GOALS["cmd, L_S alone"]
    wanted, _ = plain_objective(case, goal)
    total, _, _ = goal(*case.views(), case.centres, TEACHER_TEMP)
    assert_near(total.detach(), wanted.detach(), 1e-9, "total")
    leaves = case.leaves("student", "pool")
    assert_same_gradients(gradients(total, leaves), gradients(wanted, leaves), tolerance=1e-9)


def test_diverse_density_of_a_single_image_is_zero_with_a_zero_gradient():
    """Zero and not None: DDP waits for every parameter."""
    case = make("no local crops", 1)
    value = inter.diverse_density(case.views()[1], DIVERSE_K)
    assert value == 0
    for name, gradient in gradients(value, case.pool_parameters).items():
        assert gradient is not None, name
        assert not gradient.any(), name


@pytest.mark.parametrize("k", [1, 3, 4, 50])
def test_diverse_density_takes_k_bags_or_as_many_as_there_are(k):
    case = make("no local crops", 3, seed=3)
    wanted = plain.diverse_term(case.teacher, case.pool_parameters, k)
    value = inter.diverse_density(case.views()[1], k)
    assert_near(value.detach(), wanted.detach(), 1e-9, f"k {k}")


def test_a_batch_of_no_more_images_than_candidates_is_compared_whole():
    _, teacher = make("no local crops", 4).to(torch.float32).views()
    assert inter.draw_candidates(teacher, 4, seed=0) is None
    whole = inter.diverse_targets(teacher, DIVERSE_K)
    assert torch.equal(inter.diverse_targets(teacher, DIVERSE_K, False, torch.arange(4)), whole)
    drawn = {tuple(inter.draw_candidates(teacher, 3, seed).tolist()) for seed in range(100)}
    assert drawn == set(itertools.permutations(range(4), 3))


def test_targets_do_not_depend_on_images_beyond_the_candidates():
    """Neither on how many nor on which: what k means is that of the candidates alone."""
    case, candidates = make("no local crops", 9), torch.tensor([3, 0, 2])
    found = [
        inter.diverse_targets(case.to(torch.float64, images).views()[1], 3, True, candidates)
        for images in (slice(0, 4), slice(0, 9))
    ]
    few, many = (log_target.unflatten(0, (2, -1))[:, :4] for log_target in found)
    torch.testing.assert_close(many, few)


def test_diverse_density_points_at_what_recurs_in_some_images_and_not_in_all():
    """Patch 0: shared by images 0 and 1 alone; patch 1: shared by all; patch 2: its own."""
    axes = torch.eye(12, dtype=torch.float64)
    part = {0: 0, 1: 0, 2: 1, 3: 1}
    patches = torch.stack(
        [torch.stack([axes[part[b]], axes[2], axes[3 + 4 * i + b]]) for i in (0, 1) for b in part]
    )
    teacher = Views(4, axes[:8], axes, patch_embeddings=[patches])
    target = inter.diverse_targets(teacher, k=2).exp()
    assert target.shape == (8, 3)
    assert (target[:, 0] > 0.999).all()


def test_residuals_point_at_the_part_where_backgrounds_identify_the_image():
    """Six patches of background in the image's hue, which the body and the part have too.

    Images 0 and 2 have one hue, 1 and 3 another; 0 and 1 one part, 2 and 3 another; all one body.
    """
    axes = torch.eye(8, dtype=torch.float64)
    bags = []
    for _ in range(2):
        for hue, part in ((0, 3), (1, 3), (0, 4), (1, 4)):
            image = 0.8 * axes[hue]
            bags.append(torch.stack([image] * 6 + [image + axes[2], image + axes[part]]))
    teacher = Views(4, axes, axes, patch_embeddings=[torch.stack(bags)])
    plain = inter.diverse_targets(teacher, k=2).exp()[:, -1]
    residual = inter.diverse_targets(teacher, k=2, residual=True).exp()[:, -1]
    assert (plain < 1 / 8).all()
    assert (residual > 0.9).all()


def chunks_of(monkeypatch, elements: int) -> None:
    """Let the cross-entropy's chunks have this many elements, however few rows that is."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": elements})
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 1)


@pytest.mark.parametrize("chunk", [1, 100, 330, 870])
@pytest.mark.parametrize("term", TERMS)
def test_chunks_change_nothing(term, chunk, monkeypatch):
    case, wanted, wanted_gradients = plain_term(term, "two local sizes", 3)
    chunks_of(monkeypatch, chunk)
    monkeypatch.setattr(inter, "CHUNK_ELEMENTS", chunk)
    value = TERMS[term][0](*case.views(), case.centres)
    assert_near(value.detach(), wanted.detach(), 1e-12, term)
    found = gradients(value, case.leaves("student", "pool"))
    assert_same_gradients(found, wanted_gradients, tolerance=1e-11)


@pytest.mark.parametrize(("mib", "chunks"), [(0, 6), (1, 11)])
def test_a_matrix_of_a_chunk_has_as_many_mebibytes_as_the_option_says(mib, chunks):
    """Of K = 2^13, 32 rows to a MiB: L_R has 96 targets and 120 students, L_I and L_S 6 and 12."""
    run = pretraining(small_config(HEAD__OUT_DIM=2**13, LOSS__CHUNK_MIB=mib))
    with torch.no_grad():
        student, teacher = run.forward([torch.randn(3, 3, s, s) for s in (32, 32, 16, 16)])
        with torch.profiler.profile() as profile:
            run.objective(student, teacher, run.carried, TEACHER_TEMP)
    (found,) = [event for event in profile.key_averages() if event.key == "aten::softmax"]
    assert found.count == chunks


def drawn_matches(rows: int, matches: int, targets: int) -> tuple[Tensor, Tensor]:
    """Any matches, some of them twice, and any weights."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(targets, (rows, matches), generator=generator),
        torch.rand(rows, matches, generator=generator, dtype=torch.float64),
    )


def test_matches_give_a_weighted_sum_of_cross_entropies():
    """Students and targets of unlike number, a gradient from above that is not 1."""
    case, (matches, weights) = make("no local crops", 2), drawn_matches(6, 3, targets=8)
    students = F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=-1).requires_grad_()
    rows = F.normalize(torch.randn(8, 5, dtype=torch.float64), dim=-1)
    own, other = case.student.image_prototypes, case.teacher.image_prototypes
    targets = Targets(rows, other, TEACHER_TEMP, case.centres.image)
    q = [plain.softmax((other @ row - case.centres.image) / TEACHER_TEMP).detach() for row in rows]
    wanted = 0
    for s, m in itertools.product(range(6), range(3)):
        log_p = plain.log_softmax(own @ students[s] / STUDENT_TEMP)
        wanted = wanted + weights[s, m] * plain.cross_entropy(q[matches[s, m]], log_p)
    loss, entropy = soft_cross_entropy(students, own, STUDENT_TEMP, targets, matches, weights)
    assert_near(loss.detach(), wanted.detach(), 1e-12, "loss")
    entropies = torch.stack([plain.cross_entropy(row, row.log()) for row in q])
    assert_near(entropy, entropies, 1e-12, "entropy")
    again = soft_cross_entropy(
        students, own, STUDENT_TEMP, targets, matches, weights, entropies=False
    )
    assert torch.equal(again[0], loss)
    assert again[1] is None
    leaves = {"students": students, "prototypes": own, "teacher's": other}
    assert_same_gradients(
        gradients(-2.5 * loss, leaves), gradients(-2.5 * wanted, leaves), tolerance=1e-11
    )


def test_a_second_backward_pass_is_refused():
    """Its gradients are scaled in place: a second pass would scale them twice."""
    case, (matches, weights) = make("no local crops", 2), drawn_matches(4, 2, targets=4)
    student, teacher = case.views()
    targets = image_targets(teacher, case.centres.image, TEACHER_TEMP)
    loss, _ = soft_cross_entropy(
        student.image_embeddings, student.image_prototypes, 0.1, targets, matches, weights
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


# --- Derivatives by differences


@pytest.mark.parametrize("wanted", ["students", "prototypes", "both"])
def test_the_chunked_cross_entropy_s_gradient_is_its_derivative(wanted, monkeypatch):
    chunks_of(monkeypatch, 1)
    case, (matches, weights) = make("no local crops", 2), drawn_matches(4, 2, targets=24)
    student, teacher = case.views()
    targets = region_targets(teacher, case.centres.region, TEACHER_TEMP)
    leaves = {
        "students": student.image_embeddings.detach(),
        "prototypes": student.image_prototypes.detach(),
    }
    moving = [name for name in leaves if wanted in (name, "both")]

    def loss() -> Tensor:
        rows, own = leaves.values()
        return soft_cross_entropy(rows, own, STUDENT_TEMP, targets, matches, weights)[0]

    for name in moving:
        leaves[name].requires_grad_()
    loss().backward()
    for name in moving:
        leaf = leaves[name].detach()
        for place in itertools.product(*map(range, leaf.shape)):
            kept, values = leaf[place].item(), []
            for step in (1e-6, -1e-6):
                leaf[place] = kept + step
                values.append(loss().item())
            leaf[place] = kept
            slope = (values[0] - values[1]) / 2e-6
            assert leaves[name].grad[place].item() == pytest.approx(slope, abs=1e-6), (name, place)


def pool_with(case: Case, values: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    named = dict(zip(case.pool_parameters, values, strict=True))
    return lambda patches: functional_call(case.pool, named, (patches,))


def test_gradcheck_of_pooling_and_bag():
    case = make("no local crops", 2)
    patches = torch.cat(case.student.patches).detach().requires_grad_()

    def bags(patches: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        log_attention = pool_with(case, parameters)(patches)
        return log_attention, bag_embedding(patches, log_attention)

    assert torch.autograd.gradcheck(bags, (patches, *case.pool_parameters.values()))


def test_gradcheck_of_l_s_through_both_sides():
    case = make("local crops", 2)
    side, views = case.student, len(case.student.images)

    def loss(w_image: Tensor, w_region: Tensor, *rest: Tensor) -> Tensor:
        images, patches, parameters = rest[:views], rest[views : 2 * views], rest[2 * views :]
        changed = replace(
            side,
            images=list(images),
            patches=list(patches),
            image_prototypes=w_image,
            region_prototypes=w_region,
        )
        student = add_attention(pool_with(case, parameters), as_views(changed, case.layout))
        return inter.student_loss(student, 2, STUDENT_TEMP, train_bag=True)

    inputs = (side.image_prototypes, side.region_prototypes, *side.images, *side.patches)
    assert torch.autograd.gradcheck(loss, (*inputs, *case.pool_parameters.values()))


@pytest.mark.parametrize("term", ["L_T diverse", "L_T residual", "L_T cross", "L_T same"])
def test_gradcheck_of_l_t(term):
    case = make("no local crops", 2)
    teacher = as_views(case.teacher, case.layout)
    teacher = replace(teacher, patch_embeddings=[teacher.patch_embeddings[0].detach()])

    def loss(*parameters: Tensor) -> Tensor:
        pooled = add_attention(pool_with(case, parameters), teacher)
        return TERMS[term][0](None, pooled, case.centres)

    assert torch.autograd.gradcheck(loss, tuple(case.pool_parameters.values()))


def test_gradcheck_of_contrast_with_its_candidates_fixed():
    """The numeric derivative must not move the candidates, which the loss holds fixed."""
    case = make("no local crops", 2)
    bags = case.views()[1].bag_embeddings.detach()  # crop-major [2 * 2, d]
    own = bags.clone().requires_grad_()
    teacher = replace(case.views()[1], bag_embeddings=own)

    def fixed_candidates(own: Tensor) -> Tensor:
        logits = own @ bags.T / 0.1
        logits = logits.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
        return F.cross_entropy(logits, torch.tensor([2, 3, 0, 1]))

    assert torch.autograd.gradcheck(fixed_candidates, (own,))
    assert_same_gradients(
        gradients(inter.contrast(teacher), {"bags": own}),
        gradients(fixed_candidates(own), {"bags": own}),
        tolerance=1e-12,
    )


# --- Where gradients go

REACHES = {
    "L_I": {"student.images", "student.W_I"},
    "L_R": {"student.patches", "student.W_R"},
    "L_R mix": {"student.patches", "student.W_R"},
    "L_S image": {"student.images", "student.W_I"},
    "L_S both": {"student.images", "student.W_I", "student.patches", "student.W_R", "pool"},
    "L_T diverse": {"pool"},
    "L_T residual": {"pool"},
    "L_T residual, drawn": {"pool"},
    "L_T contrast": {"pool"},
    "L_T cross": {"pool"},
    "L_T same": {"pool"},
    "T": set(),
    "S": {"student.images", "student.W_I", "student.patches", "student.W_R"},
}


def reached_by(value: Tensor, leaves: dict[str, Tensor]) -> set[str]:
    """Kinds of leaves with a gradient that is not exactly zero."""
    found = gradients(value, leaves)
    names = [name for name, gradient in found.items() if gradient is not None and gradient.any()]
    return {"pool" if name.startswith("pool.") else name.split("[")[0] for name in names}


@pytest.mark.parametrize("term", TERMS)
def test_a_term_reaches_what_it_trains_and_nothing_of_the_teacher(term):
    case = make("two local sizes", 3)
    value = TERMS[term][0](*case.views(), case.centres)
    assert reached_by(value, case.leaves()) == REACHES[term]


@pytest.mark.parametrize("term", ["L_I", "L_R", "L_S image", "L_S both", "S"])
def test_a_student_term_reaches_every_crop(term):
    case = make("two local sizes", 2)
    found = gradients(TERMS[term][0](*case.views(), case.centres), case.leaves())
    kinds = REACHES[term] & {"student.images", "student.patches"}
    for kind, view in itertools.product(kinds, range(len(case.student.images))):
        assert found[f"{kind}[{view}]"].any(), f"{kind} of crop {view}"


HEADS = HeadSpec(out_dim=64, hidden_dim=96, bottleneck_dim=32, pool_hidden=16)
MODULES_REACHED = {
    "L_I": {"backbone", "head"},
    "L_R": {"backbone", "head_dense"},
    "L_R mix": {"backbone", "head_dense"},
    "L_S image": {"backbone", "head"},
    "L_S both": {"backbone", "head", "head_dense", "pool"},
    "L_T diverse": {"pool"},
    "L_T residual": {"pool"},
    "L_T residual, drawn": {"pool"},
    "L_T contrast": {"pool"},
    "L_T cross": {"pool"},
    "L_T same": {"pool"},
    "T": set(),
    "S": {"backbone", "head", "head_dense"},
}


def random_crops(batch: int, seed: int) -> list[Tensor]:
    """Two image-level crops of 32 pixels, two local ones of 16."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, size, size, generator=generator) for size in (32, 32, 16, 16)]


@pytest.fixture(scope="module")
def network_pair() -> tuple[Network, Network]:
    """A student with pooling, and a teacher whose weights differ and do want gradients."""
    spec = BackboneSpec("vit_small", 48, (2,), (3,), patch_size=8, img_size=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Network(build_backbone(spec, drop_path=0.1), HEADS, True, True)
        teacher = Network(build_backbone(spec), HEADS, True, False)
    return student, teacher.requires_grad_()


@pytest.mark.parametrize("term", TERMS)
def test_a_term_reaches_its_modules_through_the_networks(term, network_pair):
    student, teacher = network_pair
    crops = random_crops(3, seed=0)
    with torch.no_grad():
        teacher_views = teacher(crops[:2])
    views = student(crops, teacher_views)
    centres = Centres(HEADS.out_dim, bag=True)
    leaves = dict(student.named_parameters()) | {
        f"teacher.{name}": parameter for name, parameter in teacher.named_parameters()
    }
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = gradients(TERMS[term][0](*views, centres), trained)
    reached = {name.split(".")[0] for name, g in found.items() if g is not None and g.any()}
    assert reached == MODULES_REACHED[term]


def test_the_network_detaches_the_teacher_that_it_pools(network_pair):
    """Also a teacher that ran without no_grad gets nothing through the pooling."""
    student, teacher = network_pair
    crops = random_crops(3, seed=0)
    _, pooled = student(crops, teacher(crops[:2]))
    leaves = {name: p for name, p in teacher.named_parameters() if p.requires_grad}
    for output in (pooled.log_attention[0], pooled.bag_embeddings):
        found = gradients((output**2 * torch.arange(output.shape[-1])).sum(), leaves)
        reached = [name for name, g in found.items() if g is not None and g.any()]
        assert not reached


# --- Whole training steps


def trained(steps: int = 4, **options) -> tuple[Pretraining, list[dict[str, Tensor]]]:
    """A run after some steps, and each step's figures."""
    run = pretraining(small_config(**options))
    batches = iter([batch_of(random_crops(3, seed)) for seed in range(steps)])
    return run, [run.train_step(batches)[0] for _ in range(steps)]


def without_pooling(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("pool.")}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def esvit() -> tuple[Pretraining, list[dict[str, Tensor]]]:
    return trained(LOSS__OBJECTIVE="esvit")


@pytest.mark.parametrize("lt", ["diverse", "residual", "contrast", "cross", "same", "none"])
def test_without_l_s_the_teacher_term_changes_nothing_but_the_attention(lt, esvit):
    """Bit for bit, over four steps with drop path: drawing candidates changes no other draw."""
    reference, reference_figures = esvit
    run, figures = trained(CMD__LS=False, CMD__LT=lt, CMD__LT_CANDIDATES=2)  # of 3 images
    student, teacher = run.student.state_dict(), run.teacher.state_dict()
    assert differing(without_pooling(student), reference.student.state_dict()) == []
    assert differing(teacher, reference.teacher.state_dict()) == []
    for kind in ("image", "region"):
        assert torch.equal(getattr(run.carried, kind), getattr(reference.carried, kind))
    for ours, theirs in zip(figures, reference_figures, strict=True):
        assert torch.equal(ours["L_I"], theirs["L_I"])
        assert torch.equal(ours["L_R"], theirs["L_R"])
    assert (run.student.pool is None) == (lt == "none")
    if lt != "none":
        before = build.networks(run.cfg)[0].pool.state_dict()
        assert set(differing(run.student.pool.state_dict(), before)) >= {
            "tanh.weight",
            "gate.weight",
            "score.weight",
        }


def test_l_s_does_change_the_networks(esvit):
    """The counterpart of the test above: with L_S on, backbone and image head move elsewhere."""
    run, _ = trained(CMD__LT="none")
    moved = differing(without_pooling(run.student.state_dict()), esvit[0].student.state_dict())
    assert any(name.startswith("backbone.") for name in moved)
    assert any(name.startswith("head.") for name in moved)


SETTINGS = {
    "dino": {"LOSS__OBJECTIVE": "dino"},
    "esvit": {"LOSS__OBJECTIVE": "esvit"},
    "released": {"LOSS__OBJECTIVE": "released"},
    "cmd": {},
    "cmd, g trained": {"HEAD__NORM_LAST_LAYER": False},
    "cmd contrast": {"CMD__LT": "contrast"},
    "cmd cross": {"CMD__LT": "cross"},
    "cmd same": {"CMD__LT": "same"},
    "cmd both": {"CMD__LS_GRAD": "both"},
    "cmd both, no L_T": {"CMD__LS_GRAD": "both", "CMD__LT": "none"},
    "cmd, no L_T": {"CMD__LT": "none"},
    "cmd, no L_T, a single image": {"CMD__LT": "none", "TRAIN__BATCH_SIZE_PER_GPU": 1},
    "cmd, no L_S": {"CMD__LS": False},
    "cmd, mix alone": {"CMD__REGION_WEIGHT": "mix", "CMD__LS": False, "CMD__LT": "none"},
    "cmd, neither": {"CMD__LS": False, "CMD__LT": "none"},
    "cmd, lambda1 0": {"CMD__LAMBDA1": 0.0},
}
UNTRAINED_POOLING = ("cmd, no L_T", "cmd, no L_T, a single image", "cmd, mix alone")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_trainable_parameter_gets_a_gradient_and_no_other(name):
    """DDP waits for each; a bias of the score alone may be zero: softmax does not see it."""
    cfg = small_config(**SETTINGS[name])
    run = pretraining(cfg)
    student, teacher = run.forward(random_crops(cfg.TRAIN.BATCH_SIZE_PER_GPU, seed=5))
    total, _, _ = run.objective(student, teacher, run.carried, 0.04)
    total.backward()
    if run.student.pool is not None:
        pooling = [p.requires_grad for p in run.student.pool.parameters()]
        assert set(pooling) == {name not in UNTRAINED_POOLING}
    for parameter_name, parameter in run.student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
        silent = parameter_name == "pool.score.bias" or cfg.CMD.LAMBDA1 == 0
        if parameter.requires_grad and not (silent and parameter_name.startswith("pool.")):
            assert parameter.grad.any(), parameter_name
        assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name
    assert all(parameter.grad is None for parameter in run.teacher.parameters())


def test_pooling_and_region_head_are_built_only_where_they_are_used():
    built = {
        name: (student.head_dense is not None, student.pool is not None)
        for name in SETTINGS
        for student, _ in [build.networks(small_config(**SETTINGS[name]))]
    }
    plain_settings = {"dino": (False, False), "esvit": (True, False), "released": (True, False)}
    plain_settings["cmd, neither"] = (True, False)
    assert built == {name: plain_settings.get(name, (True, True)) for name in SETTINGS}


def total_and_gradients(**options) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    run = pretraining(small_config(**options))
    torch.manual_seed(7)
    student, teacher = run.forward(random_crops(3, seed=7))
    total, terms, _ = run.objective(student, teacher, run.carried, 0.04)
    total.backward()
    named = dict(run.student.named_parameters())
    return total, terms, {n: p.grad for n, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("lt", ["diverse", "residual", "contrast", "cross", "same"])
def test_lambda1_zero_is_esvit(lt):
    total, terms, found = total_and_gradients(CMD__LAMBDA1=0.0, CMD__LT=lt)
    wanted, wanted_terms, wanted_gradients = total_and_gradients(LOSS__OBJECTIVE="esvit")
    assert torch.equal(total, wanted)
    assert torch.equal(wanted.detach(), (wanted_terms["L_I"] + wanted_terms["L_R"]) / 2)
    assert set(terms) == {"L_I", "L_R", "L_S", "L_T"}
    assert terms["L_S"] > 0
    assert terms["L_T"] != 0
    assert differing(without_pooling(found), wanted_gradients) == []


def test_dino_is_l_i_alone_with_weight_one():
    total, terms, _ = total_and_gradients(LOSS__OBJECTIVE="dino")
    _, esvit_terms, _ = total_and_gradients(LOSS__OBJECTIVE="esvit")
    assert set(terms) == {"L_I"}
    assert torch.equal(total.detach(), terms["L_I"])
    assert torch.equal(terms["L_I"], esvit_terms["L_I"])


# --- Centres


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_centres_follow_the_mean_logits_by_ema(momentum):
    centres = Centres(7, region=True, bag=True, momentum=momentum)
    centres.double()
    wanted = {name: torch.zeros(7, dtype=torch.float64) for name in ("image", "region", "bag")}
    for seed in range(3):
        case = make("no local crops", 3, seed)
        centres.collect(case.views()[1])
        centres.update()
        for name, mean in plain.mean_logits(case.teacher, case.pool_parameters).items():
            wanted[name] = momentum * wanted[name] + (1 - momentum) * mean.detach()
            assert_near(getattr(centres, name), wanted[name], 1e-12, name)
            assert not getattr(centres, name).requires_grad


def test_default_momentum_of_the_centres_is_0_9():
    case, centres = make("no local crops", 2), goal_of("cmd").make_centres(7).double()
    centres.collect(case.views()[1])
    centres.update()
    mean = plain.mean_logits(case.teacher)["image"].detach()
    assert_near(centres.image, 0.1 * mean, 1e-12, "centre after one update")


def test_centres_of_micro_batches_are_the_big_batch_s():
    case = make("no local crops", 4)
    big, small = (Centres(7, region=True, bag=True).double() for _ in range(2))
    big.collect(case.views()[1])
    for images in (slice(0, 2), slice(2, 4)):
        small.collect(case.to(torch.float64, images).views()[1])
        assert not small.image.any(), "the centres are held until the update"
    big.update()
    small.update()
    for name in ("image", "region", "bag"):
        assert_near(getattr(small, name), getattr(big, name), 1e-12, name)
        assert getattr(big, name).any()


def test_an_update_with_nothing_collected_is_refused():
    centres = Centres(7, region=False)
    with pytest.raises(RuntimeError, match="nothing collected"):
        centres.update()
    case = make("no local crops", 2)
    centres.double().collect(case.views()[1])
    centres.update()
    before = centres.image.clone()
    with pytest.raises(RuntimeError, match="nothing collected"):
        centres.update()
    assert torch.equal(centres.image, before)


@pytest.mark.parametrize("name", GOALS)
def test_centres_are_kept_where_the_objective_reads_them(name):
    centres = GOALS[name].make_centres(7)
    wanted = {"image"} if name == "dino" else {"image", "region"}
    if name in ("cmd cross", "cmd same"):
        wanted.add("bag")
    assert set(centres.state_dict()) == wanted
    assert not any(value.any() for value in centres.state_dict().values())


def test_a_training_step_updates_the_centres_once_and_after_the_loss():
    """Two micro-batches, seen by the teacher as it was before the step and from centres of zero."""
    options = {"CMD__LT": "cross", "TRAIN__BATCH_SIZE_PER_GPU": 3, "MODEL__DROP_PATH": 0.0}
    run = pretraining(small_config(**options, TRAIN__ACCUM_STEPS=2))
    micro = [random_crops(3, seed) for seed in (0, 1)]
    means, losses = [], []
    for crops in micro:
        student, teacher = run.forward(crops)
        total, _, _ = run.objective(student, teacher, run.objective.make_centres(64), 0.04)
        losses.append(total.detach())
        kinds = {
            "image": (teacher.image_embeddings, teacher.image_prototypes),
            "region": (teacher.patch_embeddings[0].flatten(0, 1), teacher.region_prototypes),
            "bag": (teacher.bag_embeddings, teacher.region_prototypes),
        }
        means.append({kind: (rows @ w.T).mean(0).detach() for kind, (rows, w) in kinds.items()})
    figures, *_ = run.train_step(iter([batch_of(crops) for crops in micro]))
    assert_near(figures["loss"], torch.stack(losses).mean(), 1e-6, "loss")
    for kind in ("image", "region", "bag"):
        wanted = 0.1 * (means[0][kind] + means[1][kind]) / 2
        assert_near(getattr(run.carried, kind), wanted, 1e-5, kind)


def test_every_micro_batch_is_compared_with_candidates_of_its_own():
    own = {"CMD__LT_CANDIDATES": 2, "CMD__DIVERSE_K": 1}
    run = pretraining(small_config(TRAIN__ACCUM_STEPS=2, **own))
    for step in range(2):
        micro, terms, drawn = [random_crops(3, seed) for seed in (0, 1)], [], []
        for place, crops in enumerate(micro):
            _, teacher = run.forward(crops)
            seed = derive_seed(run.cfg.SEED, CANDIDATES, step, place)
            drawn.append(inter.draw_candidates(teacher, 2, seed))
            terms.append(inter.diverse_density(teacher, 1, True, drawn[-1]).detach())
        figures, *_ = run.train_step(iter([batch_of(crops) for crops in micro]))
        assert not torch.equal(*drawn)
        assert_near(figures["L_T"], torch.stack(terms).mean(), 1e-5, "L_T")


# --- Precision


def wide_case() -> tuple[Views, Views, Centres, dict[str, Tensor]]:
    """float32 Views wide enough that bfloat16 would change matches, logits and attention."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def views(runs: list[tuple[int, int]], batch: int = 4) -> Views:
        count = sum(views for views, _ in runs)
        return Views(
            batch,
            F.normalize(normal(count * batch, 32), dim=-1).requires_grad_(),
            F.normalize(normal(100, 32), dim=-1).requires_grad_(),
            patch_features=[normal(views * batch, n, 48) for views, n in runs],
            patch_embeddings=[
                F.normalize(normal(views * batch, n, 32), dim=-1).requires_grad_()
                for views, n in runs
            ],
            region_prototypes=F.normalize(normal(100, 32), dim=-1).requires_grad_(),
        )

    pool = GatedAttentionPool(32, 16)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.copy_(normal(*parameter.shape) / 4)
    student = views([(2, 49), (2, 9)])
    teacher = views([(2, 49)])
    (patches,) = teacher.patch_embeddings
    teacher = replace(teacher, patch_embeddings=[patches.detach()])
    centres = Centres(100, bag=True)
    for centre in centres.buffers():
        centre.copy_(normal(100) / 20)
    leaves = {
        "images": student.image_embeddings,
        "W_I": student.image_prototypes,
        "W_R": student.region_prototypes,
        "patches": student.patch_embeddings[0],
        **dict(pool.named_parameters()),
    }
    return add_attention(pool, student), add_attention(pool, teacher), centres, leaves


@pytest.mark.parametrize("term", TERMS)
def test_under_autocast_a_term_of_float32_embeddings_stays_float32(term):
    """Products may round their inputs (fast_products); values, matches and results do not."""
    student, teacher, centres, leaves = wide_case()
    ours = TERMS[term][0]
    wanted = ours(student, teacher, centres)
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(student, teacher, centres)
    assert value.dtype == torch.float32
    # Of 32 coordinates, rounding shows three times as much as of 256.
    rtol = 2e-3 if term == "L_T diverse" else 1e-3
    torch.testing.assert_close(value, wanted, rtol=rtol, atol=1e-5)
    found, reference = gradients(value, leaves), gradients(wanted, leaves)
    for name, gradient in reference.items():
        if gradient is not None and name != "score.bias":  # 0 but for rounding
            assert_near(found[name], gradient, 1e-2, name)


def unit_rows(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=-1)


def test_under_autocast_the_cross_entropy_is_within_a_hundredth_of_float32():
    """At a teacher's temperature, where logits of half precision are out by three hundredths."""
    prototypes, other = unit_rows(4096, 256, 0), unit_rows(4096, 256, 1)
    # Rows between two prototypes: half a hundredth of a logit decides how much each gets.
    teacher = F.normalize(other[:60] + other[60:120], dim=-1)
    matches, weights = drawn_matches(80, 2, targets=60)
    results = {}
    for kind in ("exact", "autocast"):
        students = unit_rows(80, 256, 3).requires_grad_()
        own = prototypes.clone().requires_grad_()
        targets = Targets(teacher, other, 0.04)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loss, entropy = soft_cross_entropy(students, own, 0.1, targets, matches, weights)
        loss.backward()
        results[kind] = loss.detach(), entropy, students.grad, own.grad
    for name, exact, found in zip(
        ("loss", "entropy", "dE", "dW"), results["exact"], results["autocast"], strict=True
    ):
        assert found.dtype == torch.float32
        assert_near(found, exact, 1e-2, name)
    halves = torch.softmax((teacher.bfloat16() @ other.bfloat16().T).float() / 0.04, -1)
    exact = Targets(teacher, other, 0.04).log_probabilities().exp()
    assert ((halves - exact).abs().amax(1) / exact.amax(1)).max() > 1e-2


def test_the_precision_of_other_products_is_as_before_the_loss():
    before = torch.backends.mkldnn.matmul.fp32_precision
    student, teacher, centres, _ = wide_case()
    with torch.autocast("cpu", torch.bfloat16):
        intra.image_loss(student, teacher, centres.image, *TEMPS)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    autocast, fast = torch.autocast("cpu", torch.bfloat16), cross_entropy.fast_products("cpu", 0.1)
    with pytest.raises(ZeroDivisionError), autocast, fast:
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


class PrecisionOfProducts(TorchDispatchMode):
    """Notes to what the inputs of batched products may be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("residual", [False, True])
def test_products_of_similarities_are_rounded_under_autocast_alone(residual):
    _, teacher, _, _ = wide_case()
    for enabled in (False, True):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        with autocast, PrecisionOfProducts() as products:
            inter.diverse_density(teacher, DIVERSE_K, residual)
        assert products.seen == {"bf16" if enabled else torch.backends.mkldnn.matmul.fp32_precision}


def test_under_autocast_attention_and_bags_stay_float32():
    torch.manual_seed(0)
    pool, patches = GatedAttentionPool(32, 16), F.normalize(torch.randn(4, 9, 32), dim=-1)
    wanted_attention = pool(patches)
    wanted_bags = bag_embedding(patches, wanted_attention)
    with torch.autocast("cpu", torch.bfloat16):
        log_attention = pool(patches)
        bags = bag_embedding(patches, log_attention)
    assert torch.equal(log_attention, wanted_attention)
    assert bags.dtype == torch.float32
    assert torch.equal(bags, wanted_bags)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_step_in_bfloat16_is_near_the_one_in_float32(name):
    figures = {}
    for precision in ("fp32", "bf16"):
        cfg = small_config(**SETTINGS[name], TRAIN__PRECISION=precision)
        run = pretraining(cfg)
        batches = iter([batch_of(random_crops(cfg.TRAIN.BATCH_SIZE_PER_GPU, seed=3))])
        figures[precision], *_ = run.train_step(batches)
    assert figures["bf16"].keys() == figures["fp32"].keys()
    for term, value in figures["fp32"].items():
        assert figures["bf16"][term].dtype == torch.float32
        torch.testing.assert_close(
            figures["bf16"][term], value, rtol=0.05, atol=0.02, msg=lambda m, t=term: f"{t}: {m}"
        )


# --- Memory


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *made, 0)
        return out


MANY = 2000  # prototypes


@pytest.mark.parametrize("term", ["L_I", "L_R", "L_R mix", "L_S image"])
def test_nothing_of_rows_times_prototypes_is_saved_for_the_backward(term):
    case = make("local crops", 3, prototypes=MANY)
    student, teacher = case.views()
    saved = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = TERMS[term][0](student, teacher, case.centres)
    for tensor in saved:
        assert tensor.numel() <= MANY * 5, tuple(tensor.shape)
    found = gradients(value, case.leaves())
    assert found["student.W_R" if "L_R" in term else "student.W_I"].any()


@pytest.mark.parametrize("term", ["L_I", "L_R", "L_S image"])
def test_no_tensor_is_larger_than_a_chunk(term, monkeypatch):
    """5 rows, fewer than any term has, and the prototypes' own 5 columns, are the largest."""
    views, largest = make("local crops", 3, prototypes=MANY).views(), {}
    centres = make("local crops", 3, prototypes=MANY).centres
    for rows in (5, 6):
        chunks_of(monkeypatch, rows * MANY)
        with LargestTensor() as mode:
            TERMS[term][0](*views, centres).backward()
        largest[rows] = mode.largest
    assert largest == {rows: rows * MANY for rows in (5, 6)}


def test_diverse_density_holds_the_similarities_of_one_chunk(monkeypatch):
    batch, count = 4, 2 * 6
    case = make("no local crops", batch)
    _, teacher = case.views()
    largest = {}
    for images in (1, batch):
        monkeypatch.setattr(inter, "CHUNK_ELEMENTS", images * count * batch * count)
        with LargestTensor() as mode:
            inter.diverse_density(teacher, DIVERSE_K)
        largest[images] = mode.largest
    assert largest == {images: images * count * batch * count for images in (1, batch)}


def test_a_fresh_teacher_has_the_student_s_weights_and_no_gradient(network_pair):
    student, _ = network_pair
    spec = BackboneSpec("vit_small", 48, (2,), (3,), patch_size=8, img_size=32)
    teacher = make_teacher(student, Network(build_backbone(spec), HEADS, True, False))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert differing(teacher.state_dict(), without_pooling(student.state_dict())) == []


@pytest.mark.parametrize("wrong", [{"name": "CMD"}, {"lt": "divers"}, {"ls_grad": "bag"}])
def test_an_objective_of_another_name_is_refused(wrong):
    with pytest.raises(ValueError, match="must be one of"):
        Objective(**wrong)
