"""docs/fidelity.md names tests and options that exist; small tests of what no other file holds."""

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import BackboneSpec, build_backbone
from tests.processes import found_by_each, launch_python
from utils import config
from utils.distributed import World, wrap
from utils.options import OPTIONS

ROOT = Path(__file__).parents[1]
FIDELITY = (ROOT / "docs/fidelity.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# `FILE.py::NAME`, as pytest writes it; the identity of a case may follow.
TEST = re.compile(r"`(?:tests/)?([\w/]+\.py)::(\w+)(?:\[[^`]*\])?`")
# `SECTION.KEY` or `SECTION.KEY VALUE`, and options without a section with a value.
OPTION = re.compile(r"`([A-Z]+(?:\.[A-Z][A-Z0-9_]*)+|[A-Z]{4,}(?= ))(?: ([^`]+))?`")


# The document


@functools.cache
def functions(path: Path) -> set[str]:
    """The functions that a file defines at its outermost level."""
    return {
        node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    }


def test_every_test_that_is_named_exists():
    named = TEST.findall(FIDELITY)
    assert len(named) > 50
    for file, name in named:
        assert (ROOT / "tests" / file).is_file(), file
        assert name.startswith("test_"), name
        assert name in functions(ROOT / "tests" / file), f"{file}::{name}"


def test_every_row_names_a_test():
    rows = [line for line in FIDELITY.splitlines() if line.startswith("| ")]
    assert len(rows) > 60
    for row in rows:
        assert row.endswith(" test |") or TEST.search(row.rsplit(" | ", 1)[1]), row


def test_every_option_that_is_named_takes_the_value_beside_it():
    named = OPTION.findall(FIDELITY)
    assert len(named) > 30
    for key, value in named:
        cfg = config.defaults()
        assert key in OPTIONS, key
        if value:
            config.put(cfg, key, value, "docs/fidelity.md")
            config.check(cfg)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_of_tests_that_a_document_names_exists(path):
    for name in re.findall(r"\b(?:tests/)?((?:\w+/)?test_\w+\.py)\b", path.read_text()):
        assert (ROOT / "tests" / name).is_file(), f"{path.name} names {name}"


# What no other file tests


def test_position_embeddings_keep_the_row_that_a_scale_factor_loses():
    """61 patches from 28: 28 * (61 / 28) is 60.999..., of which interpolation keeps 60."""
    torch.manual_seed(0)
    spec = BackboneSpec("vit_small", 12, (1,), (1,), patch_size=8, img_size=224)
    backbone = build_backbone(spec)
    stored = backbone.pos_embed[:, 1:].unflatten(1, (28, 28)).permute(0, 3, 1, 2)
    by_factor = F.interpolate(stored, scale_factor=61 / 28, mode="bicubic")
    assert by_factor.shape[2:] == (60, 60)
    with torch.no_grad():
        _, patches = backbone(torch.zeros(1, 3, 8 * 61, 8 * 61))
        resized = backbone._position_embeddings(61, 61)
    assert patches.shape[1] == 61 * 61
    expected = F.interpolate(stored, size=(61, 61), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(resized, torch.cat([backbone.pos_embed[:, :1], expected], dim=1))


def statistics_of(world: World) -> dict[str, Tensor]:
    """A BatchNorm's running mean after two forwards of values that tell the rank."""
    norm = wrap(nn.BatchNorm1d(1, momentum=0.5), world)
    for _ in range(2):
        norm(torch.full((4, 1), float(world.rank)))
    return {"mean": norm.module.running_mean}


def test_batchnorm_of_cpu_processes_has_statistics_of_their_own():
    for rank, found in enumerate(found_by_each(2, statistics_of)):
        assert found["mean"].item() == 0.75 * rank


CHOSEN = """
import os
before = dict(os.environ)
import main_cmd
from utils import distributed
print(distributed.start("cpu").device, before == dict(os.environ))
"""


@pytest.mark.slow
def test_the_choice_of_gpus_is_left_to_the_launcher(environment):
    """Neither the script's imports nor joining the processes change what it shows."""
    done = launch_python("-c", CHOSEN, environment={**environment, "CUDA_VISIBLE_DEVICES": "7"})
    assert done.stdout.splitlines()[-1] == "cpu True"
