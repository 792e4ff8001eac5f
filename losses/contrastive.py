"""Contrastive learning with a queue of keys: MoCo (He et al. 2020) and MoCo v2 (Chen et al. 2020).

A query is the student's embedding of one crop of an image, its key the teacher's of the other
crop. The student must recognise the key among those of other images, which a queue keeps from the
steps before.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import distributed
from utils.views import Views, in_full_precision


@in_full_precision
def info_nce(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """-log( exp(q.k/t) / (exp(q.k/t) + sum over the queue of exp(q.k'/t)) ), mean over the batch.

    queries, keys: [B, d] on the unit sphere, row by row of one image; queue [Q, d]. Only the
    queries get a gradient. Returns the loss, and bool [B]: whether the key is nearer to its query
    than all of the queue.
    """
    positive = (queries * keys.detach()).sum(1, keepdim=True)
    negative = queries @ queue.T
    loss = F.cross_entropy(
        torch.cat([positive, negative], dim=1) / temperature,
        torch.zeros(len(queries), dtype=torch.long, device=queries.device),
    )
    return loss, (positive > negative).all(1)


class KeyQueue(nn.Module):
    """The latest keys of all processes, first in first out.

    keys [Q, d] begin as random directions, the same on all processes, drawn from `seed`. One
    update an optimizer step, after the loss: micro-batches are first collected by `collect`, then
    gathered from the processes and put in the place of the oldest by `update`.
    """

    keys: Tensor
    place: Tensor  # int64 scalar: of the oldest key, which goes first

    def __init__(self, size: int, dim: int, seed: int) -> None:
        super().__init__()
        drawn = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("keys", F.normalize(drawn, dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self._collected: list[Tensor] = []

    @torch.no_grad()
    def collect(self, teacher: Views) -> None:
        """Note the keys of one micro-batch."""
        self._collected.append(teacher.image_embeddings.float())

    @torch.no_grad()
    def update(self, good: Tensor | None = None) -> Tensor:
        """Put what was collected since the last update in; of more than Q the last Q.

        good: a bool scalar on the device, whether this process's step was (None: it was).
        Returns whether that of every process was, by the same exchange; where one was not, the
        queue stays as it is.
        """
        collected, self._collected = self._collected, []
        if not collected:
            raise RuntimeError("KeyQueue.update was called with nothing collected")
        own = torch.cat(collected)
        bad = torch.zeros_like(own[:1]) if good is None else (~good).expand(1, own.shape[1])
        everyone = distributed.gather(torch.cat([own, bad])[None])  # [P, B + 1, d]
        good = everyone[:, -1, 0].sum() == 0
        new = everyone[:, :-1].flatten(0, 1)[-len(self.keys) :]
        places = (self.place + torch.arange(len(new), device=new.device)) % len(self.keys)
        self.keys[places] = torch.where(good, new, self.keys[places])
        self.place.copy_(torch.where(good, (self.place + len(new)) % len(self.keys), self.place))
        return good
