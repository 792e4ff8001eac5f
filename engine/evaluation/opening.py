"""What an evaluation script opens: the other processes, a network, two splits, a folder."""

from pathlib import Path

from datasets.fine_grained import load_splits, prepare
from datasets.folder import refuse_among_images
from datasets.splits import Splits
from engine.evaluation.feature_cache import SPLITS, SplitFeatures
from engine.evaluation.features import Reading
from engine.evaluation.source import NO_KEY, Source, load_source
from utils import distributed, logging
from utils.cli import CommandLine
from utils.config import Node
from utils.distributed import World
from utils.errors import InputError
from utils.files import make_folder
from utils.logging import logger
from utils.normalisation import IMAGENET


def join(command: CommandLine) -> World:
    """Join the other processes, set up the lines on stdout, and print the command's notes."""
    world = distributed.start(command.cfg.DEVICE, command.cfg.TRAIN.TIMEOUT_MINUTES)
    logging.setup(world.is_main)
    for note in command.notes:
        logger.warning(note)
    return world


def open_source(path: str, command: CommandLine) -> Source:
    """The network at `path`, the same for all processes."""
    source = load_source(path, command.cfg.INIT.CHECKPOINT_KEY, command.cfg, command.typed)
    distributed.agree(
        {f"the contents of {path}": source.weights.sha256},
        "wait until nothing writes it, and give all of them the same file",
    )
    return source


def open_splits(cfg: Node) -> Splits | None:
    """DATA.*'s two splits, the same for all processes; None without DATA.PATH."""
    if not cfg.DATA.PATH:
        return None
    prepare(cfg.DATA.DATASET, cfg.DATA.PATH, cfg.DATA.DOWNLOAD)
    splits = load_splits(cfg.DATA.DATASET, cfg.DATA.PATH, cfg.DATA.PARTIAL)
    for folder in filter(None, (cfg.OUTPUT_DIR, cfg.EVAL.DUMP_FEATURES)):
        refuse_among_images(Path(folder), splits.train, splits.test)
    for split, images in zip(SPLITS, (splits.train, splits.test), strict=True):
        # One process reads the files, for all.
        images.fingerprint, grey = distributed.on_main(
            lambda images=images: (images.fingerprint, images.deep_grey())
        )
        splits.notes.extend(f"{split}: {note}" for note in grey)
    for note in splits.notes:
        logger.warning(note)
    return splits


def open_features(command: CommandLine, world: World) -> SplitFeatures:
    """The features that a script's command line names, checked; none is extracted yet."""
    cfg = command.cfg
    kept, dumped = cfg.EVAL.LOAD_FEATURES, cfg.EVAL.DUMP_FEATURES
    if kept and dumped:
        raise InputError("--load_features and --dump_features exclude each other: drop one.")
    if kept and not Path(kept).is_dir():
        raise InputError(f"there are no features at {kept}: it is no folder.")
    if not kept:
        if not cfg.INIT.WEIGHTS:
            raise InputError("no network: give --pretrained_weights.")
        if not cfg.DATA.PATH:
            raise InputError("no images: give --data_path.")
    source = open_source(cfg.INIT.WEIGHTS, command) if cfg.INIT.WEIGHTS else None
    features = SplitFeatures(
        source,
        open_splits(cfg),
        Reading.of(cfg, world, source),
        cfg.EVAL.POOLING,
        Path(kept or dumped) if kept or dumped else None,
        must_fit=bool(kept),
    )
    if dumped:
        distributed.on_main(lambda: make_folder(Path(dumped), "--dump_features"))
    if source is not None:
        logger.info(f"network: {network_line(features)}; pooling {cfg.EVAL.POOLING}")
    if features.splits is not None:
        train, test = features.images("train"), features.images("test")
        logger.info(
            f"data: {features.splits.name} in {cfg.DATA.PATH}, {len(train.classes)} classes, "
            f"{len(train)} training and {len(test)} test images"
        )
    return features


def network_line(features: SplitFeatures) -> str:
    """Architecture, image size, key and age of the network; pixels that are not ImageNet's."""
    weights, reading = features.source.weights, features.reading
    parts = [weights.arch, f"{reading.size} px of {reading.resize}"]
    if reading.normalisation != IMAGENET:
        parts.append(str(reading.normalisation))
    if weights.key != NO_KEY:
        parts.append(weights.key)
    if weights.epoch is not None and not weights.is_random:
        parts.append(f"epoch {weights.epoch}")
    return ", ".join(parts)


def results_folder(cfg: Node, name: str) -> Path:
    """Where a script writes: OUTPUT_DIR, else beside the kept features, else the checkpoint.

    name: of the folder beside a checkpoint, before the checkpoint's own. It is made; raises
    InputError where it cannot be.
    """
    chosen = cfg.OUTPUT_DIR or cfg.EVAL.DUMP_FEATURES or cfg.EVAL.LOAD_FEATURES
    weights = Path(cfg.INIT.WEIGHTS).absolute()
    folder = Path(chosen) if chosen else weights.parent / f"{name}_{weights.stem}"
    distributed.on_main(lambda: make_folder(folder))
    return folder
