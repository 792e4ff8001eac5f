"""compare.py: a study of real runs, its resumption, its figures beside plain ones, its tables."""

import functools
import json
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import compare
from datasets.fine_grained import load_splits
from datasets.folder import load_image
from datasets.multicrop import eval_transform
from engine.evaluation import attention, pointing
from engine.evaluation.feature_cache import SplitFeatures
from engine.evaluation.features import Reading
from engine.evaluation.source import load_source
from engine.studies.evaluation import figures_and_zeros
from engine.studies.results import StudyResults
from engine.studies.runs import IDENTITY, STDOUT, run_of
from engine.studies.spec import load
from tests.conftest import Done
from tests.processes import PATIENCE, run_group, run_python, start_python
from tests.studies.studies import TINY, study_file
from utils import checkpoint, lock
from utils.distributed import ALONE
from utils.errors import run_script
from utils.files import write_json

pytestmark = pytest.mark.usefixtures("own_handlers")

ONE_SEED = TINY.replace("seeds: [0, 1]", "seeds: [0]")
TOTAL = 3 * 6  # steps of a run
MIDDLE = 2 * 6  # of them at its kept checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment) -> Path:
    """A folder with the study, the uninterrupted runs in `plain`, and the study's own in `out`.

    Another command has done esvit; one was killed in the middle of cmd, and goes on here.
    """
    folder = tmp_path_factory.mktemp("study")
    study, output = load(study_file(folder, ONE_SEED)), folder / "out"
    splits = compare.open_data(study, "small", None, output)
    for cell in study.cells:
        run = run_of(study, cell, 0, splits, output)
        run_python(*run.command[1:], environment=environment)
        write_json(run.folder / IDENTITY, run.identity)
    shutil.copytree(output / "runs", folder / "plain")
    killed = output / "runs/cmd/seed0"
    (killed / "checkpoint0002.pth").replace(killed / checkpoint.LAST)
    (killed / checkpoint.PREVIOUS).unlink()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        done = StudyResults(study, output)
        done.splits["small"] = splits
        compare.evaluate(done, run.cell, run.seed, ALONE, run)
        words = ["--study", study.path, "--output_dir", output]
        patch.setattr(sys, "argv", ["compare.py", *map(str, words)])
        run_script(compare.main)
    return folder


@pytest.fixture
def run_here(called) -> Callable[..., Done]:
    """compare.py in this process."""
    return functools.partial(called, compare)


def results(output: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (output / "results").iterdir()}


def figures(output: Path) -> dict[str, dict[str, float]]:
    return {name: result["figures"] for name, result in results(output).items()}


def tables(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())["figures"]


