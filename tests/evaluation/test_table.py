"""evaluate.py: its table against the three evaluation scripts run one by one."""

import hashlib
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from models.registry import BackboneSpec, build_backbone
from tests.evaluation.runs import contents, refusal, results, works, write_data
from tests.processes import run_group
from tests.runs import copy_of

COMMON = "--batch_size_per_gpu 16"
PROBE = "--n_last_blocks 2 --epochs 3 --lr 0.1"
PROTOCOLS = f"{COMMON} {PROBE} --nb_knn 3 5 --label_shares 0.5 1"
OPTIONS = f"{PROTOCOLS} --seed 3 --seeds 2"
HEADINGS = [
    "network",
    "3-NN top-1",
    "linear top-1",
    "linear top-1, 50 % of labels",
    "Rank-1",
    "Rank-5",
    "mAP",
]
KEYS = ["knn_3", "linear_1", "linear_0.5", "rank1", "rank5", "map"]


class Table:
    """What evaluate.py wrote."""

    def __init__(self, folder: Path, out: str) -> None:
        self.folder, self.out = folder, out
        self.text = (folder / "table.md").read_text()
        self.results = results(folder, "results")
        self.rows = self.results["rows"]
        lines = [line for line in self.text.splitlines() if line.startswith("|")]
        cells = [line.replace("\\|", "PIPE").strip("|").split("|") for line in lines]
        cells = [[cell.strip().replace("PIPE", "|") for cell in line] for line in cells]
        self.headings, self.cells = cells[0], cells[2:]

    @property
    def figures(self) -> list[dict]:
        return [row["figures"] for row in self.rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), classes=3, train=8, test=7)


@pytest.fixture(scope="module")
def checkpoints(trained, tmp_path_factory) -> list[Path]:
    """The end of a run, and its first epoch under a name that a table cannot hold as it is."""
    early = tmp_path_factory.mktemp("early") / "first|epoch.pth"
    shutil.copy(trained / "checkpoint0001.pth", early)
    return [trained / "checkpoint.pth", early]


def table(folder: Path, checkpoints: list[Path], data: Path, options: str = OPTIONS) -> Table:
    words = ["--checkpoint", *checkpoints, "--data_path", data, "--output_dir", folder, options]
    return Table(folder, works("table", *words))


@pytest.fixture(scope="module")
def made(tmp_path_factory, checkpoints, data) -> Table:
    return table(tmp_path_factory.mktemp("table"), checkpoints, data)


def test_every_checkpoint_and_a_random_network_have_a_row(made, checkpoints):
    assert made.headings == HEADINGS
    names = [*map(str, checkpoints), "random initialisation (vit_small, 32 px)"]
    assert [line[0] for line in made.cells] == names
    assert [row["name"] for row in made.rows] == names
    assert "first\\|epoch.pth" in made.text


def test_the_cells_are_means_and_deviations_of_the_values(made):
    for line, figures in zip(made.cells, made.figures, strict=True):
        for cell, key in zip(line[1:], KEYS, strict=True):
            values = figures[key]["values"]
            expected = f"{statistics.fmean(values):.2f}"
            if len(values) > 1:
                expected += f" ± {statistics.stdev(values):.2f}"
                assert figures[key]["std"] == pytest.approx(statistics.stdev(values))
            assert cell == expected
            assert figures[key]["mean"] == pytest.approx(statistics.fmean(values))
    shown = {cell for line in made.cells for cell in line[1:]}
    assert len(shown) > 8, "figures that hardly differ show nothing"


def test_only_what_a_seed_decides_has_a_deviation(made):
    *of_checkpoints, of_random = made.figures
    for figures in of_checkpoints:
        for key, figure in figures.items():
            is_probe = key.startswith("linear")
            assert len(figure["values"]) == (2 if is_probe else 1), key
            assert (figure["std"] is None) != is_probe, key
    for key, figure in of_random.items():
        assert len(figure["values"]) == 2, key
        assert figure["std"] is not None
    assert len(set(of_random["map"]["values"])) == 2, "each seed has a network of its own"


def test_the_scripts_one_by_one_give_the_same_figures(made, checkpoints, data, tmp_path):
    for checkpoint, figures in zip(checkpoints, made.figures, strict=False):
        out = tmp_path / checkpoint.stem
        words = f"--pretrained_weights {checkpoint} --data_path {data} --output_dir {out} {COMMON}"
        works("knn", words, "--nb_knn 3 5 EVAL.PICTURES false")
        knn = results(out, "knn")["k"]
        for k in (3, 5):
            assert figures[f"knn_{k}"]["values"] == [knn[str(k)]["top1"]]
            assert figures[f"knn_{k}_top5"]["values"] == [knn[str(k)]["top5"]]
        works("retrieval", words, "EVAL.PICTURES false")
        retrieval = results(out, "retrieval")
        for name in ("rank1", "rank5", "map", "map_at_100_released"):
            assert figures[name]["values"] == [retrieval[name]]
        for place, seed in enumerate((3, 4)):
            own = f"--output_dir {out}/{seed} --seed {seed} --label_shares 0.5 1"
            works("linear", words, PROBE, own)
            half, whole = results(out / str(seed), "linear")["results"]
            assert figures["linear_0.5"]["values"][place] == half["top1"]
            assert figures["linear_1"]["values"][place] == whole["top1"]


