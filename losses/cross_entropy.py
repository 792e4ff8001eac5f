"""Cross-entropy of students against soft targets over K prototypes, in chunks.

Every CMD term but one is of this form. The plain computation holds a [rows, K] matrix for
each student, each target and each gradient; this one holds two for one chunk of images and
never gathers a target, because targets meet students only in inner products. With A[s, t]
the weight of teacher row t in the target of student row s, q_t the teacher's distributions
and z_s = W e_s / tau the student's logits:

    loss    = sum_s w_s logsumexp(z_s) - sum_st A_st q_t . z_s          (w_s = sum_t A_st)
            = sum_s w_s logsumexp(z_s) - sum_s (A (q W))_s . e_s / tau
    dE      = ( w * softmax(z) W - A (q W) ) / tau
    dW      = ( softmax(z)^T (w * E) - q^T (A^T E) ) / tau

so q enters through q W [T, d] and q^T (A^T E) [K, d] alone. Gradients are made in the forward
pass, where the chunk's matrices exist, and are K x d and rows x d in size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Elements of one [rows, K] matrix of a chunk: 2^25 float32 are 128 MiB.
CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class Targets:
    """Teacher rows as distributions: softmax((embeddings @ prototypes.T - centre) / temperature).

    embeddings [B, T, d]; prototypes [K, d]; centre [K] or None; no gradient reaches them.
    """

    embeddings: Tensor
    prototypes: Tensor
    temperature: float
    centre: Tensor | None = None

    def log_probabilities(self, images: slice = slice(None)) -> Tensor:
        """log q of the chosen images [b, T, K]."""
        logits = self.embeddings[images] @ self.prototypes.T
        if self.centre is not None:
            logits = logits - self.centre
        return torch.log_softmax(logits / self.temperature, dim=-1)


def soft_cross_entropy(
    students: Tensor,
    prototypes: Tensor,
    temperature: float,
    targets: Targets,
    assignment: Tensor,
) -> tuple[Tensor, Tensor]:
    """sum_{b,s,t} A[b,s,t] CE(q[b,t], softmax(W e[b,s] / temperature)), and the entropy of q.

    students: embeddings [B, S, d]; prototypes: W [K, d]; assignment: A [B, S, T], fixed.
    Returns the loss, a scalar with gradient to students and prototypes, and the targets'
    entropies [B, T] in nats, without gradient. float32 (or float64 throughout), whatever
    autocast says: half-precision logits are too coarse at a teacher's temperature.
    """
    with torch.autocast(students.device.type, enabled=False):
        students, prototypes = _at_least_float32(students), _at_least_float32(prototypes)
        frozen = Targets(
            _at_least_float32(targets.embeddings.detach()),
            _at_least_float32(targets.prototypes.detach()),
            targets.temperature,
            None if targets.centre is None else targets.centre.detach(),
        )
        return _SoftCrossEntropy.apply(
            students, prototypes, temperature, frozen, assignment.detach().to(students.dtype)
        )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _SoftCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx,
        students: Tensor,
        prototypes: Tensor,
        temperature: float,
        targets: Targets,
        assignment: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wants_students, wants_prototypes = ctx.needs_input_grad[:2]
        batch, rows = students.shape[:2]
        widest = max(rows, targets.embeddings.shape[1]) * len(prototypes)
        step = max(1, CHUNK_ELEMENTS // widest)
        loss = students.new_zeros(())
        entropies = []
        grad_students = torch.empty_like(students) if wants_students else None
        grad_prototypes = torch.zeros_like(prototypes) if wants_prototypes else None

        for first in range(0, batch, step):
            chunk = slice(first, first + step)
            embeddings, weights = students[chunk], assignment[chunk]
            row_weight = weights.sum(-1, keepdim=True)

            log_q = targets.log_probabilities(chunk)
            q = log_q.exp()
            entropies.append(-(q * log_q).sum(-1))
            del log_q
            pulled = weights @ (q @ prototypes)

            logits = embeddings @ prototypes.T / temperature
            log_normaliser = logits.logsumexp(-1, keepdim=True)
            loss += (row_weight * log_normaliser).sum() - (pulled * embeddings).sum() / temperature
            if not (wants_students or wants_prototypes):
                continue
            p = logits.sub_(log_normaliser).exp_()
            if wants_students:
                grad_students[chunk] = row_weight * (p @ prototypes) - pulled
            if wants_prototypes:
                grad_prototypes.addmm_(p.flatten(0, 1).T, (row_weight * embeddings).flatten(0, 1))
                grad_prototypes.addmm_(
                    q.flatten(0, 1).T, (weights.mT @ embeddings).flatten(0, 1), alpha=-1
                )

        ctx.save_for_backward(
            *(None if g is None else g.div_(temperature) for g in (grad_students, grad_prototypes))
        )
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, _grad_entropy: Tensor):
        return (
            *(None if g is None else g * grad_loss for g in ctx.saved_tensors),
            None,
            None,
            None,
        )