def test_a_study_leaves_every_cell_with_its_zeros_and_where_it_comes_from(finished):
    output = finished / "out"
    found = results(output)
    assert sorted(found) == ["cmd-seed0", "esvit-seed0", "random-seed0"]
    for name, result in found.items():
        labelled = {"knn_default", "knn_mean", "linear", "rank1", "map"}
        has = labelled | {f"coarse_{each}" for each in labelled}
        has |= {f"{each}_similarity" for each in ("pointing", "mass", "ratio")}
        if not name.startswith("esvit"):
            has |= {"knn_mil", "coarse_knn_mil", "pointing_mil", "mass_mil", "ratio_mil"}
        assert set(result["figures"]) == has, name
        assert set(result["zeros"]) >= has, name
        assert result["zeros"]["knn_default"] == 10
        assert result["zeros"]["coarse_linear"] == 50
        assert result["versions"]["torch"] == str(torch.__version__)
        if not name.startswith("random"):
            path = output / "runs" / result["name"] / f"seed{result['seed']}" / checkpoint.LAST
            assert result["checkpoint_sha256"] == checkpoint.sha256(path)
            assert result["pretraining"]["steps"] == TOTAL
    # Pretraining changes figures.
    assert found["esvit-seed0"]["figures"]["map"] != found["random-seed0"]["figures"]["map"]
    text = (output / "table.md").read_text()
    for title in ("chance", "random initialisation", "CMD", "esvit", "best fixed patch"):
        assert f"\n| {title} |" in text
    assert "difference to esvit" in text
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_stay_a_failing_one_is_named_and_a_random_row_of_other_shape_is_made_again(
    finished, run_here, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # no child comes further than its first line
    output = tmp_path / "out"
    shutil.copytree(finished / "out", output)
    random = output / "results/random-seed0.json"
    results_before = {p: p.stat().st_mtime_ns for p in (output / "results").glob("[!r]*.json")}
    # As of a study that had no cell with a pooling yet.
    kept = json.loads(random.read_text())
    kept["identity"]["network"]["pooling"] = None
    del kept["figures"]["knn_mil"]
    random.write_text(json.dumps(kept))
    checkpoints = {p: p.stat().st_mtime_ns for p in output.rglob("*.pth")}
    study = study_file(tmp_path, ONE_SEED.replace("cells:\n", "cells:\n  broken: {}\n"))
    code, out, err = run_here("--study", study, "--output_dir", output)
    assert code == 2
    assert "random-seed0.json is of another study and left out: network (was" in out
    assert "broken-seed0: exit code 1" in out
    assert "No module named 'encodings'" in out  # of the child's last lines
    assert err.startswith("error: 1 of the study's runs failed: broken-seed0")
    assert {p: p.stat().st_mtime_ns for p in results_before} == results_before
    assert {p: p.stat().st_mtime_ns for p in checkpoints} == checkpoints
    assert figures(output) == figures(finished / "out")


def copied(finished: Path, output: Path, name: str, seed: int, more: float) -> dict:
    """A result of seed 0 as one of another seed, all figures raised; written and returned."""
    found = results(finished / "out")[f"{name}-seed0"]
    found["identity"]["options"]["SEED"] = found["seed"] = seed
    found["figures"] = {key: value + more for key, value in found["figures"].items()}
    write_json(output / f"results/{name}-seed{seed}.json", found)
    return found


def test_tables_are_of_all_in_results_whoever_wrote_it_and_whenever(finished, tmp_path):
    output, study = tmp_path / "out", load(finished / "tiny.yaml")
    shutil.copytree(finished / "out/results", output / "results")
    (esvit := output / "results/esvit-seed0.json").rename(tmp_path / "later.json")
    done = StudyResults(study, output)
    assert ("esvit", 0) not in done.finished()
    # Another command ends a cell, and a third one that of a seed that this one was not asked for.
    (tmp_path / "later.json").rename(esvit)
    fifth = copied(finished, output, "cmd", 5, 2.0)["figures"]["map"]
    compare.write_tables(done)
    rows = {row["name"]: row for row in tables(output)["small"]["rows"]}
    assert rows["cmd"]["seeds"] == [0, 5]
    assert rows["cmd"]["figures"]["map"]["values"] == [fifth - 2.0, fifth]
    assert rows["esvit"]["seeds"] == [0]
    assert "seeds 0, 5" in (output / "table.md").read_text().splitlines()[0]


def test_tables_alone_are_those_of_the_run_and_run_nothing(finished, run_here, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished / "out", output, ignore=shutil.ignore_patterns("data", "*.pth"))
    for name in ("results.json", "table.md", "curves.png"):
        (output / name).unlink()
    code, _, err = run_here("--study", finished / "tiny.yaml", "--output_dir", output, "--table")
    assert (code, err) == (0, "")
    assert tables(output) == tables(finished / "out")
    assert (output / "curves.png").exists()
    assert not (output / "data").exists()
    code, _, err = run_here(
        "--study", finished / "tiny.yaml", "--output_dir", tmp_path / "empty", "--table"
    )
    assert code == 2
    assert "holds no finished cell" in err


def test_a_stopped_run_goes_on_from_its_checkpoint_to_what_it_would_have_been(finished):
    own, plain = finished / "out/runs/cmd/seed0", finished / "plain/cmd/seed0"
    assert f"checkpoint.pth at step {MIDDLE}" in (own / STDOUT).read_text()
    steps = [json.loads(line)["step"] for line in (own / "log.txt").read_text().splitlines()]
    assert steps == list(range(1, TOTAL + 1))
    weights = [checkpoint.load_own(run / checkpoint.LAST)["teacher"] for run in (own, plain)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_study_that_is_stopped_stops_its_runs_and_says_that_it_goes_on(
    finished, run_here, tmp_path
):
    output = tmp_path / "out"
    shutil.copytree(finished / "out", output)
    (output / "results/cmd-seed0.json").unlink()
    run = output / "runs/cmd/seed0"
    (run / STDOUT).unlink()

    def stop() -> None:
        while not (run / STDOUT).exists():
            time.sleep(0.01)
        time.sleep(0.5)  # in which the child, whose stdout it is, begins
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop, daemon=True)
    stopping.start()
    code, _, err = run_here("--study", finished / "tiny.yaml", "--output_dir", output)
    stopping.join()
    assert code == 75
    assert len(err.splitlines()) == 1
    assert "stopped by SIGTERM: what is done is in" in err
    assert not (output / "results/cmd-seed0.json").exists()
    lock.claim(run, "pretraining")  # its child is gone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_study_that_is_stopped_goes_on_to_the_same_figures(
    how, code, finished, run_here, environment, tmp_path
):
    output = tmp_path / "out"
    shutil.copytree(finished / "out/data", output / "data")
    words = ["--study", finished / "tiny.yaml", "--output_dir", output, "--cells", "cmd"]
    log = output / "runs/cmd/seed0/log.txt"
    process = start_python("compare.py", *words, environment=environment)
    deadline = time.monotonic() + PATIENCE
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline, "it does not train"
        assert process.poll() is None
        time.sleep(0.01)
    child = int((log.parent / ".pretraining.lock").read_text().split()[1])
    if how == signal.SIGKILL:
        os.kill(child, signal.SIGSTOP)
    process.send_signal(how)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, said
    assert not (output / "results/cmd-seed0.json").exists()
    if how != signal.SIGKILL:
        # The child is gone, and left a checkpoint in the middle.
        state = checkpoint.load_own(log.parent / checkpoint.LAST)
        assert 0 < state["step"] < TOTAL
        assert len(said.splitlines()) == 1
    again, _, err = run_here(*words)
    if how == signal.SIGKILL:
        # The child still trains: a second command is refused its folder until that has ended.
        assert f"process {child} on " in err
        os.kill(child, signal.SIGCONT)
        while again:
            assert time.monotonic() < deadline, "it does not end"
            again, _, err = run_here(*words)
    assert (again, err) == (0, "")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, TOTAL + 1))
    expected = figures(finished / "out")
    assert figures(output) == {name: expected[name] for name in ("cmd-seed0", "random-seed0")}


