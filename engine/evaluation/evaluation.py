"""What every evaluation script opens: the network, the two splits, and their features."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from datasets.benchmarks import Splits
from datasets.fine_grained import load_splits, prepare
from datasets.folder import LabelledImages
from datasets.loader import usable_workers
from datasets.multicrop import default_resize, eval_transform
from engine.evaluation import feature_cache
from engine.evaluation.feature_cache import Features
from engine.evaluation.features import Encoder, Extracted, check_bad, extract
from engine.evaluation.provenance import SPLITS, provenance
from engine.evaluation.source import NO_KEY, Source, image_size, load_source
from utils import distributed, logging
from utils.cli import CommandLine
from utils.config import Node
from utils.distributed import World
from utils.errors import InputError
from utils.files import make_folder
from utils.logging import logger
from utils.precision import autocast, precision_of

BAD_SHOWN = 5


@dataclass
class Evaluation:
    """A frozen network on a data set.

    source, splits: None where only kept features are at hand. size, resize: pixels, see
    eval_transform. folder: where features are kept, None for nowhere; `must_fit`: they are to
    be used and nothing else.
    """

    cfg: Node
    world: World
    source: Source | None
    splits: Splits | None
    size: int
    resize: int
    folder: Path | None = None
    must_fit: bool = False
    bad: dict[str, list[str]] = field(default_factory=dict)
    _held: dict[str, Features] = field(default_factory=dict)

    def encoder(self, blocks: int = 1, avgpool_patchtokens: bool = False) -> Encoder:
        """The encoder that the options ask for; InputError where no checkpoint was given."""
        if self.source is None:
            raise InputError("no network: give --pretrained_weights.")
        return Encoder(self.source, self.cfg.EVAL.POOLING, blocks, avgpool_patchtokens)

    def function(self, network: Encoder) -> Callable[[Tensor], Tensor]:
        """Images on the device -> features, in EVAL.PRECISION."""
        precision = precision_of(self.cfg, self.world.device, "EVAL.PRECISION")

        def features(images: Tensor) -> Tensor:
            with autocast(precision, self.world.device):
                return network(images)

        return features

    def extract(
        self, network: Encoder, dataset: LabelledImages, max_bad: float | None = None
    ) -> Extracted:
        """Features of centre crops; unreadable images are left out within `max_bad`, a share.

        max_bad: None for DATA.MAX_BAD.
        """
        return extract(
            self.function(network),
            dataset.through(eval_transform(self.size, self.resize)),
            self.world,
            self.cfg.EVAL.BATCH_SIZE_PER_GPU,
            usable_workers(self.cfg.DATA.WORKERS),
            self.cfg.DATA.MAX_BAD if max_bad is None else max_bad,
        )

    def features(self, split: str, blocks: int = 1, avgpool_patchtokens: bool = False) -> Features:
        """Features of `train` or `test`: held in memory, else kept on the disk, else extracted.

        The same on every process. blocks, avgpool_patchtokens: as in Encoder, which ignores
        them where the pooling or the family leaves no choice. Raises InputError where kept
        features must fit and do not.
        """
        if self.source is not None:
            network = self.encoder(blocks, avgpool_patchtokens)
            blocks, avgpool_patchtokens = network.blocks, network.avgpool_patchtokens
        elif self.cfg.EVAL.POOLING != "default":
            blocks, avgpool_patchtokens = 1, False
        made_by = self._made_by(split)
        held = self._held.get(split)
        if held is None or held.misfit(made_by, blocks, avgpool_patchtokens):
            held = self._read(split, made_by, blocks, avgpool_patchtokens)
            if held is None:
                held = self._make(split, made_by, blocks, avgpool_patchtokens)
            self._check(split, held)
            self._held[split] = held
            if held.bad:
                self.bad[split] = held.bad
                logger.warning(
                    f"left out of the {split} split, unreadable: {len(held.bad)} of "
                    f"{len(held.bad) + len(held.labels)} images: "
                    + "; ".join(held.bad[:BAD_SHOWN])
                    + ("; ..." if len(held.bad) > BAD_SHOWN else "")
                )
        return held.narrowed(blocks, avgpool_patchtokens)

    def _check(self, split: str, features: Features) -> None:
        """Raise InputError for features that no figure should come from."""
        check_bad(features.bad, len(features.bad) + len(features.labels), self.cfg.DATA.MAX_BAD)
        if not features.values.isfinite().all():
            raise InputError(
                f"the features of the {split} split hold infinite or undefined values: the network "
                f"has diverged, or EVAL.PRECISION is too coarse for it."
            )
        for other, held in self._held.items():
            names = (held.made_by.keys() | features.made_by.keys()) - {"images"}
            different = [n for n in sorted(names) if held.made_by.get(n) != features.made_by.get(n)]
            if held.classes != features.classes:
                different.append("classes")
            if different:
                raise InputError(
                    f"the features in {self.folder} do not belong together: {other} and {split} "
                    f"differ in {', '.join(different)}. Extract both splits again."
                )

    def path(self, split: str) -> Path | None:
        """Where the features of a split are kept."""
        if self.folder is None:
            return None
        pooling = self.cfg.EVAL.POOLING
        suffix = "" if pooling == "default" else f"-{pooling}"
        return self.folder / f"{split}{suffix}.safetensors"

    def _made_by(self, split: str) -> dict[str, str]:
        """What is known of what decides a split's features."""
        known = {}
        if self.source is not None:
            known |= self.source.identity(self.cfg.EVAL.POOLING)
            known |= {
                "size": str(self.size),
                "resize": str(self.resize),
                "precision": precision_of(self.cfg, self.world.device, "EVAL.PRECISION"),
            }
        if self.splits is not None:
            known["images"] = self.dataset(split).fingerprint
        return known

    def dataset(self, split: str) -> LabelledImages:
        """The images of `train` or `test`; InputError where no data was given."""
        if self.splits is None:
            raise InputError("no images: give --data_path (and --dataset).")
        return self.splits.train if split == "train" else self.splits.test

    def images_with_features(self) -> LabelledImages:
        """The images whose features there are: those of `train`, then those of `test`."""
        paths, labels = [], []
        for split in SPLITS:
            held = self.features(split)
            paths += [str(Path(held.root) / path) for path in held.paths]
            labels += held.labels.tolist()
        return LabelledImages("", paths, labels, held.classes)

    def _read(
        self, split: str, made_by: dict[str, str], blocks: int, avgpool: bool
    ) -> Features | None:
        """Kept features if they fit on every process, else None."""
        path, found = self.path(split), None
        if self.must_fit and not path.exists():
            kept = sorted(file.name for file in path.parent.glob("*.safetensors"))
            raise InputError(
                f"there are no features at {path}: {path.parent} holds {', '.join(kept) or 'none'}."
            )
        if path is not None and path.exists():
            try:
                found = feature_cache.load(path)
                reason = found.misfit(made_by, blocks, avgpool)
            except InputError as error:
                reason = str(error)
            if reason and self.must_fit:
                raise InputError(f"the features in {path} are refused: {reason}")
            if reason:
                logger.info(f"the features in {path} are made again: {reason}")
                found = None
        if not all(distributed.gather_objects(found is not None)):
            return None
        logger.info(f"features of the {split} split: from {path}")
        if self.splits is not None:
            # The same files, but perhaps under another root than when they were read.
            found = replace(found, root=str(self.dataset(split).root))
        return found

    def _make(self, split: str, made_by: dict[str, str], blocks: int, avgpool: bool) -> Features:
        network = self.encoder(blocks, avgpool)
        dataset = self.dataset(split)
        widths = network.widths(self.size)
        logger.info(f"extracting features of {len(dataset)} images, the {split} split")
        extracted = self.extract(network, dataset)
        features = Features(
            values=extracted.values,
            labels=extracted.labels,
            paths=[dataset.paths[place] for place in extracted.places],
            classes=dataset.classes,
            root=str(dataset.root),
            widths=widths,
            avgpool_patchtokens=network.avgpool_patchtokens,
            bad=[str(bad) for bad in extracted.bad],
            made_by=made_by,
        )
        if self.folder is not None:
            distributed.on_main(lambda: feature_cache.save(features, self.path(split)))
        return features

    def describe(self) -> list[str]:
        """What is evaluated on what, for the user."""
        lines = []
        if self.source is not None:
            lines.append(f"network: {self.network_line()}; pooling {self.cfg.EVAL.POOLING}")
        if self.splits is not None:
            train, test = self.splits.train, self.splits.test
            lines.append(
                f"data: {self.splits.name} in {self.cfg.DATA.PATH}, {len(train.classes)} classes, "
                f"{len(train)} training and {len(test)} test images"
            )
        return lines

    def network_line(self) -> str:
        """Architecture, image size, key and age of the network."""
        weights = self.source.weights
        parts = [weights.arch, f"{self.size} px of {self.resize}"]
        if weights.key != NO_KEY:
            parts.append(weights.key)
        if weights.epoch is not None and not weights.is_random:
            parts.append(f"epoch {weights.epoch}")
        return ", ".join(parts)

    def provenance(self) -> dict:
        """What stands behind a figure."""
        known = provenance(self.cfg, self.world, self.source, self.splits)
        if self.source is not None:
            known["image_size"] = {"crop": self.size, "resize": self.resize}
        if self._held:
            known["features"] = {
                split: {"images": len(held.labels), "made_by": held.made_by}
                for split, held in self._held.items()
            }
        if self.bad:
            known["unreadable_images"] = self.bad
        return known


