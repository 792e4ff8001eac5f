"""What a study's cells are judged against: random networks and the weights they start from."""

import json
from dataclasses import dataclass, replace

from engine import build
from engine.evaluation.source import Source, load_source, random_from_options
from engine.studies.spec import NOT_READ, RANDOM, START, Study
from models import registry
from utils import config
from utils.config import Node
from utils.options import FIGURES


@dataclass(frozen=True)
class UntrainedRow:
    """What all cells of one shape on one data set are judged against: a randomly initialised
    network, or the weights that they start from.

    shape: what decides its figures but the seed, the images and the protocol; plain data.
    """

    name: str
    data: str
    cells: tuple[str, ...]
    shape: dict

    @property
    def is_start(self) -> bool:
        return self.name.startswith(START)


def untrained_rows(study: Study) -> dict[str, UntrainedRow]:
    """By name: for each shape of network and data set a random one, and for each of the weights
    that cells of it start from one; named by what tells them apart."""
    groups: dict[tuple[str, str], list[str]] = {}
    for cell in study.cells.values():
        shape = json.dumps(_shape(study.config(cell.name)))
        groups.setdefault((cell.data, shape), []).append(cell.name)
    rows = {}
    for (data, shape), cells in groups.items():
        parts = [RANDOM] + [data] * (len(study.data) > 1)
        if sum(other == data for other, _ in groups) > 1:
            # Several networks on this set: named by the first cell of each.
            parts.append(cells[0])
        name, configs = "-".join(parts), [study.config(cell) for cell in cells]
        attends = _attending(configs)
        rows[name] = UntrainedRow(name, data, tuple(cells), json.loads(shape) | attends)
        starts: dict[str, list[str]] = {}
        for cell, cfg in zip(cells, configs, strict=True):
            if cfg.INIT.WEIGHTS:
                starts.setdefault(cfg.INIT.WEIGHTS, []).append(cell)
        for weights, those in starts.items():
            of = "-".join([START, *parts[1:], *those[: len(starts) > 1]])
            known = json.loads(shape) | {"weights": weights}
            rows[of] = UntrainedRow(of, data, tuple(those), known)
    return rows


def _shape(cfg: Node) -> dict:
    """What decides the figures of a random backbone but its seed."""
    # EVAL.SIZE as it is resolved.
    judged = [n for n in config.deciding(FIGURES) if n not in ("EVAL.SIZE", *NOT_READ)]
    return {
        "backbone": repr(registry.identity(build.backbone_spec(cfg))),
        "size": config.eval_size(cfg),
        "evaluation": {name: config.get(cfg, name) for name in judged},
    }


def _attending(configs: list[Node]) -> dict:
    """The shapes of the pooling and the branch that `untrained_source` adds; None for no such."""
    pooled = next((cfg for cfg in configs if build.objective(cfg).needs_pooling), None)
    branched = next((cfg for cfg in configs if build.objective(cfg).needs_rationale), None)
    return {
        # Prototypes have no part in a feature.
        "pooling": pooled and repr(replace(build.parts(pooled).heads, out_dim=0)),
        "branch": branched and branched.LCR.CHANNELS,
    }


def untrained_source(study: Study, row: UntrainedRow, seed: int) -> Source:
    """The network of a row: the backbone that its cells' runs begin with, and what attends.

    The pooling and LCR's branch of a random one are those of the first cell that has one, so that
    their attention too has its zero.
    """
    if row.is_start:
        cfg = study.config(row.cells[0])
        source = load_source(cfg.INIT.WEIGHTS, cfg.INIT.CHECKPOINT_KEY, cfg, ("MODEL.ARCH",))
        # At the pixels of the cells, which someone's file does not say.
        weights = replace(source.weights, image_size=config.eval_size(cfg))
        return replace(source, weights=weights)
    made, *others = (random_from_options(study.config(cell), seed) for cell in row.cells)
    network = made.network
    for other in (source.network for source in others):
        if network.pool is None and other.pool is not None:
            network.parts, network.pool = other.parts, other.pool
        network.rationale = network.rationale or other.rationale
    return made
