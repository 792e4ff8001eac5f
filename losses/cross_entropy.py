"""Cross-entropy of students against soft targets over K prototypes, in chunks.

L_I and L_R are of this form. The plain computation holds a [rows, K] matrix for each student, each
target and each gradient; this one holds two for one chunk of rows and never gathers a target,
because targets meet students only in inner products. With w_sm the weight of the m-th match
t(s, m) of student row s, q_t the teacher's distributions, z_s = W e_s / tau the student's logits
and r_s = sum_m w_sm:

    loss = sum_s r_s logsumexp(z_s) - sum_sm w_sm q_t(s,m) . z_s
         = sum_s r_s logsumexp(z_s) - sum_s pulled_s . e_s / tau
    dE   = ( r * softmax(z) W - pulled ) / tau
    dW   = ( softmax(z)^T (r * E) - q^T pushed ) / tau

with pulled_s = sum_m w_sm (q W)_t(s,m) and pushed_t = the sum of w_sm e_s over all t(s,m) = t. So
q enters through q W [T, d] and q^T pushed [K, d] alone, and teachers and students go through
the prototypes once each, one chunk after the other. Gradients are made in the forward pass, where
the chunk's matrices exist, and are K x d and rows x d in size.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Elements of one [rows, K] matrix of a chunk where LOSS.CHUNK_MIB is 0. On a CPU 32 MiB of float32,
# which its caches about hold; elsewhere 256 MiB (docs/speed.md says why).
CHUNK_ELEMENTS = {"cpu": 2**23, "accelerator": 2**26}
# Fewer rows than this make a product so thin that reading the prototypes is all it does.
LEAST_ROWS = 32
# Below this temperature a logit's rounding shows in the distribution even under autocast.
LEAST_FAST_TEMPERATURE = 0.02


@dataclass(frozen=True)
class Targets:
    """Teacher rows as distributions: softmax((embeddings @ prototypes.T - centre) / temperature).

    embeddings [..., d]; prototypes [K, d]; centre [K] or None; no gradient reaches them.
    """

    embeddings: Tensor
    prototypes: Tensor
    temperature: float
    centre: Tensor | None = None

    def log_probabilities(self) -> Tensor:
        """log q [..., K], all at once: for few rows."""
        return torch.log_softmax(self.logits(self.embeddings), dim=-1)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Centred logits over the temperature [..., K] of rows [..., d] of this teacher."""
        logits = (embeddings / self.temperature) @ self.prototypes.T
        return logits if self.centre is None else logits.sub_(self.centre / self.temperature)


