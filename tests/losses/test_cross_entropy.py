"""The cross-entropy over prototypes: matches, chunks, what it holds at once, precision."""

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import cross_entropy, intra
from losses.cross_entropy import Targets, soft_cross_entropy
from losses.targets import image_targets
from tests.losses import plain_losses as plain
from tests.losses.loss_cases import (
    STUDENT_TEMP,
    TEACHER_TEMP,
    TEMPS,
    TERMS,
    assert_near,
    assert_same_gradients,
    gradients,
    make,
    plain_term,
    wide_case,
)
from tests.runs import pretraining, random_crops, small_config


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


def unit_rows(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=-1)


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


# Memory

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


# Precision


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
