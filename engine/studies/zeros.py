"""Randomly initialised networks of a study: the zero of every figure of its cells."""

import json
from dataclasses import dataclass, replace

from engine import build
from engine.evaluation.source import Source, random_from_options
from engine.studies.spec import NOT_READ, RANDOM, Study
from models import registry
from utils import config
from utils.config import Node
from utils.options import FIGURES


@dataclass(frozen=True)
class RandomRow:
    """A randomly initialised network: the zero of all cells of one shape on one data set.

    shape: what decides its figures but the seed, the images and the protocol; plain data.
    """

    name: str
    data: str
    cells: tuple[str, ...]
    shape: dict


def random_rows(study: Study) -> dict[str, RandomRow]:
    """By name: one for each shape of network and data set, named by what tells them apart."""
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
        name = "-".join(parts)
        attends = _attending([study.config(cell) for cell in cells])
        rows[name] = RandomRow(name, data, tuple(cells), json.loads(shape) | attends)
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
    """The shapes of the pooling and the branch that `random_source` adds; None for no such."""
    pooled = next((cfg for cfg in configs if build.objective(cfg).needs_pooling), None)
    branched = next((cfg for cfg in configs if build.objective(cfg).needs_rationale), None)
    return {
        # Prototypes have no part in a feature.
        "pooling": pooled and repr(replace(build.head_spec(pooled), out_dim=0)),
        "branch": branched and branched.LCR.CHANNELS,
    }


def random_source(study: Study, row: RandomRow, seed: int) -> Source:
    """The network of a row: the backbone that its cells' runs begin with, and what attends.

    The pooling and LCR's branch are those of the first cell that has one, so that their
    attention too has its zero.
    """
    made, *others = (random_from_options(study.config(cell), seed) for cell in row.cells)
    network = made.network
    for other in (source.network for source in others):
        if network.pool is None and other.pool is not None:
            network.head_spec = other.head_spec
            network.head_dense, network.pool = other.head_dense, other.pool
        network.rationale = network.rationale or other.rationale
    return made