def test_a_study_is_one_process(environment, tmp_path):
    words = ["compare.py", "--study", study_file(tmp_path), "--output_dir", tmp_path / "out"]
    done = run_group(2, *words, environment=environment, code=2)
    assert "compare.py is one process and was started as 2: leave the launcher" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_changed_study_is_refused_by_what_differs(finished, run_here, tmp_path):
    words = ("--study", finished / "tiny.yaml", "--output_dir", finished / "out")
    code, _, err = run_here(*words, "TRAIN.BASE_LR", "0.01")
    assert code == 2
    assert "TRAIN.BASE_LR (was 0.05, now 0.01)" in err
    study = study_file(tmp_path, ONE_SEED.replace("k: 5", "k: 7"))
    code, _, err = run_here("--study", study, *words[2:])
    assert code == 2
    assert "evaluate (was" in err
    study = study_file(tmp_path, ONE_SEED.replace("class_cue: 0.5", "class_cue: 0.4"))
    code, _, err = run_here("--study", study, *words[2:], "--seeds", 2)
    assert code == 2
    assert "its class_cue differ" in err
    code, _, err = run_here(*words, "--processes", 2)
    assert code == 2
    assert "processes (was 1, now 2)" in err


def test_a_run_of_other_options_is_refused_before_anything_runs(finished, run_here, tmp_path):
    """Its result was removed, its folder was not."""
    output = tmp_path / "out"
    shutil.copytree(finished / "out", output, ignore=shutil.ignore_patterns("results*"))
    words = ("--study", finished / "tiny.yaml", "--output_dir", output)
    code, _, err = run_here(*words, "TRAIN.EPOCHS", 2)
    assert code == 2
    assert "runs/cmd/seed0 holds a run of another study: TRAIN.EPOCHS (was 3, now 2)." in err
    assert not (output / "results").exists()


