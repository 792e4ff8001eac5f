"""Every term of the objective against plain_losses; gradients, centres, precision, memory."""

import functools
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import build
from engine.training.step import Pretraining
from losses import cross_entropy, inter, intra, released
from losses.cross_entropy import Targets, soft_cross_entropy
from losses.mixture import mixture_cross_entropy
from losses.objective import Objective
from losses.targets import Centres, image_targets, region_targets
from models.mil import GatedAttention
from models.network import HeadSpec, Network
from models.registry import BackboneSpec, build_backbone
from tests.losses import plain_losses as plain
from tests.losses.loss_cases import (
    LAYOUTS,
    STUDENT_TEMP,
    TEACHER_TEMP,
    Case,
    assert_near,
    assert_same_gradients,
    gradients,
    make,
    plain_objective,
)
from tests.runs import batch_of, pretraining, small_config
from utils.views import Views

TEMPS = (STUDENT_TEMP, TEACHER_TEMP)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


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
        lambda s, t, c: inter.student_loss(s, t, c.image, *TEMPS),
        lambda case: plain.student_term(case.student, case.teacher, case.centres.image, *TEMPS),
    ),
    "L_T": (
        lambda s, t, c: inter.teacher_loss(s, t, c.bag, *TEMPS),
        lambda case: plain.teacher_term(case.student, case.teacher, case.centres.bag, *TEMPS),
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
    return Objective(name, student_temp=STUDENT_TEMP, **options)


GOALS = {
    "dino": goal_of("dino"),
    "esvit": goal_of("esvit"),
    "released 0.1": goal_of("released", lambda1=0.1),
    "released 1": goal_of("released", lambda1=1.0),
    "cmd 0.3": goal_of("cmd", lambda1=0.3, lt=True),
    "cmd 1": goal_of("cmd", lambda1=1.0, lt=True),
    "cmd 0": goal_of("cmd", lambda1=0.0, lt=True),
    "cmd, L_S alone": goal_of("cmd"),
    "cmd, L_T alone": goal_of("cmd", ls=False, lt=True),
    "cmd, neither": goal_of("cmd", ls=False, lt=False),
}


@functools.lru_cache
def plain_term(term: str, layout: str, batch: int) -> tuple[Case, Tensor, dict]:
    """A case with the term's value and gradients by plain_losses, in float64."""
    case = make(layout, batch)
    value = TERMS[term][1](case)
    return case, value, gradients(value, case.leaves("student"))


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
    assert_near(value.detach(), wanted.detach(), TOLERANCE[dtype], term)
    found = gradients(value, typed.leaves("student"))
    assert_same_gradients(found, wanted_gradients, TOLERANCE[dtype])


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
    leaves = case.leaves("student")
    assert_same_gradients(gradients(total, leaves), gradients(wanted, leaves), tolerance=1e-9)


@pytest.mark.parametrize("name", GOALS)
def test_no_image_is_compared_with_another_of_its_batch(name):
    """The loss and its gradients are the mean of those of each image by itself."""
    case, goal = make("two local sizes", 3, seed=2), GOALS[name]

    def found_of(images: slice) -> tuple[Tensor, dict]:
        own = case.to(torch.float64, images)
        total, _, _ = goal(*own.views(), own.centres, TEACHER_TEMP)
        return total.detach(), gradients(total, own.leaves("student"))

    whole, wanted = found_of(slice(None))
    totals, alone = zip(*(found_of(slice(b, b + 1)) for b in range(3)), strict=True)
    assert_near(sum(totals) / 3, whole, 1e-12, "total")
    joined = {
        leaf: None if parts[0] is None else sum(parts) / 3 if "W_" in leaf else torch.cat(parts) / 3
        for leaf in wanted
        for parts in [[found[leaf] for found in alone]]
    }
    assert_same_gradients(joined, wanted, 1e-11)


def test_a_bag_of_one_instance_is_an_image():
    """Then L_S is L_I, value and gradient, and so is L_T against an image's centre."""
    case = make("two local sizes", 2)
    student, teacher = case.views()
    for views in (student, teacher):
        rows = views.image_embeddings[:, None]
        counts = [len(patches) for patches in views.patch_features]
        views.instance_embeddings = list(rows.split(counts))
        views.log_attention = [part.new_zeros(len(part), 1) for part in views.instance_embeddings]
    wanted = intra.image_loss(student, teacher, case.centres.image, *TEMPS)[0]
    leaves = case.leaves("student")
    wanted_gradients = gradients(wanted, leaves)
    for term in (inter.student_loss, inter.teacher_loss):
        found = term(student, teacher, case.centres.image, *TEMPS)
        assert_near(found.detach(), wanted.detach(), 1e-12, term.__name__)
        assert_same_gradients(gradients(found, leaves), wanted_gradients, 1e-11)


def test_attention_goes_to_the_instance_that_says_what_the_teacher_sees():
    """Of a bag's instances one is the image's prototype, the others are another's."""
    axes = torch.eye(6)
    instances = axes[[1, 2, 1, 0, 1]][None].repeat(4, 1, 1)
    log_attention = torch.full((4, 5), 0.2).log().requires_grad_()
    student = Views(
        2,
        axes[[0, 0, 0, 0]],
        axes,
        log_attention=[log_attention],
        instance_embeddings=[instances],
        patch_features=[instances],
    )
    teacher = Views(2, axes[[0, 0, 0, 0]], axes)
    inter.student_loss(student, teacher, torch.zeros(6), *TEMPS).backward()
    share = -log_attention.grad / -log_attention.grad.sum(dim=1, keepdim=True)
    assert (share[:, 3] > 0.99).all()


def chunks_of(monkeypatch, elements: int) -> None:
    """Let the cross-entropy's chunks have this many elements, however few rows that is."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": elements})
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 1)


@pytest.mark.parametrize("chunk", [1, 100, 330, 870])
@pytest.mark.parametrize("term", TERMS)
def test_chunks_change_nothing(term, chunk, monkeypatch):
    case, wanted, wanted_gradients = plain_term(term, "two local sizes", 3)
    chunks_of(monkeypatch, chunk)
    value = TERMS[term][0](*case.views(), case.centres)
    assert_near(value.detach(), wanted.detach(), 1e-12, term)
    found = gradients(value, case.leaves("student"))
    assert_same_gradients(found, wanted_gradients, tolerance=1e-11)


@pytest.mark.parametrize(("mib", "chunks"), [(0, 8), (1, 17)])
def test_a_matrix_of_a_chunk_has_as_many_mebibytes_as_the_option_says(mib, chunks):
    """Of K = 2^13, 32 rows to a MiB: L_R has 96 targets and 120 students, L_I 6 and 12, L_T 96 and
    12; L_S takes the targets of its bags, two of 16 instances to 32 rows, eight of 4."""
    run = pretraining(small_config(HEAD__OUT_DIM=2**13, LOSS__CHUNK_MIB=mib, CMD__LT=True))
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


def test_gradcheck_of_the_attention():
    torch.manual_seed(0)
    pool = GatedAttention(7, hidden=4).double()
    nn.init.normal_(pool.score.weight)
    patches = torch.randn(4, 6, 7, dtype=torch.float64, requires_grad=True)

    def attention(patches: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(pool.named_parameters()), parameters, strict=True))
        return functional_call(pool, named, (patches,))

    assert torch.autograd.gradcheck(attention, (patches, *pool.parameters()))


# --- Where gradients go

REACHES = {
    "L_I": {"student.images", "student.W_I"},
    "L_R": {"student.patches", "student.W_R"},
    "L_S": {"student.instances", "student.attention", "student.W_I"},
    "L_T": {"student.images", "student.W_I"},
    "T": set(),
    "S": {"student.images", "student.W_I", "student.patches", "student.W_R"},
}


def reached_by(value: Tensor, leaves: dict[str, Tensor]) -> set[str]:
    """Kinds of leaves with a gradient that is not exactly zero."""
    found = gradients(value, leaves)
    names = [name for name, gradient in found.items() if gradient is not None and gradient.any()]
    return {name.split("[")[0] for name in names}


@pytest.mark.parametrize("term", TERMS)
def test_a_term_reaches_what_it_trains_and_nothing_of_the_teacher(term):
    case = make("two local sizes", 3)
    value = TERMS[term][0](*case.views(), case.centres)
    assert reached_by(value, case.leaves()) == REACHES[term]


@pytest.mark.parametrize("term", ["L_I", "L_R", "L_S", "L_T", "S"])
def test_a_student_term_reaches_every_crop(term):
    case = make("two local sizes", 2)
    found = gradients(TERMS[term][0](*case.views(), case.centres), case.leaves())
    kinds = REACHES[term] - {"student.W_I", "student.W_R"}
    for kind, view in itertools.product(kinds, range(len(case.student.images))):
        assert found[f"{kind}[{view}]"].any(), f"{kind} of crop {view}"


HEADS = HeadSpec(out_dim=64, hidden_dim=96, bottleneck_dim=32, pool_hidden=16)
MODULES_REACHED = {
    "L_I": {"backbone", "head"},
    "L_R": {"backbone", "head_dense"},
    "L_S": {"backbone", "head", "pool"},
    "L_T": {"backbone", "head"},
    "T": set(),
    "S": {"backbone", "head", "head_dense"},
}


def random_crops(batch: int, seed: int) -> list[Tensor]:
    """Two image-level crops of 32 pixels, two local ones of 16."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, size, size, generator=generator) for size in (32, 32, 16, 16)]


@pytest.fixture(scope="module")
def network_pair() -> tuple[Network, Network]:
    """A student whose attention is uneven, and a teacher whose weights do want gradients."""
    spec = BackboneSpec("vit_small", 48, (2,), (3,), patch_size=8, img_size=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Network(build_backbone(spec, drop_path=0.1), HEADS, True, True)
        teacher = Network(build_backbone(spec), HEADS, True, True)
        for network in (student, teacher):
            nn.init.normal_(network.pool.score.weight)
    return student, teacher


@pytest.mark.parametrize("term", TERMS)
def test_a_term_reaches_its_modules_through_the_networks(term, network_pair):
    student, teacher = network_pair
    crops = random_crops(3, seed=0)
    views = student(crops), teacher(crops[:2])
    centres = Centres(HEADS.out_dim, bag=True)
    leaves = dict(student.named_parameters()) | {
        f"teacher.{name}": parameter for name, parameter in teacher.named_parameters()
    }
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = gradients(TERMS[term][0](*views, centres), trained)
    reached = {name.split(".")[0] for name, g in found.items() if g is not None and g.any()}
    assert reached == MODULES_REACHED[term]


# --- Whole training steps


def trained(steps: int = 4, **options) -> tuple[Pretraining, list[dict[str, Tensor]]]:
    """A run after some steps, and each step's figures."""
    run = pretraining(small_config(**options))
    batches = iter([batch_of(random_crops(3, seed)) for seed in range(steps)])
    return run, [run.train_step(batches)[0] for _ in range(steps)]


def without_pooling(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("pool.")}


def figures_of(figures: list[dict[str, Tensor]], *terms: str) -> Tensor:
    return torch.stack([each[term] for each in figures for term in terms])


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope="module")
def esvit() -> tuple[Pretraining, list[dict[str, Tensor]]]:
    return trained(LOSS__OBJECTIVE="esvit")


@pytest.mark.parametrize("ls", [False, True])
@pytest.mark.parametrize("lt", [False, True])
def test_lambda1_zero_is_esvit(ls, lt, esvit):
    """Bit for bit over four steps with drop path, but for the pooling: no term changes a draw."""
    reference, reference_figures = esvit
    run, figures = trained(CMD__LAMBDA1=0.0, CMD__LS=ls, CMD__LT=lt)
    for ours, theirs in ((run.student, reference.student), (run.teacher, reference.teacher)):
        assert differing(without_pooling(ours.state_dict()), theirs.state_dict()) == []
    for kind in ("image", "region"):
        assert torch.equal(getattr(run.carried, kind), getattr(reference.carried, kind))
    both = ("loss", "L_I", "L_R")
    assert torch.equal(figures_of(figures, *both), figures_of(reference_figures, *both))
    assert (run.student.pool is None) == (run.teacher.pool is None) == (not ls and not lt)


@pytest.mark.parametrize("on", ["LS", "LT"])
def test_each_inter_level_term_moves_the_networks(on, esvit):
    """The counterpart of the test above; without L_S the attention stays even."""
    run, _ = trained(**{"CMD__LS": on == "LS", "CMD__LT": on == "LT"})
    moved = differing(without_pooling(run.student.state_dict()), esvit[0].student.state_dict())
    assert any(name.startswith("backbone.") for name in moved)
    assert any(name.startswith("head.") for name in moved)
    assert bool(run.student.pool.score.weight.any()) == (on == "LS")


def test_the_teacher_s_pooling_is_the_average_of_the_student_s():
    run = pretraining(small_config(TRAIN__MOMENTUM_TEACHER=0.6))
    student, teacher = run.student.pool.state_dict(), run.teacher.pool.state_dict()
    average = {name: value.clone() for name, value in student.items()}
    for seed in range(3):
        momentum = run.schedules.at(run.step, 0).momentum
        run.train_step(iter([batch_of(random_crops(3, seed))]))
        for name, value in student.items():
            average[name] = momentum * average[name] + (1 - momentum) * value
    for name, value in teacher.items():
        assert_near(value, average[name], 1e-6, name, scale=1e-3)
    assert set(differing(student, teacher)) >= {"tanh.weight", "gate.weight", "score.weight"}


SETTINGS = {
    "dino": {"LOSS__OBJECTIVE": "dino"},
    "esvit": {"LOSS__OBJECTIVE": "esvit"},
    "released": {"LOSS__OBJECTIVE": "released"},
    "cmd": {"CMD__LT": True},
    "cmd, g trained": {"HEAD__NORM_LAST_LAYER": False},
    "cmd, no L_T": {},
    "cmd, a single image": {"TRAIN__BATCH_SIZE_PER_GPU": 1},
    "cmd, no L_S": {"CMD__LS": False, "CMD__LT": True},
    "cmd, neither": {"CMD__LS": False, "CMD__LT": False},
    "cmd, lambda1 0": {"CMD__LAMBDA1": 0.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_trainable_parameter_gets_a_gradient_and_no_other(name):
    """DDP waits for each; a bias of the score alone may be zero: softmax does not see it."""
    cfg = small_config(**SETTINGS[name])
    run = pretraining(cfg)
    if run.student.pool is not None:
        nn.init.normal_(run.student.pool.score.weight)  # at zero nothing reaches what is behind it
    student, teacher = run.forward(random_crops(cfg.TRAIN.BATCH_SIZE_PER_GPU, seed=5))
    total, _, _ = run.objective(student, teacher, run.carried, 0.04)
    total.backward()
    if run.student.pool is not None:
        assert {p.requires_grad for p in run.student.pool.parameters()} == {cfg.CMD.LS}
    for parameter_name, parameter in run.student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
        silent = parameter_name == "pool.score.bias" or cfg.CMD.LAMBDA1 == 0
        if parameter.requires_grad and not (silent and parameter_name.startswith("pool.")):
            assert parameter.grad.any(), parameter_name
        assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name
    assert all(parameter.grad is None for parameter in run.teacher.parameters())


def test_pooling_and_region_head_are_built_only_where_they_are_used():
    built = {
        name: {(each.head_dense is not None, each.pool is not None) for each in pair}
        for name in SETTINGS
        for pair in [build.networks(small_config(**SETTINGS[name]))]
    }
    plain_settings = {"dino": (False, False), "esvit": (True, False), "released": (True, False)}
    plain_settings["cmd, neither"] = (True, False)
    assert built == {name: {plain_settings.get(name, (True, True))} for name in SETTINGS}


def test_dino_is_l_i_alone_with_weight_one(esvit):
    run, figures = trained(1, LOSS__OBJECTIVE="dino")
    assert run.objective(*run.forward(random_crops(3, 7)), run.carried, 0.04)[1].keys() == {"L_I"}
    assert torch.equal(figures[0]["loss"], figures[0]["L_I"])
    assert torch.equal(figures[0]["L_I"], esvit[1][0]["L_I"])


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
        for name, mean in plain.mean_logits(case.teacher).items():
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
    if GOALS[name].name == "cmd" and GOALS[name].lt:
        wanted.add("bag")
    assert set(centres.state_dict()) == wanted
    assert not any(value.any() for value in centres.state_dict().values())


def test_a_training_step_updates_the_centres_once_and_after_the_loss():
    """Two micro-batches, seen by the teacher as it was before the step and from centres of zero."""
    run = pretraining(small_config(MODEL__DROP_PATH=0.0, TRAIN__ACCUM_STEPS=2, CMD__LT=True))
    micro = [random_crops(3, seed) for seed in (0, 1)]
    means, losses = [], []
    for crops in micro:
        student, teacher = run.forward(crops)
        total, _, _ = run.objective(student, teacher, run.objective.make_centres(64), 0.04)
        losses.append(total.detach())
        kinds = {
            "image": (teacher.image_embeddings, teacher.image_prototypes),
            "region": (teacher.patch_embeddings[0].flatten(0, 1), teacher.region_prototypes),
            "bag": (teacher.instance_embeddings[0].flatten(0, 1), teacher.image_prototypes),
        }
        means.append({kind: (rows @ w.T).mean(0).detach() for kind, (rows, w) in kinds.items()})
    figures, *_ = run.train_step(iter([batch_of(crops) for crops in micro]))
    assert_near(figures["loss"], torch.stack(losses).mean(), 1e-6, "loss")
    for kind in ("image", "region", "bag"):
        wanted = 0.1 * (means[0][kind] + means[1][kind]) / 2
        assert_near(getattr(run.carried, kind), wanted, 1e-5, kind)


# --- Precision


def wide_case() -> tuple[Views, Views, Centres, dict[str, Tensor]]:
    """float32 Views wide enough that bfloat16 would change matches and logits."""
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
            log_attention=[
                normal(views * batch, n).log_softmax(dim=-1).requires_grad_() for views, n in runs
            ],
            instance_embeddings=[
                F.normalize(normal(views * batch, n, 32), dim=-1).requires_grad_()
                for views, n in runs
            ],
        )

    student, teacher = views([(2, 49), (2, 9)]), views([(2, 49)])
    centres = Centres(100, bag=True)
    for centre in centres.buffers():
        centre.copy_(normal(100) / 20)
    leaves = {
        "images": student.image_embeddings,
        "instances": student.instance_embeddings[0],
        "attention": student.log_attention[0],
        "W_I": student.image_prototypes,
        "W_R": student.region_prototypes,
        "patches": student.patch_embeddings[0],
    }
    return student, teacher, centres, leaves


@pytest.mark.parametrize("term", TERMS)
def test_under_autocast_a_term_of_float32_embeddings_stays_float32(term):
    """Products may round their inputs (fast_products); values, matches and results do not."""
    student, teacher, centres, leaves = wide_case()
    ours = TERMS[term][0]
    wanted = ours(student, teacher, centres)
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(student, teacher, centres)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5)
    found, reference = gradients(value, leaves), gradients(wanted, leaves)
    for name, gradient in reference.items():
        if gradient is not None:
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


def test_under_autocast_attention_stays_float32():
    torch.manual_seed(0)
    pool, patches = GatedAttention(32, 16), F.normalize(torch.randn(4, 9, 32), dim=-1)
    nn.init.normal_(pool.score.weight)
    wanted = pool(patches)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool(patches), wanted)


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


