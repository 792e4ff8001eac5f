"""The images of a run, for --check: unreadable, tiny, copied, leaking, and their classes."""

import os
from collections import Counter
from pathlib import Path

from datasets.benchmarks import Benchmark
from datasets.fine_grained import DATASETS, load_splits
from datasets.folder import ImageFolder, LabelledImages, StoredImages, capped_size
from datasets.shards import ImageShards
from engine.evaluation.features import check_bad
from engine.preflight.findings import Findings
from engine.preflight.inspection import Header, Place
from utils.config import Node, local_crops

LEAST_SIDE = 32  # pixels; shorter is tiny, whatever the crops
HELD_OUT = ("val", "test")  # folders beside the training images


def validation_images(cfg: Node) -> LabelledImages | None:
    """Images that the training should not see: named, a benchmark's test split, or beside it.

    None where there are none, or only the training images themselves. Raises InputError.
    """
    if cfg.EVAL.KNN_VAL:
        same = os.path.realpath(cfg.EVAL.KNN_VAL) == os.path.realpath(cfg.DATA.PATH)
        return None if same else ImageFolder(cfg.EVAL.KNN_VAL)
    source = DATASETS.get(cfg.DATA.DATASET)
    if isinstance(source, Benchmark):
        return load_splits(cfg.DATA.DATASET, cfg.DATA.PATH, cfg.DATA.PARTIAL).test
    training = Path(os.path.abspath(cfg.DATA.PATH))
    if source is ImageFolder and training.name not in HELD_OUT:
        for name in HELD_OUT:
            if (training.parent / name).is_dir():
                return ImageFolder(training.parent / name)
    return None


def name(images: StoredImages, index: int) -> str:
    """What messages call image `index`; nothing is read for it."""
    path = images.paths[index]
    return path if isinstance(images, ImageShards) else str(images.root / path)


def training(
    cfg: Node,
    images: LabelledImages | ImageShards,
    headers: list[Header],
    same: list[list[Place]],
    findings: Findings,
) -> dict:
    """The training images' section; warnings and problems go to the findings.

    same: groups of images with equal bytes, of data set 0 (training) and 1 (validation).
    """
    unreadable = _unreadable(images, headers)
    _judge_unreadable(cfg, len(images), unreadable, findings)
    below = max(LEAST_SIDE, min((size for _, size in local_crops(cfg)), default=0))
    tiny = [
        {"path": name(images, index), "size": list(header.size)}
        for index, header in enumerate(headers)
        if header.size is not None and min(header.size) < below
    ]
    if tiny:
        findings.warnings.append(
            f"{len(tiny):,} training images have a side of less than {below} pixels: their crops "
            "are enlarged from very little"
        )
    groups = [[index for number, index in group if number == 0] for group in same]
    groups = [[name(images, index) for index in group] for group in groups if len(group) > 1]
    if groups:
        copies = sum(len(group) - 1 for group in groups)
        findings.warnings.append(
            f"{copies:,} training images are copies of others, byte for byte: an image counts as "
            "often as it is there"
        )
    classes = _class_counts(images)
    if classes and "train" in classes and set(HELD_OUT) & set(classes):
        findings.warnings.append(
            f"{cfg.DATA.PATH} holds the folders {', '.join(classes)} and all of them are trained "
            "on: if that is not meant, give its folder train as --data_path"
        )
    return {
        "path": cfg.DATA.PATH,
        "dataset": cfg.DATA.DATASET,
        "count": len(images),
        "unreadable": unreadable,
        "unreadable_share": len(unreadable) / len(images),
        "max_bad": cfg.DATA.MAX_BAD,
        "tiny": tiny,
        "tiny_below": below,
        "duplicates": groups,
        "classes": classes,
    }


def validation(
    cfg: Node,
    images: StoredImages,
    held_out: LabelledImages,
    headers: list[Header],
    same: list[list[Place]],
    findings: Findings,
) -> dict:
    """The section of the validation images, and which of them the training sees."""
    unreadable = _unreadable(held_out, headers)
    if cfg.EVAL.KNN_EVERY:
        _judge_unreadable(cfg, len(held_out), unreadable, findings)
    leaks = [
        {"validation": name(held_out, index), "training": name(images, group[0][1])}
        for group in same
        if group[0][0] == 0
        for number, index in group
        if number == 1
    ]
    if leaks:
        findings.warnings.append(
            f"{len(leaks):,} of {len(held_out):,} validation images are training images too, byte "
            f"for byte (for instance {leaks[0]['validation']} is {leaks[0]['training']}): figures "
            "on them will be better than on new images; take them out of one of the two"
        )
    beside = isinstance(held_out, ImageFolder)
    source = "EVAL.KNN_VAL" if cfg.EVAL.KNN_VAL else "beside the training" if beside else "test"
    return {
        "path": str(held_out.root),
        "source": source,
        "count": len(held_out),
        "unreadable": unreadable,
        "in_training": leaks,
    }


def cache_bytes(cfg: Node, headers: list[Header]) -> int:
    """What DATA.CACHE would keep, by the headers; 0 where it is off."""
    if cfg.DATA.CACHE == "none":
        return 0
    sizes = [capped_size(header.size, cfg.DATA.CACHE_SIZE) for header in headers if header.size]
    return sum(3 * width * height for width, height in sizes)


def _unreadable(images: StoredImages, headers: list[Header]) -> list[dict]:
    """Images without a readable header, and folders that cannot be listed."""
    files = [
        {"path": name(images, index), "reason": header.reason}
        for index, header in enumerate(headers)
        if header.size is None
    ]
    return files + [{"path": bad.path, "reason": bad.reason} for bad in images.unlisted]


def _judge_unreadable(cfg: Node, images: int, unreadable: list[dict], findings: Findings) -> None:
    """More than DATA.MAX_BAD are a problem, fewer a warning."""
    sentences = [f"{bad['path']} ({bad['reason']})" for bad in unreadable]
    problems = len(findings.problems)
    findings.attempt(lambda: check_bad(sentences, images, cfg.DATA.MAX_BAD))
    if unreadable and len(findings.problems) == problems:
        findings.warnings.append(
            f"{len(unreadable):,} of {images:,} images cannot be read: they are skipped and listed"
        )


def _class_counts(images: LabelledImages | ImageShards) -> dict[str, int] | None:
    """Images of each class; None without classes."""
    if isinstance(images, ImageShards) or not images.classes:
        return None
    counts = Counter(images.labels)
    return {label: counts[number] for number, label in enumerate(images.classes)}
