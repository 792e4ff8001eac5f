"""How good the teacher's image features are, during a run.

By the k-NN on held-out images where EVAL.KNN_TRAIN and EVAL.KNN_VAL name such, and without labels
by the neighbours of two augmented copies of training images. No random number, no statistic of a
BatchNorm and no mode of a module is another one afterwards.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.folder import LabelledImages, StoredImages
from datasets.loader import KeyedDataset, usable_workers
from datasets.multicrop import MultiCrop, default_resize, normalised
from datasets.splits import Splits
from engine import build
from engine.evaluation.feature_cache import SplitFeatures
from engine.evaluation.features import Encoder, Reading, extract_values, gallery_and_queries
from engine.evaluation.measure import KNN, measure
from engine.evaluation.similarity import nearest
from engine.evaluation.source import Source
from engine.training.health import effective_rank
from engine.training.standing import Measured
from engine.training.step import Pretraining
from utils import config, distributed
from utils.config import Node
from utils.errors import InputError
from utils.logging import logger
from utils.seeding import COPIES, derive_seed

MOST_IMAGES = 512  # of which copies are made
AT_ONCE = 16  # images in a forward pass, two copies each
MOST_WORKERS = 4  # their batches come beside those of the run through /dev/shm
PER_NEIGHBOUR = 20  # images, at least: by chance one neighbour in so many is in common


@dataclass(frozen=True)
class Validation:
    """What a run's features are measured on: `splits`, or where None `images`, its training set."""

    cfg: Node
    images: StoredImages
    splits: Splits | None

    @classmethod
    def of(cls, cfg: Node, images: StoredImages) -> "Validation | None":
        """By EVAL.KNN_*; None where nothing is measured. InputError for folders without classes."""
        if config.figures_every(cfg) is None:
            return None
        splits = None
        if folders := config.knn_folders(cfg):
            splits = gallery_and_queries(*folders)
            for note in splits.notes:
                logger.warning(note)
        return cls(cfg, images, splits)

    @property
    def labelled(self) -> tuple[LabelledImages, ...]:
        """Gallery and queries, where there are such."""
        return (self.splits.train, self.splits.test) if self.splits else ()

    def due(self, run: Pretraining) -> bool:
        """Whether the epochs that are done call for it: every EVAL.KNN_EVERY, and the last."""
        if run.step % run.steps_per_epoch:
            return False
        every = config.figures_every(self.cfg)
        return run.step == run.total_steps or bool(every and run.epoch % every == 0)

    def measure(self, run: Pretraining) -> Measured:
        """The figures of the teacher as it is; all processes together, the same on each."""
        with _as_in_a_checkpoint(run.teacher.backbone):
            return self._by_labels(run) if self.splits else self._by_copies(run)

    def _by_labels(self, run: Pretraining) -> Measured:
        """k-NN top-1 and top-5, percent, of the queries by the gallery."""
        cfg, size = self.cfg, config.eval_size(self.cfg)
        reading = Reading(
            run.world,
            size,
            default_resize(size),
            run.precision,
            cfg.EVAL.BATCH_SIZE_PER_GPU,
            usable_workers(cfg.DATA.WORKERS),
            cfg.DATA.MAX_BAD,
            config.normalisation(cfg),
        )
        k, features = cfg.EVAL.KNN_K, SplitFeatures(Source(None, run.teacher), self.splits, reading)
        (found,) = measure(features, [KNN([k])])
        of_k, sizes = found.figures["k"][str(k)], (len(self.splits.train), len(self.splits.test))
        return Measured(
            "{1} images by their {2} nearest of {0}, {3} pixels".format(*sizes, k, size),
            {"knn_top1": of_k["top1"], "knn_top5": of_k["top5"]},
            (found.predicted[k] == features.of("test").labels).float(),
        )

    def _by_copies(self, run: Pretraining) -> Measured:
        """Figures of two augmented copies of each of at most MOST_IMAGES images.

        The copies are global crops as the run makes them, by the loader, and the same at every
        time: their seed is of (SEED, image).
        """
        cfg, total = self.cfg, len(self.images)
        count = min(MOST_IMAGES, total)
        crops = MultiCrop(
            replace(build.augmentation(cfg), local_crops_number=(), local_crops_size=())
        )
        make = partial(_copies, self.images, [i * total // count for i in range(count)], crops)
        encoder, by = Encoder(Source(None, run.teacher)), config.normalisation(cfg)

        def encoded(copies: Tensor) -> Tensor:
            with run.autocast():
                return encoder(normalised(copies, by).flatten(0, 1)).unflatten(0, copies.shape[:2])

        features, _, _ = extract_values(
            encoded,
            KeyedDataset(count, derive_seed(cfg.SEED, COPIES), make),
            run.world,
            AT_ONCE,
            min(MOST_WORKERS, usable_workers(cfg.DATA.WORKERS)),
            max_bad=1.0,  # the run counts and lists them itself
        )
        k = min(cfg.EVAL.KNN_K, max(1, len(features) // PER_NEIGHBOUR))
        return Measured(
            f"two copies of each of {count} of {total} images, their {k} nearest",
            *of_copies(features, k),
        )


def of_copies(features: Tensor, k: int) -> tuple[dict[str, float], Tensor]:
    """Figures of image features float32 [n, 2, D] of two copies of n >= 2 images; see below.

    agreement: percent of the k nearest images that both copies of an image have in common. A
    copy's are those whose other copies are nearest to it, its own image left out: so it is no
    matter of knowing an image again. 0 where features differ by rounding alone. And, of unit
    features (Wang & Isola 2020, eq. 4 and 5, with their alpha and t): alignment: mean squared
    distance of an image's copies; uniformity: log of the mean of exp(-2 squared distance) over the
    pairs of images, of first and of second copies, averaged. rank: effective rank of the first
    copies (health.effective_rank). Second result: each image's agreement, a share, float32 [n].
    Raises InputError for features that are not finite.
    """
    if not features.isfinite().all():
        raise InputError(
            "the teacher's features of training images hold infinite or undefined values: the "
            "network has diverged. Start again with a lower learning rate (--lr)."
        )
    copies = F.normalize(features, dim=-1).unbind(1)
    rank = effective_rank(features[:, 0])
    cosines = copies[0] @ copies[1].T
    alignment = (2 - 2 * cosines.diagonal()).mean()
    cosines.fill_diagonal_(-torch.inf)
    ours, others = (nearest(similarity, k)[1] for similarity in (cosines, cosines.T))
    common = (ours[:, :, None] == others[:, None]).any(-1).float().mean(1) * (rank > 0)
    uniformity = [torch.pdist(copy).square().mul(-2).exp().mean().log() for copy in copies]
    figures = {
        "agreement": 100 * common.mean(),
        "rank": rank,
        "alignment": alignment,
        "uniformity": sum(uniformity) / 2,
    }
    return {name: value.item() for name, value in figures.items()}, common


def _copies(
    images: StoredImages, places: list[int], crops: MultiCrop, index: int, seed: int
) -> Tensor:
    """Two global crops, uint8 [2, 3, S, S], of the image that is number `index` of those taken."""
    return torch.stack(crops(images.load(places[index]), seed))


@contextlib.contextmanager
def _as_in_a_checkpoint(network: nn.Module) -> Iterator[None]:
    """In its block the network is in eval mode and has the first process's buffers.

    A process may have statistics of its own; a checkpoint holds the first one's.
    """
    modes = {module: module.training for module in network.modules()}
    own = {name: buffer.to("cpu", copy=True) for name, buffer in network.named_buffers()}
    network.eval().load_state_dict(distributed.of_main(own), strict=False)
    yield
    network.load_state_dict(own, strict=False)
    for module, training in modes.items():
        module.training = training