@pytest.mark.parametrize("term", ["L_I", "L_R", "L_S", "L_T"])
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


@pytest.mark.parametrize("term", ["L_I", "L_R", "L_S", "L_T"])
def test_no_tensor_is_larger_than_a_chunk(term, monkeypatch):
    """5 rows, fewer than any term has, and the prototypes' own 5 columns, are the largest; L_S
    takes whole bags, of 6 instances."""
    views, largest = make("local crops", 3, prototypes=MANY).views(), {}
    centres = make("local crops", 3, prototypes=MANY).centres
    for rows in (5, 6):
        chunks_of(monkeypatch, rows * MANY)
        with LargestTensor() as mode:
            TERMS[term][0](*views, centres).backward()
        largest[rows] = mode.largest
    assert largest == {5: (6 if term == "L_S" else 5) * MANY, 6: 6 * MANY}


class TensorsAtOnce(TorchDispatchMode):
    """Notes how many storages of so many elements or more are alive at once."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.most = elements, 0
        self._made: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._made += [weakref.ref(leaf) for leaf in leaves if leaf.numel() >= self.elements]
        alive = [tensor for made in self._made if (tensor := made()) is not None]
        self._made = [weakref.ref(tensor) for tensor in alive]
        self.most = max(self.most, len({t.untyped_storage().data_ptr() for t in alive}))
        return out


@pytest.mark.parametrize("term", ["L_I", "L_R", "L_S", "L_T"])
def test_two_matrices_of_a_chunk_are_held_at_once(term, monkeypatch):
    case = make("local crops", 3, prototypes=MANY)
    views, centres = case.views(), case.centres
    chunks_of(monkeypatch, 6 * MANY)
    with TensorsAtOnce(6 * MANY) as mode:
        TERMS[term][0](*views, centres).backward()
    assert mode.most == 2


def test_targets_of_bags_of_one_instance_take_no_more_than_a_chunk(monkeypatch):
    """A bag then has more targets than instances."""
    case, (matches, weights) = make("no local crops", 2, prototypes=MANY), drawn_matches(8, 3, 4)
    student, teacher = case.views()
    targets = image_targets(teacher, case.centres.image, TEACHER_TEMP)
    bags = F.normalize(torch.randn(8, 1, 5, dtype=torch.float64), dim=-1)
    chunks_of(monkeypatch, 6 * MANY)
    with LargestTensor() as mode:
        mixture_cross_entropy(
            bags,
            torch.zeros_like(bags[..., 0]),
            student.image_prototypes,
            STUDENT_TEMP,
            targets,
            matches,
            weights,
        )
    assert mode.largest == 6 * MANY


@pytest.mark.parametrize("wrong", ["CMD", "moco_v2"])
def test_an_objective_of_another_name_is_refused(wrong):
    with pytest.raises(ValueError, match="must be one of"):
        Objective(wrong)
