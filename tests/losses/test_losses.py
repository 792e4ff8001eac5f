"""Every term of the objective against plain_losses; gradients, precision, memory."""

import functools
import itertools
import math
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
from losses.objective import Contrastive, Objective
from losses.targets import Centres, image_targets
from models.mil import GatedAttention
from models.network import Network
from tests.losses import plain_losses as plain
from tests.losses.loss_cases import (
    GOALS,
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
from tests.runs import batch_of, pretraining, random_crops, small_config
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
    assert_same_gradients(gradients(value, typed.leaves()), wanted_gradients, TOLERANCE[dtype])


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


def test_attention_goes_to_the_instance_that_only_its_own_image_has():
    """Of a bag's five, one is in the teacher's embedding of its own image alone, two are in every
    image's, two in none's."""
    axes = torch.eye(6)
    instances = axes[torch.tensor([[2, 3, own, 4, 5] for own in (0, 1, 0, 1)])]
    teacher = Views(2, F.normalize(axes[[0, 1, 0, 1]] + axes[[2]] + axes[[3]], dim=1))
    log_attention = torch.full((4, 5), 0.2).log().requires_grad_()
    student = Views(2, axes[:4], log_attention=[log_attention], instance_embeddings=[instances])
    inter.student_loss(student, teacher, STUDENT_TEMP).backward()
    asked = -log_attention.grad
    assert (asked[:, 2] > 0).all()
    assert (asked[:, [0, 1, 3, 4]] < 0).all()


def test_what_recognises_its_image_loses_nothing_and_what_confuses_two_loses_the_most():
    axes, shares = torch.eye(4), torch.zeros(4, 1)
    teacher = Views(2, axes[[0, 1, 0, 1]])

    def loss(rows: list[int]) -> float:
        bags = axes[rows][:, None]
        student = Views(2, axes, log_attention=[shares], instance_embeddings=[bags])
        return float(inter.student_loss(student, teacher, 0.01))

    assert loss([0, 1, 0, 1]) == 0
    assert loss([2, 2, 3, 3]) == pytest.approx(math.log(2))
    assert loss([1, 0, 1, 0]) == pytest.approx(100)


def chunks_of(monkeypatch, elements: int) -> None:
    """Let the cross-entropy's chunks have this many elements, however few rows that is."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": elements})
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 1)


@pytest.mark.parametrize("chunk", [1, 100, 330, 870])
@pytest.mark.parametrize("term", ["L_I", "L_R"])
def test_chunks_change_nothing(term, chunk, monkeypatch):
    case, wanted, wanted_gradients = plain_term(term, "two local sizes", 3)
    chunks_of(monkeypatch, chunk)
    value = TERMS[term][0](*case.views(), case.centres)
    assert_near(value.detach(), wanted.detach(), 1e-12, term)
    assert_same_gradients(gradients(value, case.leaves()), wanted_gradients, tolerance=1e-11)


@pytest.mark.parametrize(
    ("prototypes", "mib", "chunks"), [(2**13, 0, 4), (2**13, 1, 9), (2**14, 1, 9)]
)
def test_a_matrix_of_a_chunk_has_as_many_mebibytes_as_the_option_says(prototypes, mib, chunks):
    """Of K = 2^13, 32 rows to a MiB: L_R has 96 targets and 120 students, L_I 6 and 12. Of 2^14 it
    would be 16 rows: no chunk has less than 32."""
    run = pretraining(small_config(HEAD__OUT_DIM=prototypes, LOSS__CHUNK_MIB=mib))
    with torch.no_grad():
        student, teacher = run.forward(random_crops(3, seed=0))
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


@pytest.mark.parametrize("moving", ["students", "prototypes", "both"])
def test_matches_give_a_weighted_sum_of_cross_entropies(moving, monkeypatch):
    """Students and targets of unlike number, one a chunk, a gradient from above that is not 1."""
    chunks_of(monkeypatch, 1)
    case, (matches, weights) = make("no local crops", 2), drawn_matches(6, 3, targets=8)
    students, rows = unit_rows(6, 5, 0).double(), unit_rows(8, 5, 1).double()
    own, other = case.student.image_prototypes, case.teacher.image_prototypes
    students.requires_grad_(moving != "prototypes")
    own.requires_grad_(moving != "students")
    targets = Targets(rows, other, TEACHER_TEMP, case.centres.image)
    q = [plain.softmax((other @ row - case.centres.image) / TEACHER_TEMP).detach() for row in rows]
    wanted = 0
    for s, m in itertools.product(range(6), range(3)):
        log_p = plain.log_softmax(own @ students[s] / STUDENT_TEMP)
        wanted = wanted + weights[s, m] * plain.cross_entropy(q[matches[s, m]], log_p)
    given = students, own, STUDENT_TEMP, targets, matches, weights
    loss, entropy = soft_cross_entropy(*given)
    assert_near(loss.detach(), wanted.detach(), 1e-12, "loss")
    entropies = torch.stack([plain.cross_entropy(row, row.log()) for row in q])
    assert_near(entropy, entropies, 1e-12, "entropy")
    again = soft_cross_entropy(*given, entropies=False)
    assert torch.equal(again[0], loss)
    assert again[1] is None
    leaves = {"students": students, "prototypes": own, "teacher's": other}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
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


def test_gradcheck_of_the_attention():
    torch.manual_seed(0)
    pool = GatedAttention(7, hidden=4).double()
    nn.init.normal_(pool.score.weight)
    patches = torch.randn(4, 6, 7, dtype=torch.float64, requires_grad=True)

    def attention(patches: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(pool.named_parameters()), parameters, strict=True))
        return functional_call(pool, named, (patches,))

    assert torch.autograd.gradcheck(attention, (patches, *pool.parameters()))


# --- Whole training steps


def trained(steps: int = 4, **options) -> tuple[Pretraining, list[dict[str, Tensor]]]:
    """A run after some steps, and each step's figures."""
    run = pretraining(small_config(**options))
    batches = iter([batch_of(random_crops(3, seed)) for seed in range(steps)])
    return run, [run.train_step(batches)[0] for _ in range(steps)]


def without_inter_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """But for the parts that only inter-level terms have."""
    return {k: value for k, value in state.items() if not k.startswith(("pool.", "head_bag."))}


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
        assert differing(without_inter_parts(ours.state_dict()), theirs.state_dict()) == []
    for kind in ("image", "region"):
        assert torch.equal(getattr(run.carried, kind), getattr(reference.carried, kind))
    both = ("loss", "L_I", "L_R")
    assert torch.equal(figures_of(figures, *both), figures_of(reference_figures, *both))
    assert (run.student.pool is None) == (run.teacher.pool is None) == (not ls and not lt)


@pytest.mark.parametrize("on", ["LS", "LT"])
def test_each_inter_level_term_moves_the_networks(on, esvit):
    """The counterpart of the test above; without L_S the attention stays even."""
    run, _ = trained(**{"CMD__LS": on == "LS", "CMD__LT": on == "LT"})
    moved = differing(without_inter_parts(run.student.state_dict()), esvit[0].student.state_dict())
    assert any(name.startswith("backbone.") for name in moved)
    assert any(name.startswith("head.") for name in moved)
    assert bool(run.student.pool.score.weight.any()) == (on == "LS")


SETTINGS = {
    "dino": {"LOSS__OBJECTIVE": "dino"},
    "esvit": {"LOSS__OBJECTIVE": "esvit"},
    "released": {"LOSS__OBJECTIVE": "released"},
    "cmd": {},
    "cmd, g trained": {"HEAD__NORM_LAST_LAYER": False},
    "cmd, no L_T": {"CMD__LT": False},
    "cmd, a single image": {"TRAIN__BATCH_SIZE_PER_GPU": 1},
    "cmd, no L_S": {"CMD__LS": False},
    "cmd, neither": {"CMD__LS": False, "CMD__LT": False},
    "cmd, lambda1 0": {"CMD__LAMBDA1": 0.0},
}


# Region head, pooling, bag head; all other settings have the first two.
PARTS = {
    "dino": (False, False, False),
    "esvit": (True, False, False),
    "released": (True, False, False),
    "cmd, neither": (True, False, False),
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
        # Among one image it is recognised already.
        off = cfg.CMD.LAMBDA1 == 0 or cfg.TRAIN.BATCH_SIZE_PER_GPU == 1
        silent = ("pool.", "head_bag.") if off else ("pool.score.bias",)
        if parameter.requires_grad and not parameter_name.startswith(silent):
            assert parameter.grad.any(), parameter_name
        assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name
    assert all(parameter.grad is None for parameter in run.teacher.parameters())


def test_parts_are_built_only_where_they_are_used():
    def parts(network: Network) -> tuple[bool, ...]:
        own = network.head_dense, network.pool, network.head_bag
        return tuple(part is not None for part in own)

    for name, settings in SETTINGS.items():
        wanted = PARTS.get(name, (True, True, settings.get("CMD__LT", True)))
        student, teacher = build.networks(small_config(**settings))
        assert parts(student) == wanted
        assert parts(teacher) == (*wanted[:2], False)
        assert student.embeds_instances == (wanted[1] and settings.get("CMD__LS", True))
        assert not teacher.embeds_instances


def test_dino_is_l_i_alone_with_weight_one(esvit):
    run, figures = trained(1, LOSS__OBJECTIVE="dino")
    assert run.objective(*run.forward(random_crops(3, 7)), run.carried, 0.04)[1].keys() == {"L_I"}
    assert torch.equal(figures[0]["loss"], figures[0]["L_I"])
    assert torch.equal(figures[0]["L_I"], esvit[1][0]["L_I"])


# --- Precision


def wide_case() -> Case:
    """In float32 and wide enough that bfloat16 would change matches and logits."""
    layout = [(2, 49), (2, 9)]
    return make(layout, 4, prototypes=100, width=32, features=48).to(torch.float32)


@pytest.mark.parametrize("term", TERMS)
def test_under_autocast_a_term_of_float32_embeddings_stays_float32(term):
    """Products may round their inputs (fast_products); values, matches and results do not."""
    case, ours = wide_case(), TERMS[term][0]
    wanted = ours(*case.views(), case.centres)
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(*case.views(), case.centres)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5)
    leaves = case.leaves("student")
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
    weights = weights.float()
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
    case = wide_case()
    with torch.autocast("cpu", torch.bfloat16):
        intra.image_loss(*case.views(), case.centres.image, *TEMPS)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    autocast, fast = torch.autocast("cpu", torch.bfloat16), cross_entropy.fast_products("cpu", 0.1)
    with pytest.raises(ZeroDivisionError), autocast, fast:
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


class Precisions(TorchDispatchMode):
    """Notes the precision under which matrices are multiplied on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.rstrip("_").endswith("mm"):
            self.seen.add(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("temps", "fast"), [((0.1, 0.04), True), ((0.1, 0.01), False), ((0.01, 0.04), False)]
)
def test_inputs_of_products_are_rounded_only_where_both_temperatures_are_warm(temps, fast):
    case = make("local crops", 2).to(torch.float32)
    wanted = "bf16" if fast else torch.backends.mkldnn.matmul.fp32_precision
    with torch.autocast("cpu", torch.bfloat16), Precisions() as precisions:
        intra.image_loss(*case.views(), case.centres.image, *temps)
    assert precisions.seen == {wanted}


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


MANY = 2000  # prototypes


class LargeTensors(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation returns, and how many storages of
    so many elements or more are alive at once."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.largest, self.at_once = elements, 0, 0
        self._made: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *(leaf.numel() for leaf in leaves)])
        self._made += [weakref.ref(leaf) for leaf in leaves if leaf.numel() >= self.elements]
        alive = [tensor for made in self._made if (tensor := made()) is not None]
        self._made = [weakref.ref(tensor) for tensor in alive]
        self.at_once = max(self.at_once, len({t.untyped_storage().data_ptr() for t in alive}))
        return out


@pytest.mark.parametrize("rows", [5, 6, 9])
@pytest.mark.parametrize("term", ["L_I", "L_R"])
def test_no_tensor_is_larger_than_a_chunk(term, rows, monkeypatch):
    """5 rows, fewer than any term has, and the prototypes' own 5 columns, are the largest. Of 6
    rows or more two are held at once, also where later chunks are larger: of 9 rows, L_I has 6
    targets."""
    case = make("local crops", 3, prototypes=MANY)
    views = case.views()
    chunks_of(monkeypatch, rows * MANY)
    with LargeTensors(6 * MANY) as mode:
        TERMS[term][0](*views, case.centres).backward()
    assert mode.largest == rows * MANY
    assert mode.at_once == (2 if rows >= 6 else 0)


@pytest.mark.parametrize(
    ("kind", "wrong"), [(Objective, "CMD"), (Objective, "moco_v2"), (Contrastive, "cmd")]
)
def test_an_objective_of_another_name_is_refused(kind, wrong):
    with pytest.raises(ValueError, match=r"LOSS\.OBJECTIVE must be one of"):
        kind(wrong)
