"""What the README tells people to type works."""

import re
import sys

import pytest

import compare
from tests.processes import ROOT, run_python
from utils import cli, config

README = (ROOT / "README.md").read_text()


def test_the_python_snippet_gives_image_and_patch_features(trained, environment, tmp_path):
    """The snippet as it stands, in a folder where OUT is a run's."""
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    (tmp_path / "OUT").symlink_to(trained)
    run = run_python("-c", snippet, environment=environment, folder=tmp_path)
    # 224 pixels in patches of 8: 28 x 28.
    assert run.stdout.split() == ["torch.Size([2,", "32])", "torch.Size([2,", "784,", "32])"]


def commands(text: str, script: str = "main_cmd.py") -> list[list[str]]:
    """Command lines for a script in fenced blocks or comments, continuation lines joined."""
    text = re.sub(r"\\\n[# ]*", " ", text)
    lines = re.findall(rf"^[# ]*((?:python|torchrun) .*?{script} .*)$", text, flags=re.M)
    return [line.split(script, 1)[1].split("  #")[0].split() for line in lines]


STUDIES = sorted((ROOT / "experiments/studies").glob("*.yaml"))
EXPERIMENTS = sorted(set((ROOT / "experiments").rglob("*.yaml")) - set(STUDIES))
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "docs/speed.md",
    ROOT / "docs/start_from_weights.md",
    ROOT / "experiments/slurm/README.md",
    *EXPERIMENTS,
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_written_command_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(path.read_text())
    assert found, f"{path.name} shows no command"
    for arguments in found:
        cfg = cli.parse("", arguments).cfg
        assert cfg.DATA.PATH or "--cfg" in arguments


@pytest.mark.parametrize(
    ("script", "face", "source"),
    [
        ("eval_knn.py", cli.KNN, "INIT.WEIGHTS"),
        ("eval_retrieval.py", cli.RETRIEVAL, "INIT.WEIGHTS"),
        ("eval_linear.py", cli.LINEAR, "INIT.WEIGHTS"),
        ("evaluate.py", cli.TABLE, "--checkpoint"),
    ],
)
def test_every_written_evaluation_parses(script, face, source, monkeypatch):
    monkeypatch.chdir(ROOT)
    pages = ("docs/evaluation.md", "docs/start_from_weights.md", script)
    texts = [README, *((ROOT / page).read_text() for page in pages)]
    # Docstrings write a continuation's backslash twice.
    found = [words for text in texts for words in commands(text.replace("\\\\", "\\"), script)]
    assert found, f"no document shows a command of {script}"
    for arguments in found:
        command = cli.parse("", arguments, face)
        assert command.cfg.DATA.PATH, arguments
        given = command.extra.get(source) or config.get(command.cfg, "INIT.WEIGHTS")
        assert given, arguments


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_is_valid_and_names_itself(path):
    cfg = config.defaults()
    config.merge_file(cfg, path)
    config.check(cfg)
    assert path.relative_to(ROOT).as_posix() in path.read_text()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_opens_with_its_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    opening = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    found = commands(opening, "compare.py")
    assert found, f"{path.name} shows no command"
    for words in found:
        monkeypatch.setattr(sys, "argv", ["compare.py", *words])
        arguments, study = compare.parse()
        assert arguments.study == path.relative_to(ROOT)
        needs_folder = any(data.images is None for data in study.data.values())
        assert (arguments.data_path is not None) == needs_folder


def test_the_experiments_hold_esvits_names():
    names = {path.name for path in (ROOT / "experiments/imagenet/swin").iterdir()}
    assert names >= {
        f"swin_{size}_patch4_window{window}_224.yaml"
        for size, window in (
            ("tiny", 7),
            ("tiny", 14),
            ("small", 7),
            ("small", 14),
            ("base", 7),
            ("base", 14),
            ("large", 7),
        )
    }


def test_every_result_that_is_listed_is_there():
    listed = set(
        re.findall(r"`(\d{4}-\d\d-\d\d-\S+\.json)`", (ROOT / "benchmarks/README.md").read_text())
    )
    assert listed == {path.name for path in (ROOT / "benchmarks/results").glob("*.json")}
