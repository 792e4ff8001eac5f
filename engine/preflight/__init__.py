"""--check: what a run of this command would meet, found out before step 1."""

from pathlib import Path

from datasets.fine_grained import build_dataset, prepare
from datasets.folder import BadImage, LabelledImages, refuse_among_images
from datasets.loader import steps_per_epoch, usable_workers
from datasets.shards import ImageShards
from engine import build
from engine.evaluation.features import gallery_and_queries
from engine.preflight import advice, machine
from engine.preflight import images as image_findings
from engine.preflight.findings import Findings
from engine.preflight.images import Size, equal_files, read_headers
from engine.training import resume
from engine.training.schedules import scaled_lr
from utils import config, distributed
from utils.config import Node, crops_on_device
from utils.distributed import World
from utils.errors import InputError
from utils.files import make_folder, write_json
from utils.logging import logger

FILE = "check.json"


def run(cfg: Node, world: World) -> None:
    """Print what a run of these options would meet, and write it as OUTPUT_DIR/check.json.

    All processes together: they share the reading of headers, and rank 0 does the rest. Nothing
    is downloaded; an index of shards is made where there is none. Raises InputError, on all,
    where the run could not work; what is only unwise is a warning.
    """
    findings, data = Findings(), cfg.DATA
    findings.attempt(lambda: prepare(data.DATASET, data.PATH))
    images = findings.attempt(lambda: build_dataset(data.DATASET, data.PATH, partial=data.PARTIAL))
    held_out = findings.attempt(lambda: image_findings.validation_images(cfg, findings))
    sets = [part for part in (images, held_out) if part is not None]
    if cfg.OUTPUT_DIR:
        refuse_among_images(Path(cfg.OUTPUT_DIR), *sets)
        distributed.on_main(lambda: make_folder(Path(cfg.OUTPUT_DIR)))
    distributed.agree(
        {"images for training and validation": [len(part) for part in sets]},
        "put them where all of them see the same files",
    )
    if folders := config.knn_folders(cfg):
        splits = findings.attempt(lambda: gallery_and_queries(*folders))
        findings.warnings += splits.notes if splits else []
    headers = [read_headers(part, world, usable_workers(data.WORKERS)) for part in sets]
    distributed.on_main(lambda: _report(cfg, world, images, held_out, headers, findings))


def _report(
    cfg: Node,
    world: World,
    images: LabelledImages | ImageShards | None,
    held_out: LabelledImages | None,
    headers: list[list[Size | BadImage]],
    findings: Findings,
) -> None:
    """Fill the findings, print and write them; InputError where there is a problem."""
    found, kept = None, 0
    folder = Path(cfg.OUTPUT_DIR) if cfg.OUTPUT_DIR else None
    if images is not None:
        kept = image_findings.cache_bytes(cfg, headers[0])
        sets = [images] if held_out is None else [images, held_out]
        same = equal_files(sets, headers)
        findings.images = image_findings.training(cfg, images, headers[0], same, findings)
        if held_out is not None:
            findings.validation = image_findings.validation(
                cfg, images, held_out, headers[1], same, findings
            )
        per_step = cfg.TRAIN.BATCH_SIZE_PER_GPU * world.size * cfg.TRAIN.ACCUM_STEPS
        findings.batch = findings.attempt(lambda: _batch(cfg, world, len(images), per_step))
        if folder:
            known = (len(images), images.fingerprint, per_step, world)
            found = findings.attempt(lambda: resume.find(cfg, *known))
    config.settle_crops(cfg, world.device.type)
    if found is None:
        config.settle_start(cfg)
    if findings.batch:
        findings.warnings += advice.warnings(cfg, world.size, images)
    findings.crops = _crops(cfg, world)
    sizes = images.sizes_looked_at if images is not None else []
    findings.memory = findings.attempt(
        lambda: machine.memory_needed(cfg, world, kept, sizes, found, findings)
    )
    if folder and findings.memory:
        findings.disk = machine.disk_needed(cfg, folder, findings.memory["checkpoint_bytes"])
        if found:
            findings.disk["goes_on_from_step"] = found.state["step"]
    findings.attempt(lambda: findings.warnings.extend(machine.warnings(cfg, sizes, findings.disk)))
    _print(findings, folder)


def _batch(cfg: Node, world: World, images: int, per_step: int) -> dict:
    """The batch against the data; InputError where a step takes more than there is."""
    train = cfg.TRAIN
    steps = steps_per_epoch(images, train.BATCH_SIZE_PER_GPU, world.size, train.ACCUM_STEPS)
    return {
        "images_per_step": per_step,
        "batch": train.BATCH_SIZE_PER_GPU,
        "processes": world.size,
        "accumulation": train.ACCUM_STEPS,
        "steps_per_epoch": steps,
        "epochs": train.EPOCHS,
        "total_steps": steps * train.EPOCHS,
        "left_over": images - steps * per_step,
        "peak_lr": scaled_lr(cfg, per_step),
    }


def _crops(cfg: Node, world: World) -> dict:
    """Who decodes and who crops."""
    sizes = build.augmentation(cfg).sizes
    return {
        "crops": " + ".join(f"{sizes.count(size)} x {size}" for size in dict.fromkeys(sizes)),
        "made_on": str(world.device) if crops_on_device(cfg) else "loader",
        "workers": usable_workers(cfg.DATA.WORKERS),
        "processes": world.size,
        "cache": cfg.DATA.CACHE,
    }


def _print(findings: Findings, folder: Path | None) -> None:
    """Print the findings, write them; InputError for the first problem."""
    for line in findings.lines():
        logger.info(line)
    for warning in findings.warnings:
        logger.warning(warning)
    if folder:
        write_json(folder / FILE, findings.as_dict(), "report")
        logger.info(f"the same as data, with all paths: {folder / FILE}")
    if findings.problems:
        for problem in findings.problems:
            logger.info(f"would stop the run: {problem}")
        more = len(findings.problems) - 1
        first = findings.problems[0]
        raise InputError(
            f"the run cannot work: {first}" + (f" (and {more} more, above)" if more else "")
        )
    count = len(findings.warnings)
    logger.info("the run can work" + (f" (warnings above: {count})" if count else ""))