def test_results_on_other_images_are_refused(finished, run_here, tmp_path):
    """A folder whose images changed since: the data are the user's own."""
    data, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(finished / "out/data/small", data)
    shutil.copytree(finished / "out/results", output / "results")
    before = load_splits("folder", str(data), False).test.fingerprint
    text = ONE_SEED.replace("{synthetic: {train: 48, val: 20, size: 64, class_cue: 0.5}}", "folder")
    study = study_file(tmp_path, text)
    one, other, *_ = data.glob("val/*/*.png")
    shutil.copy(one, other)
    words = ("--study", study, "--output_dir", output)
    code, _, err = run_here(*words, "--data_path", data)
    assert code == 2
    assert "images (was" in err
    assert before[:20] in err
    code, _, err = run_here(*words)
    assert code == 2
    assert "give --data_path" in err
    inside = data / "val" / "study"
    code, _, err = run_here("--study", study, "--output_dir", inside, "--data_path", data)
    assert code == 2
    assert "choose a folder outside of it" in err
    assert not inside.exists()


# --- figures --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(finished):
    """What stands behind cmd-seed0: its source, options and splits; and its figures."""
    root, study = finished / "out/data/small", load(finished / "tiny.yaml")
    cfg = study.config("cmd", 0)
    cfg.DATA.PATH = str(root)
    path = finished / "out/runs/cmd/seed0" / checkpoint.LAST
    splits = load_splits("folder", str(root), False)
    return path, load_source(path), cfg, splits, study


def plain_knn(gallery, gallery_labels, queries, query_labels, k: int, t: float = 0.07) -> float:
    """Percent: a vote of exp(cosine / t) from each of the k nearest; the first of equals."""
    gallery, queries = F.normalize(gallery, dim=1), F.normalize(queries, dim=1)
    hits = 0
    for query, label in zip(queries, query_labels, strict=True):
        cosines = gallery @ query
        votes: dict[str, float] = {}
        for place in cosines.argsort(descending=True, stable=True)[:k].tolist():
            name = gallery_labels[place]
            votes[name] = votes.get(name, 0) + float((cosines[place] / t).exp())
        hits += max(sorted(votes), key=votes.get) == label
    return 100 * hits / len(query_labels)


@pytest.mark.parametrize("pooling", ["default", "mean", "mil"])
def test_fine_and_coarse_figures_are_those_of_plain_code_on_the_same_features(
    pooling, judged, finished
):
    _, source, cfg, splits, _ = judged
    features = SplitFeatures(source, splits, Reading.of(cfg, ALONE, source), pooling)
    train, test = features.of("train"), features.of("test")
    expected = figures(finished / "out")["cmd-seed0"]
    for prefix, name_of in (
        ("", lambda p: p.split("/")[0]),
        ("coarse_", lambda p: p.split("_")[0]),
    ):
        labels = [[name_of(path) for path in split.paths] for split in (train, test)]
        found = plain_knn(train.values, labels[0], test.values, labels[1], 5)
        assert found == pytest.approx(expected[f"{prefix}knn_{pooling}"])
        if pooling == "default":
            nearest = plain_knn(train.values, labels[0], test.values, labels[1], 1)
            assert nearest == pytest.approx(expected[f"{prefix}rank1"])


def test_pointing_figures_are_those_of_the_maps(judged, finished):
    path, _, cfg, splits, _ = judged
    network, size = load_source(path).network, cfg.AUG.GLOBAL_CROPS_SIZE
    files = [splits.test.root / name for name in splits.test.paths]
    boxes, box_size = pointing.part_boxes(files)
    grid, cell = network.backbone.patch_grid(size, size), network.backbone.stride / size
    touching = pointing.cells_touching(boxes, grid, cell * box_size)
    images = torch.stack([eval_transform(size, size)(load_image(file)) for file in files])
    expected = pointing.figures(attention.attention_map(network, images, "mil"), touching)
    found = results(finished / "out")["cmd-seed0"]
    assert found["figures"]["pointing_mil"] == expected["accuracy"]
    assert found["figures"]["mass_mil"] == pytest.approx(expected["mass_on_part"])
    assert found["zeros"]["pointing_mil"] == expected["chance"]
    assert found["zeros"]["fixed_mil"] == expected["best_fixed_cell"]
    ratio = expected["mass_on_part"] / expected["chance"]
    assert found["figures"]["ratio_mil"] == pytest.approx(ratio)


