"""Cross-entropy of a bag, which is a mixture of its instances, against soft targets.

A bag of N instances e_n with weights a_n has the probability of multiple instance learning,
P(k) = sum_n a_n p_n(k), p_n = softmax(W e_n / tau) over K prototypes. With t the weighted sum of
its targets and z_n the logits,

    loss = -sum_k t(k) log P(k)
    r_n(k) = a_n p_n(k) / P(k),   R_n = sum_k t(k) r_n(k)
    d loss / d z_n(k) = R_n p_n(k) - t(k) r_n(k),   d loss / d log a_n = -R_n

r are the responsibilities of a mixture: attention goes to the instances that answer for the
target, and these learn to say it. About two [rows, K] matrices, of one chunk of bags, are held at
once; gradients are made in the forward pass, where they exist. A chunk is one bag at least,
whatever LOSS.CHUNK_MIB says. A share a_n below e^-80 counts as that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from losses.cross_entropy import (
    Buffers,
    Targets,
    chunk_elements,
    fast_products,
    with_gradients,
)

# Of a share: with a smaller one a bag's distribution could be 0 in float32.
LEAST_LOG_SHARE = -80.0


def mixture_cross_entropy(
    bags: Sequence[tuple[Tensor, Tensor]],
    prototypes: Tensor,
    temperature: float,
    targets: Targets,
    matches: Tensor,
    weights: Tensor,
    chunk_mib: int = 0,
) -> Tensor:
    """sum_{s,m} w[s,m] CE(q[t[s,m]], sum_n a[s,n] softmax(W e[s,n] / temperature)).

    bags: for each number N of instances their embeddings [S_N, N, d] and log a [S_N, N];
    prototypes: W [K, d]; targets: of T rows; matches: t [S, M], int64, of all bags in their order;
    weights: w [S, M], fixed. Returns a scalar with gradient to instances, log a and prototypes. All
    is float32 (or float64 throughout), whatever autocast says; see soft_cross_entropy.
    """
    device = prototypes.device.type
    loss, grad_prototypes = prototypes.new_zeros(()), torch.zeros_like(prototypes)
    rows_of_chunk = chunk_elements(device, chunk_mib) // len(prototypes)
    shapes, moved = [log_weights.shape for _, log_weights in bags], []
    with torch.no_grad(), fast_products(device, min(temperature, targets.temperature)):
        buffers = Buffers(max(max(n, min(rows_of_chunk, s * n)) for s, n in shapes), prototypes)
        counts = [s for s, _ in shapes]
        for (instances, log_weights), *pairs in zip(
            bags, matches.split(counts), weights.split(counts), strict=True
        ):
            grad_instances = torch.empty_like(instances, memory_format=torch.contiguous_format)
            grad_weights = torch.empty_like(log_weights)
            most = max(instances.shape[1], matches.shape[1])  # a bag's rows, student's or targets
            step = max(1, rows_of_chunk // most)
            for first in range(0, len(instances), step):
                chunk = slice(first, first + step)
                e, log_a, match, weight = (part[chunk] for part in (instances, log_weights, *pairs))
                q = targets.logits(targets.embeddings[match.flatten()]).softmax(dim=-1)
                t = torch.einsum("smk,sm->sk", q.unflatten(0, match.shape), weight)
                del q
                rows = e.flatten(0, 1) / temperature
                a = log_a.clamp(min=LEAST_LOG_SHARE).exp()[:, None]  # [s, 1, N]
                logits = buffers.logits(rows, prototypes)
                p = buffers.softmax(logits, log=True).unflatten(0, log_a.shape)
                best = p.amax(dim=1, keepdim=True)  # over a bag's instances, of log p
                p.sub_(best).exp_()  # p / exp(best), which is not 0 for all of them
                mixed = a @ p  # P / exp(best) [s, 1, K]
                loss -= (t[:, None] * (best + mixed.log())).sum()
                answers = t[:, None] / mixed  # t / P exp(best)
                share = a.mT * (p @ answers.mT)  # R [s, N, 1]
                slope = logits.view_as(p)  # d loss / d z = p (R - a t / P)
                torch.mul(share, best.exp_(), out=slope)
                slope.addcmul_(a.mT, answers, value=-1).mul_(p)
                torch.mm(logits, prototypes, out=grad_instances[chunk].flatten(0, 1))
                grad_weights[chunk] = -share[..., 0]
                grad_prototypes.addmm_(logits.T, rows)
            moved += [(instances, grad_instances.div_(temperature)), (log_weights, grad_weights)]
    return with_gradients(loss, *moved, (prototypes, grad_prototypes))
