"""The images of a run, for --check: unreadable, tiny, copied, leaking, and their classes.

No image is decoded: headers are read, and the hashes of files that fingerprints are made of.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from datasets.benchmarks import Benchmark
from datasets.contents import DIGEST
from datasets.fine_grained import DATASETS, load_splits
from datasets.folder import BadImage, ImageFolder, LabelledImages, StoredImages, capped_size
from datasets.loader import for_each
from datasets.shards import ImageShards
from datasets.splits import HELD_OUT, folders_named
from engine.evaluation.features import check_bad
from engine.preflight.findings import Findings
from utils import distributed
from utils.config import Node, knn_folders, local_crops
from utils.distributed import World
from utils.errors import InputError

LEAST_SIDE = 32  # pixels; shorter is tiny, whatever the crops

Size = tuple[int, int]  # two sides in pixels, perhaps turned
Index = tuple[int, int]  # (which of several data sets, index of the image in it)


def read_headers(images: StoredImages, world: World, workers: int) -> list[Size | BadImage]:
    """The two sides of all images in order, or why not; a share read by each process; all together.

    They are rank 0's; the others get none.
    """
    share = distributed.share(len(images), world)
    mine = for_each(images.size_or_bad, share, workers, "reading headers")
    gathered = distributed.gather_objects(mine, on_all=False)
    return [size for part in gathered for size in part or ()]


def equal_files(
    sets: Sequence[StoredImages], headers: Sequence[list[Size | BadImage]]
) -> list[list[Index]]:
    """Groups of readable images of all sets with the same bytes, each in the order of the sets.

    By the hashes that fingerprints are made of: not of shards, whose files hold many images, and of
    a set of more than contents.MOST_FILES only of those that are read.
    """
    by_hash = defaultdict(list)
    for number, (images, sizes) in enumerate(zip(sets, headers, strict=True)):
        digests = images.digests() if isinstance(images, LabelledImages) else []
        for index, digest in enumerate(digests):
            if len(digest) == DIGEST and not isinstance(sizes[index], BadImage):
                by_hash[digest].append((number, index))
    return [group for group in by_hash.values() if len(group) > 1]


def validation_images(cfg: Node, findings: Findings) -> LabelledImages | None:
    """Images that the training should not see: named, a benchmark's test split, or beside it.

    None where there are none, or only the training images themselves; with a warning where a
    benchmark has no whole test split, which pretraining does not need. Raises InputError.
    """
    if cfg.EVAL.KNN_VAL:
        same = os.path.realpath(cfg.EVAL.KNN_VAL) == os.path.realpath(cfg.DATA.PATH)
        return None if same else distributed.on_main(lambda: ImageFolder(cfg.EVAL.KNN_VAL))
    source = DATASETS.get(cfg.DATA.DATASET)
    if isinstance(source, Benchmark):
        try:
            return load_splits(cfg.DATA.DATASET, cfg.DATA.PATH, cfg.DATA.PARTIAL).test
        except InputError as error:
            findings.warnings.append(f"the test images are not looked at: {error}")
            return None
    training = Path(os.path.abspath(cfg.DATA.PATH))
    if source is ImageFolder and training.name.lower() not in HELD_OUT:
        beside = distributed.on_main(lambda: folders_named(training.parent, HELD_OUT))
        return distributed.on_main(lambda: ImageFolder(beside[0])) if beside else None
    return None


def training(
    cfg: Node,
    images: LabelledImages | ImageShards,
    headers: list[Size | BadImage],
    same: list[list[Index]],
    findings: Findings,
) -> dict:
    """The training images' section; warnings and problems go to the findings.

    same: groups of images with equal bytes, of data set 0 (training) and 1 (validation).
    """
    unreadable = _unreadable(images, headers)
    _judge_unreadable(cfg, len(images), unreadable, findings)
    below = max(LEAST_SIDE, min((size for _, size in local_crops(cfg)), default=0))
    tiny = {
        images.name(index): "{} x {}".format(*size)
        for index, size in enumerate(headers)
        if not isinstance(size, BadImage) and min(size) < below
    }
    if tiny:
        findings.warnings.append(
            f"training images with a side of less than {below} pixels: {len(tiny):,}; their crops "
            "are enlarged from very little"
        )
    groups = [[images.name(index) for number, index in group if number == 0] for group in same]
    groups = [group for group in groups if len(group) > 1]
    if groups:
        copies = sum(len(group) - 1 for group in groups)
        findings.warnings.append(
            f"training images that are copies of others, byte for byte: {copies:,}; an image "
            "counts as often as it is there"
        )
    return {
        "path": cfg.DATA.PATH,
        "dataset": cfg.DATA.DATASET,
        "count": len(images),
        "passed_over": {ending or "none": count for ending, count in images.passed_over.items()},
        "unreadable": unreadable,
        "max_bad": cfg.DATA.MAX_BAD,
        f"sides_below_{below}": tiny,
        "equal_files": groups,
        "classes": _class_counts(images),
    }


def validation(
    cfg: Node,
    images: StoredImages,
    held_out: LabelledImages,
    headers: list[Size | BadImage],
    same: list[list[Index]],
    findings: Findings,
) -> dict:
    """The section of the validation images, and which of them the training sees."""
    unreadable = _unreadable(held_out, headers)
    if knn_folders(cfg):
        _judge_unreadable(cfg, len(held_out), unreadable, findings)
    leaks = [
        [held_out.name(index), images.name(group[0][1])]
        for group in same
        if group[0][0] == 0
        for number, index in group
        if number == 1
    ]
    if leaks:
        findings.warnings.append(
            f"{len(leaks):,} of {len(held_out):,} validation images are training images too, byte "
            f"for byte (for instance {' is '.join(leaks[0])}): figures on them will be better than "
            "on new images; take them out of one of the two"
        )
    return {
        "path": str(held_out.root),
        "count": len(held_out),
        "unreadable": unreadable,
        "also_in_training": leaks,
    }


def cache_bytes(cfg: Node, headers: list[Size | BadImage]) -> int:
    """What DATA.CACHE would keep, by the headers; 0 where it is off."""
    if cfg.DATA.CACHE == "none":
        return 0
    known = [size for size in headers if not isinstance(size, BadImage)]
    sizes = [capped_size(size, cfg.DATA.CACHE_SIZE) for size in known]
    return sum(3 * width * height for width, height in sizes)


def _unreadable(images: StoredImages, headers: list[Size | BadImage]) -> dict[str, str]:
    """Why images have no readable header and folders cannot be listed, by path."""
    bad = [header for header in headers if isinstance(header, BadImage)]
    return {image.path: image.reason for image in (*bad, *images.unlisted)}


def _judge_unreadable(
    cfg: Node, images: int, unreadable: dict[str, str], findings: Findings
) -> None:
    """More than DATA.MAX_BAD are a problem, fewer a warning."""
    sentences = [f"{path} ({reason})" for path, reason in unreadable.items()]
    try:
        check_bad(sentences, images, cfg.DATA.MAX_BAD)
    except InputError as error:
        findings.problems.append(str(error))
        return
    if unreadable:
        findings.warnings.append(
            f"{len(unreadable):,} of {images:,} images cannot be read: they are skipped and listed"
        )


def _class_counts(images: LabelledImages | ImageShards) -> dict[str, int]:
    """Images of each class, the smallest first; empty without classes."""
    if isinstance(images, ImageShards):
        return {}
    known = images.labels[images.labels >= 0]
    counts = known.bincount(minlength=len(images.classes)).tolist()
    return dict(sorted(zip(images.classes, counts, strict=True), key=lambda item: item[1]))