def soft_cross_entropy(
    students: Tensor,
    prototypes: Tensor,
    temperature: float,
    targets: Targets,
    matches: Tensor,
    weights: Tensor,
    chunk_mib: int = 0,
    entropies: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """sum_{s,m} w[s,m] CE(q[t[s,m]], softmax(W e[s] / temperature)), and the entropy of q.

    students: embeddings [S, d]; prototypes: W [K, d]; targets: of T rows; matches: t [S, M],
    int64, rows of the targets; weights: w [S, M], fixed; chunk_mib: LOSS.CHUNK_MIB. Returns the
    loss, a scalar with gradient to students and prototypes, and the targets' entropies [T] in
    nats, without gradient; None in their place where `entropies` is false. All is float32 (or
    float64 throughout), whatever autocast says: half-precision logits are too coarse at a teacher's
    temperature. Under autocast the products' inputs may be rounded (see `fast_products`).
    """
    device = students.device.type
    grad_students, grad_prototypes = torch.empty_like(students), torch.zeros_like(prototypes)
    with torch.no_grad(), fast_products(device, min(temperature, targets.temperature)):
        step = max(LEAST_ROWS, chunk_elements(device, chunk_mib) // len(prototypes))
        rows = targets.embeddings
        buffers = _Buffers(min(step, max(len(rows), len(students))), prototypes)

        # The teacher's rows: q W, q^T pushed and the entropies.
        measured = rows.new_empty(len(rows)) if entropies else None
        scaled, target_means = rows / targets.temperature, torch.empty_like(rows)
        offset = None if targets.centre is None else targets.centre / targets.temperature
        pushed = torch.zeros_like(rows)
        for match, weight in zip(matches.unbind(1), weights.unbind(1), strict=True):
            pushed.index_add_(0, match, weight[:, None] * students)
        for chunk in _chunks(len(rows), step):
            logits = buffers.logits(scaled[chunk], targets.prototypes)
            if offset is not None:
                logits.sub_(offset)
            q = buffers.softmax(logits)
            if measured is not None:
                normaliser = _logsumexp(logits, q)
                measured[chunk] = normaliser - logits.mul_(q).sum(-1)
            torch.mm(q, prototypes, out=target_means[chunk])
            grad_prototypes.addmm_(q.T, pushed[chunk], alpha=-1)

        # The student's.
        totals = weights.sum(1)
        pulled = torch.zeros_like(students)
        for match, weight in zip(matches.unbind(1), weights.unbind(1), strict=True):
            pulled.addcmul_(weight[:, None], target_means[match])
        loss = -(pulled * students).sum() / temperature
        scaled, weighted = students / temperature, totals[:, None] * students
        for chunk in _chunks(len(students), step):
            logits = buffers.logits(scaled[chunk], prototypes)
            p = buffers.softmax(logits)
            loss += totals[chunk] @ _logsumexp(logits, p)
            torch.mm(p, prototypes, out=grad_students[chunk])
            grad_prototypes.addmm_(p.T, weighted[chunk])
        grad_students.mul_(totals[:, None]).sub_(pulled).div_(temperature)
        grad_prototypes.div_(temperature)

    gradients = grad_students, grad_prototypes
    return _GivenGradients.apply(loss, gradients, students, prototypes), measured


class _GivenGradients(Function):
    """The loss, a scalar, as a function of inputs whose gradients were made with it.

    They serve one backward pass, for it scales them in place, K x d being large; another is a
    RuntimeError.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("this loss keeps its gradients for one backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(grad_loss) for gradient in gradients)


@contextlib.contextmanager
def fast_products(device: str, temperature: float) -> Iterator[None]:
    """Within it autocast is off; where it was on, products of float32 may round their inputs.

    For logits of LEAST_FAST_TEMPERATURE or warmer. Results stay float32. Inputs are rounded to
    TF32 (11 significant bits) on a GPU, to bfloat16 (8) on a CPU with matrix instructions for
    it (AMX); on another CPU nothing is rounded, and oneDNN's float32 product is used, which is
    often the faster one. Between unit vectors, rounding inputs moves a logit by about 1e-4
    (bfloat16), where half-precision results would move it by thirty times that; with trained
    magnitudes (HEAD.NORM_LAST_LAYER false) both grow with them.
    """
    fast = torch.is_autocast_enabled(device) and temperature >= LEAST_FAST_TEMPERATURE
    with torch.autocast(device, enabled=False):
        if not fast:
            yield
            return
        backend, kind = torch.backends.mkldnn.matmul, "bf16"
        if device == "cuda":
            backend, kind = torch.backends.cuda.matmul, "tf32"
        before = backend.fp32_precision
        backend.fp32_precision = kind
        try:
            yield
        finally:
            backend.fp32_precision = before


def chunk_elements(device: str, mib: int) -> int:
    """Elements of one [rows, K] matrix of a chunk on a device of this type; mib: LOSS.CHUNK_MIB."""
    return mib * 2**18 or CHUNK_ELEMENTS["cpu" if device == "cpu" else "accelerator"]


def _chunks(rows: int, step: int) -> list[slice]:
    return [slice(first, first + step) for first in range(0, rows, step)]


class _Buffers:
    """The two [rows, K] matrices of a chunk, used again for the next one.

    On a CPU fresh memory of this size costs as much as what is computed in it; elsewhere the
    allocator keeps it. rows: of the largest chunk. A larger matrix made later would stand beside
    the one that it replaces.
    """

    def __init__(self, rows: int, prototypes: Tensor) -> None:
        self._logits, self._softmax = (
            prototypes.new_empty(rows, len(prototypes)) for _ in range(2)
        )

    def logits(self, embeddings: Tensor, prototypes: Tensor) -> Tensor:
        """embeddings [r, d] @ prototypes.T [d, K]."""
        return torch.mm(embeddings, prototypes.T, out=self._logits[: len(embeddings)])

    def softmax(self, logits: Tensor) -> Tensor:
        """softmax(logits) [r, K]."""
        return torch.softmax(logits, dim=-1, out=self._softmax[: len(logits)])


def _logsumexp(logits: Tensor, probabilities: Tensor) -> Tensor:
    """logsumexp(logits) [r], given their softmax [r, K]."""
    # Of the largest logit z: log p = z - logsumexp, and p is at least 1 / K.
    return logits.amax(-1) - probabilities.amax(-1).log()