def test_the_table_says_what_stands_behind_it(made, checkpoints):
    command = made.text.split("- command: `")[1].split("`")[0]
    assert command.startswith("python evaluate.py --checkpoint ")
    assert str(checkpoints[0]) in command
    commit = made.results["commit"]
    assert f"- commit: {commit or 'unknown'}" in made.text
    assert f"torch {torch.__version__}" in made.text
    for checkpoint, row in zip(checkpoints, made.rows, strict=False):
        digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        assert row["weights"]["sha256"] == digest
        assert f"sha256 {digest}" in made.text
    assert "teacher, epoch 4, " in made.text
    assert "teacher, epoch 1, " in made.text
    assert "32 px of 37" in made.text
    assert "3 classes, 24 training and 21 test images" in made.text
    assert "all of them vote" not in made.text
    changed = made.text.split("- options that are not the defaults: ")[1].splitlines()[0]
    assert "EVAL.SEEDS 2" in changed
    assert "LINEAR.EPOCHS 3" in changed
    assert "LINEAR.CLASSIFIER" not in changed
    assert made.results["config"]["LINEAR"]["EPOCHS"] == 3
    assert made.rows[0]["weights"]["run_config"]["SEED"] == 3


def test_the_same_command_takes_up_what_is_there(made, checkpoints, data, tmp_path):
    folder = copy_of(made.folder, tmp_path / "copy")
    kept = sorted([*folder.rglob("*.safetensors"), *folder.rglob("linear.pth")])
    # Two checkpoints and two random networks: two splits, two seeds, two shares.
    assert len(list(folder.rglob("*.safetensors"))) == 2 * 4
    assert len(list(folder.rglob("linear.pth"))) == 2 * 2 * 2 + 2 * 2
    before = [path.stat().st_mtime_ns for path in kept]
    again = table(folder, checkpoints, data)
    assert again.out.count("features of the test split: from") == 4
    assert again.out.count("features of the train split: from") == 4
    assert again.out.count("going on with the probe") == 12
    assert again.figures == made.figures
    assert again.cells == made.cells
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_a_table_with_another_checkpoint_keeps_the_rows_it_has(made, checkpoints, data, tmp_path):
    folder = copy_of(made.folder, tmp_path / "copy")
    other = checkpoints[0].with_name("checkpoint0002.pth")
    longer = table(folder, [other, *checkpoints], data)
    assert longer.figures[1:] == made.figures
    # Its teacher has hardly moved, so its figures may be another's: the file tells.
    assert longer.rows[0]["weights"]["sha256"] == hashlib.sha256(other.read_bytes()).hexdigest()
    assert longer.out.count("going on with the probe") == 12


def test_cached_features_and_the_student_and_one_seed(made, checkpoints, data, tmp_path):
    options = f"{PROTOCOLS} --seed 3 --seeds 1 --features cached --checkpoint_key student"
    short = table(tmp_path / "table", checkpoints[:1], data, options)
    assert short.cells[0][0] == f"{checkpoints[0]} (student)"
    assert all(figure["std"] is None for row in short.figures for figure in row.values())
    assert "±" not in "".join(cell for line in short.cells for cell in line)
    assert short.figures[0]["map"] != made.figures[0]["map"]
    # The zero of every figure is that of the teacher's table, for the same seed.
    assert short.figures[1]["map"]["values"] == made.figures[2]["map"]["values"][:1]
    words = f"--pretrained_weights {checkpoints[0]} --data_path {data} --output_dir {tmp_path}"
    works("linear", words, COMMON, PROBE, "--seed 3 --features cached --checkpoint_key student")
    (alone,) = results(tmp_path, "linear")["results"]
    assert short.figures[0]["linear_1"]["values"] == [alone["top1"]]


def test_other_classifiers_and_splits_say_so(checkpoints, data, tmp_path):
    options = f"{COMMON} --n_last_blocks 2 --nb_knn 20 3 --seeds 1 --classifier logistic"
    other = table(tmp_path / "table", checkpoints[:1], data, f"{options} --split ratio")
    assert other.headings[1:] == [
        "20-NN top-1",
        "logistic top-1",
        "Rank-1 (ratio split)",
        "Rank-5 (ratio split)",
        "mAP (ratio split)",
    ]
    words = f"--pretrained_weights {checkpoints[0]} --data_path {data} --output_dir {tmp_path}"
    works("retrieval", words, "--split ratio EVAL.PICTURES false")
    retrieval = results(tmp_path, "retrieval")
    assert retrieval["queries"] == 3
    assert other.figures[0]["map"]["values"] == [retrieval["map"]]
    works("linear", words, COMMON, "--n_last_blocks 2 --classifier logistic")
    top1 = results(tmp_path, "linear")["results"][0]["top1"]
    assert other.figures[0]["linear_1"]["values"] == [top1]
    assert f"{top1:.2f}" == other.cells[0][2]


