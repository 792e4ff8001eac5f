"""A tiny study of real runs, and places for its images."""

from pathlib import Path

from datasets.folder import LabelledImages
from datasets.splits import Splits
from engine.studies.spec import ROOT

STUDIES = sorted((ROOT / "experiments/studies").glob("*.yaml"))
TINY = """
data:
  small: {synthetic: {train: 48, val: 20, size: 64, class_cue: 0.5}}
base: experiments/smoke.yaml
options:
  TRAIN: {EPOCHS: 3, BATCH_SIZE_PER_GPU: 8, WARMUP_EPOCHS: 0, BASE_LR: 0.05}
  AUG.LOCAL_CROPS_NUMBER: []
  PRINT_FREQ: 1
  CKPT.KEEP_EVERY: 2
  DEVICE: cpu
seeds: [0, 1]
cells:
  cmd: {title: CMD}
  esvit: {LOSS.OBJECTIVE: esvit}
evaluate: {poolings: [default, mean, mil], k: 5, baseline: esvit}
"""

PLACES = Splits(
    "",
    LabelledImages("/data/train", [], [], []),
    LabelledImages("/data/val", [], [], []),
    [],
)


def study_file(folder: Path, text: str = TINY, name: str = "tiny.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path
