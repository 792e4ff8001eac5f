"""What options and data would run with and yet be unwise: found at no cost, by a run as by --check.

Each is a sentence for a warning. What takes a look into all images, or a step, --check alone finds.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from datasets.folder import ImageFolder, StoredImages
from datasets.shards import ImageShards
from datasets.splits import HELD_OUT, TRAINING
from engine import build
from models.registry import resolve
from utils import precision
from utils.config import Node, crops_on_device, knn_folders
from utils.distributed import kind_of_device
from utils.options import OPTIONS

LARGE_STEP = 0.25  # of the data


def warnings(cfg: Node, processes: int, images: StoredImages) -> Iterator[str]:
    """A sentence for each thing. images: the training set."""
    yield from _of_network(cfg)
    yield from _of_data(cfg, images)
    yield from _of_batch(cfg, processes, len(images))
    yield from _of_temperatures(cfg)
    in_bf16_on_cpu = cfg.TRAIN.PRECISION == "bf16" and kind_of_device(cfg.DEVICE) == "cpu"
    if in_bf16_on_cpu and not precision.cpu_has_bfloat16():
        yield (
            "TRAIN.PRECISION bf16: this CPU has no instructions for it, and a step takes many "
            "times as long as in fp32"
        )
    if crops_on_device(cfg) and 0 < cfg.DATA.CACHE_SIZE < cfg.AUG.GLOBAL_CROPS_SIZE:
        yield (
            f"DATA.CACHE_SIZE {cfg.DATA.CACHE_SIZE} is below AUG.GLOBAL_CROPS_SIZE "
            f"{cfg.AUG.GLOBAL_CROPS_SIZE}: crops are enlarged from images with less detail"
        )


def _of_network(cfg: Node) -> Iterator[str]:
    """An option of the Swins here, for another network."""
    arch, window = cfg.MODEL.ARCH, cfg.MODEL.WINDOW_SIZE
    is_swin = resolve(build.backbone_spec(cfg))["family"] == "swin"
    if not is_swin and window != OPTIONS["MODEL.WINDOW_SIZE"].default:
        yield f"MODEL.WINDOW_SIZE {window} is not used: it is this project's Swins', not {arch}'s"


def _of_data(cfg: Node, images: StoredImages) -> Iterator[str]:
    """Images that are held out elsewhere and trained on here, and pixels that are guessed at."""
    yield from images.deep_grey()
    if names := mixed_splits(images):
        folder = images.root if isinstance(images, ImageFolder) else images.shards[0].parent
        train = next(name for name in names if _letters(name) in TRAINING)
        instead = f"{folder}/{train}"
        if isinstance(images, ImageShards):
            instead = f"a pattern of {train}'s shards ({folder}/...{{000000..000146}}.tar)"
        yield (
            f"{folder} holds {' and '.join(names)}, and all of it is trained on: if that is not "
            f"meant, give {instead} as --data_path"
        )
    if knn_folders(cfg):
        inside, outside = (os.path.realpath(p) for p in (cfg.EVAL.KNN_VAL, cfg.DATA.PATH))
        if Path(inside).is_relative_to(outside):
            yield (
                f"EVAL.KNN_VAL {cfg.EVAL.KNN_VAL} is trained on, as part of {cfg.DATA.PATH}: the "
                f"k-NN test says more than one on new images would"
            )
    elif cfg.EVAL.KNN_TRAIN or cfg.EVAL.KNN_VAL:
        yield "no k-NN test is made on EVAL.KNN_TRAIN and EVAL.KNN_VAL: give EVAL.KNN_EVERY"


def mixed_splits(images: StoredImages) -> list[str]:
    """The names of subfolders, or words in those of shards, that say training and held-out, sorted.

    [] unless there are both.
    """
    names: set[str] = set()
    if isinstance(images, ImageShards):
        names = {word for shard in images.shards for word in re.findall("[A-Za-z]+", shard.stem)}
    elif isinstance(images, ImageFolder):
        names = {path.partition("/")[0] for path in images.paths if "/" in path}
    training, held_out = (
        [name for name in names if _letters(name) in of] for of in (TRAINING, HELD_OUT)
    )
    return sorted(training + held_out) if training and held_out else []


def _letters(name: str) -> str:
    """Of train2017 they are train."""
    return re.sub("[^a-z]", "", name.lower())


def _of_temperatures(cfg: Node) -> Iterator[str]:
    """A teacher that is not sharp."""
    loss = cfg.LOSS
    if build.objective(cfg).projects:
        return
    first, student = loss.WARMUP_TEACHER_TEMP, loss.STUDENT_TEMP
    warms_up = loss.WARMUP_TEACHER_TEMP_EPOCHS > 0
    highest = max(loss.TEACHER_TEMP, first) if warms_up else loss.TEACHER_TEMP
    if highest >= student:
        yield (
            f"the teacher's temperature {highest} is not below LOSS.STUDENT_TEMP {student}: its "
            f"targets are no sharper than the student's predictions, by which runs collapse. "
            f"Sharper is a lower LOSS.TEACHER_TEMP"
        )


def _of_batch(cfg: Node, processes: int, images: int) -> Iterator[str]:
    """A batch against the data and against what compares its images."""
    goal, batch = build.objective(cfg), cfg.TRAIN.BATCH_SIZE_PER_GPU
    per_step = batch * processes * cfg.TRAIN.ACCUM_STEPS
    if per_step > LARGE_STEP * images:
        yield (
            f"a step takes {per_step:,} of {images:,} images; steps an epoch: "
            f"{images // per_step:,}, few for the schedules and the teacher: consider a smaller "
            "batch or more epochs"
        )
    if goal.needs_pooling and batch * processes == 1:
        yield (
            "L_S and L_T compare the images of a micro-batch, and this has one: they are 0. Take a "
            "larger TRAIN.BATCH_SIZE_PER_GPU"
        )
    if not goal.projects:
        return
    if images <= cfg.MOCO.QUEUE:
        yield (
            f"MOCO.QUEUE {cfg.MOCO.QUEUE} holds a key of each of the {images} images: an image's "
            f"own old keys count as others'. Take a shorter queue."
        )