def test_what_qualifies_a_figure_stands_beside_it(data, tmp_path):
    plain = plain_network(tmp_path / "plain.pth", depth=2)
    options = f"{COMMON} {PROBE} --size 32 --nb_knn 30 --seeds 1 --features cached"
    found = table(tmp_path / "table", [plain], data, f"{options} EVAL.POOLING mean")
    ((name, knn, probe, *_), _) = found.cells
    assert knn.endswith(" \\*")
    assert probe.endswith(" \\*")
    assert not found.cells[0][-1].endswith("*"), "retrieval has no doubt of its own"
    remarks = found.figures[0]["knn_30"]["remarks"]
    assert remarks == ["30-NN: the gallery has 24 images, and all of them vote"]
    assert f"- \\* 30-NN top-1 of {name}: {remarks[0]}" in found.text
    assert f"  30-NN top-1: {knn[:-3]} %; {remarks[0]}\n" in found.out
    assert "features of 1 block, not of 2" in found.figures[0]["linear_1"]["remarks"][0]
    # What the file does not say of the network is of all its figures.
    (doubt,) = found.rows[0]["weights"]["doubts"]
    assert "1 attention heads are taken" in doubt
    assert f"; {doubt}" in found.text
    assert f"warning: {plain}: {doubt}" in found.out
    assert "doubts" in found.rows[1]["weights"]
    again = table(tmp_path / "again", [plain], data, f"{options} MODEL.NUM_HEADS [1]")
    assert again.rows[0]["weights"]["doubts"] == []


@pytest.mark.parametrize(
    ("depth", "words", "said"),
    [
        (0, "", "FILE"),
        (2, "--pooling mil", "FILE"),
        (1, "--size 32", "LINEAR.N_LAST_BLOCKS"),
    ],
    ids=["no file", "no such pooling", "too few blocks"],
)
def test_what_one_network_lacks_is_told_before_any_work(
    depth, words, said, checkpoints, data, tmp_path
):
    file = tmp_path / "second.pth"
    if depth:
        plain_network(file, depth)
    given = f"--checkpoint {checkpoints[0]} {file} --data_path {data} {OPTIONS} {words}"
    line = refusal("table", given, f"--output_dir {tmp_path}/out")
    assert said.replace("FILE", str(file)) in line
    assert contents(tmp_path / "out") == {}


def test_rows_of_different_sizes_are_said_to_be_no_comparison(checkpoints, data, tmp_path):
    """The run's own crops have 32 pixels; of weights alone nobody knows."""
    plain = plain_network(tmp_path / "plain.pth", depth=2)
    options = f"{PROTOCOLS} --features cached --epochs 1".replace("--label_shares 0.5 1", "")
    mixed = table(tmp_path / "mixed", [checkpoints[0], plain], data, options)
    assert "here 32 and 224 pixels" in mixed.out
    assert [row["image_size"]["crop"] for row in mixed.rows[:2]] == [32, 224]
    alike = table(tmp_path / "alike", [checkpoints[0], plain], data, f"{options} EVAL.SIZE 32")
    assert "pixels: rows of different sizes" not in alike.out


def plain_network(path: Path, depth: int) -> Path:
    """A file of weights that another project could have written."""
    spec = BackboneSpec("vit_small", 64, (depth,), (1,), patch_size=8, img_size=32)
    torch.save({"teacher": build_backbone(spec).state_dict()}, path)
    return path


@pytest.mark.parametrize("lacks", ["--checkpoint", "--data_path", "--output_dir"])
def test_what_is_not_given_is_asked_for(lacks, checkpoints, data, tmp_path):
    given = {"--checkpoint": checkpoints[0], "--data_path": data, "--output_dir": tmp_path}
    line = refusal("table", *(f"{flag} {at}" for flag, at in given.items() if flag != lacks))
    assert f"give {lacks}." in line
    assert contents(tmp_path) == {}


def test_two_processes_make_the_same_table(made, checkpoints, data, tmp_path, environment):
    options = OPTIONS.replace("--batch_size_per_gpu 16", "--batch_size_per_gpu 8")
    words = ["--checkpoint", *checkpoints, "--data_path", data, "--output_dir", tmp_path]
    words += f"{options} --device cpu --num_workers 0".split()
    done = run_group(2, "evaluate.py", *words, environment=environment)
    both = Table(tmp_path, done.stdout)
    assert both.results["processes"] == 2
    assert both.cells == made.cells
    assert done.stdout.count(f"{checkpoints[0]}: vit_small, 32 px of 37, teacher, epoch") == 1