def join(command: CommandLine) -> World:
    """Join the other processes, set up the lines on stdout, and tell the command's notes."""
    world = distributed.start(command.cfg.DEVICE, command.cfg.TRAIN.TIMEOUT_MINUTES)
    logging.setup(world.is_main)
    for note in command.notes:
        logger.warning(note)
    return world


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


def open_splits(cfg: Node) -> Splits | None:
    """DATA.*'s two splits, the same for all processes; None without DATA.PATH."""
    if not cfg.DATA.PATH:
        return None
    prepare(cfg.DATA.DATASET, cfg.DATA.PATH, cfg.DATA.DOWNLOAD)
    splits = load_splits(cfg.DATA.DATASET, cfg.DATA.PATH, cfg.DATA.PARTIAL)
    distributed.agree(
        {
            f"the images of the {split} split": getattr(splits, split).fingerprint
            for split in SPLITS
        },
        "give all of them the same --data_path",
    )
    for note in splits.notes:
        logger.warning(note)
    return splits


def open_evaluation(command: CommandLine, world: World) -> Evaluation:
    """The network and the data that a script's command line names, checked."""
    cfg = command.cfg
    if cfg.EVAL.LOAD_FEATURES and cfg.EVAL.DUMP_FEATURES:
        raise InputError("--load_features and --dump_features exclude each other: drop one.")
    if cfg.EVAL.LOAD_FEATURES and not Path(cfg.EVAL.LOAD_FEATURES).is_dir():
        raise InputError(f"there are no features at {cfg.EVAL.LOAD_FEATURES}: it is no folder.")
    if not cfg.EVAL.LOAD_FEATURES:
        if not cfg.INIT.WEIGHTS:
            raise InputError("no network: give --pretrained_weights.")
        if not cfg.DATA.PATH:
            raise InputError("no images: give --data_path.")
    if cfg.EVAL.DUMP_FEATURES:
        dump = Path(cfg.EVAL.DUMP_FEATURES)
        distributed.on_main(lambda: make_folder(dump, "--dump_features"))
    source = open_source(cfg.INIT.WEIGHTS, command) if cfg.INIT.WEIGHTS else None
    folder = cfg.EVAL.LOAD_FEATURES or cfg.EVAL.DUMP_FEATURES
    opened = build_evaluation(
        cfg,
        world,
        source,
        open_splits(cfg),
        Path(folder) if folder else None,
        must_fit=bool(cfg.EVAL.LOAD_FEATURES),
    )
    for line in opened.describe():
        logger.info(line)
    return opened


def open_source(path: str, command: CommandLine) -> Source:
    """The network at `path`, the same for all processes."""
    source = load_source(path, command.cfg.INIT.CHECKPOINT_KEY, command.cfg, command.typed)
    distributed.agree(
        {f"the contents of {path}": source.weights.sha256},
        "wait until nothing writes it, and give all of them the same file",
    )
    return source


def build_evaluation(
    cfg: Node,
    world: World,
    source: Source | None,
    splits: Splits | None,
    folder: Path | None,
    must_fit: bool = False,
) -> Evaluation:
    """An evaluation at the size of the source's run, unless EVAL.SIZE says another."""
    size = image_size(source, cfg.EVAL.SIZE) if source is not None else 0
    resize = cfg.EVAL.RESIZE or default_resize(size)
    if size and resize < size:
        raise InputError(
            f"EVAL.RESIZE {resize} is less than the centre crop of {size} pixels (EVAL.SIZE)."
        )
    made = Evaluation(cfg, world, source, splits, size, resize, folder, must_fit)
    if source is not None:
        source.network.to(world.device)
        made.encoder()  # a pooling that the network lacks is told before any work
    return made