def test_poolings_that_a_network_lacks_are_left_out(judged):
    _, source, cfg, splits, study = judged
    protocol = replace(study.protocol, poolings=("default", "mil", "lcr"), k=10**4)
    reading = Reading.of(cfg, ALONE, source)
    found, zeros, remarks = figures_and_zeros(source, splits, reading, cfg, protocol)
    pooled = {f"{level}knn_{name}" for level in ("", "coarse_") for name in ("default", "mil")}
    assert pooled == {name for name in found if "knn" in name} == {n for n in zeros if "knn" in n}
    assert pooled == remarks.keys()
    assert "and all of them vote" in remarks["knn_mil"][0]


def test_the_written_table_says_what_its_json_says(finished, run_here, tmp_path):
    shutil.copytree(finished / "out/results", tmp_path / "out/results")
    copied(finished, tmp_path / "out", "cmd", 1, 3.0)
    path = tmp_path / "out/results/cmd-seed0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"remarks": {"linear": ["hm"]}}))
    words = ("--study", finished / "tiny.yaml", "--output_dir", tmp_path / "out", "--table")
    assert run_here(*words)[0] == 0
    rows = {row["name"]: row for row in tables(tmp_path / "out")["small"]["rows"]}
    text = (tmp_path / "out/table.md").read_text()
    fine = text.split("### Fine classes\n")[1].split("###")[0].splitlines()
    heads = [cell.strip() for cell in fine[1].strip("|").split("|")]
    assert heads == ["", "5-NN", "5-NN, mean", "5-NN, mil", "linear", "Rank-1", "mAP"]
    cells = {
        line.split("|")[1].strip(): line.strip("|").split("|")[1:] for line in fine[3:] if line
    }
    each = figures(tmp_path / "out")
    values = [each[f"cmd-seed{seed}"]["map"] for seed in (0, 1)]
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    assert cells["CMD"][5].strip() == f"{mean:.2f} ± {deviation:.2f}"
    assert rows["cmd"]["figures"]["map"]["values"] == values
    assert cells["esvit (seed 0)"][2].strip() == "–"
    assert cells["CMD"][3].endswith(" \\* ")
    assert "- \\* linear of cmd, seed 0: hm" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--cells", "cmd,esvt"], "--cells: there is no 'esvt'. Did you mean esvit?"),
        (["TRAIN.EPOHCS", "3"], "Did you mean TRAIN.EPOCHS?"),
        (["TRAIN.EPOCHS", "0"], "cell cmd: TRAIN.EPOCHS must be at least 1"),
        (["--jobs", "0"], "--jobs: must be a whole number from 1"),
        (["--tabel"], "--tabel"),
    ],
)
def test_a_typo_on_the_command_line_is_one_sentence(words, sentence, run_here, tmp_path):
    code, _, err = run_here(
        "--study", study_file(tmp_path), "--output_dir", tmp_path / "out", *words
    )
    assert code == 2
    assert len(err.splitlines()) == 1
    assert sentence in err
    assert not (tmp_path / "out").exists()


def test_a_cell_that_is_named_twice_runs_once(monkeypatch, tmp_path):
    words = ["--study", study_file(tmp_path), "--output_dir", tmp_path, "--cells", "cmd,esvit,cmd"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words), "cmd"])
    assert compare.parse()[0].cells == ["cmd", "esvit"]


@pytest.mark.slow
def test_cells_side_by_side_by_torchrun_and_one_that_fails(run_here, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    text = TINY.replace("cells:\n", "cells:\n  broken: {INIT.WEIGHTS: /nowhere.pth}\n")
    words = ("--study", study_file(tmp_path, text), "--output_dir", tmp_path / "out")
    code, out, err = run_here(*words, "--cells", "broken,cmd", "--jobs", 2, "--processes", 2)
    assert code == 2
    assert "broken-seed0: exit code 1" in out  # torchrun's
    assert "/nowhere.pth" in (tmp_path / "out/runs/broken/seed0" / STDOUT).read_text()
    # And the row of the weights that it starts from.
    failed = "start-seed0 (there is no checkpoint at /nowhere.pth.); broken-seed0 (exit code 1"
    assert err.startswith(f"error: 3 of the study's runs failed: {failed}")
    found = figures(tmp_path / "out")
    assert found["cmd-seed0"] != found["cmd-seed1"]
    for seed in (0, 1):
        folder = tmp_path / f"out/runs/cmd/seed{seed}"
        assert checkpoint.load_own(folder / checkpoint.LAST)["processes"] == 2
