"""The plan for one GPU, by real processes, here of seconds; what goes along in a bundle."""

import importlib
import json
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import bundle, common, gpu, own_step
from benchmarks.gpu import Stage
from engine.studies.spec import load
from tests.processes import ROOT, launch_python
from utils.cli import split_pairs
from utils.errors import InputError

REPORT = {"what": "a figure", "figures": {"milliseconds": 3.0}, "remarks": ["One."]}
WRITES = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
with open(folder / "starts.txt", "a") as starts:
    starts.write("x")
"""
MEASURES = f"{WRITES}(folder / 'report.json').write_text({json.dumps(REPORT)!r})"
# A study that has one cell, and starts a run in a session of its own; neither heeds SIGTERM.
HANGS = f"""{WRITES}
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
there = sorted(path.name for path in folder.glob("results/*"))
runs = [{{"name": "cmd", "seed": 0, "found": there}}]
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
(folder / "child.txt").write_text(str(child.pid))
(folder / "table.md").write_text("a table")
(folder / "results.json").write_text(json.dumps({{"figures": {{"knn": 1}}, "runs": runs}}))
time.sleep(600)
"""
GOES_ON = HANGS.removesuffix("time.sleep(600)\n")


@pytest.fixture
def results(tmp_path):
    """Fresh results of a plan in the folders of the test: results()."""
    args = Namespace(out=tmp_path / "out", archive=tmp_path / "all.zip", device="cuda")
    args.out.mkdir(exist_ok=True)
    return lambda: gpu.Results(args, tmp_path / "work", "some-gpu", "Some GPU")


def stage(tmp_path, name: str, code: str, most: float = 60) -> Stage:
    return Stage(name, ["-c", code, str(tmp_path / "work" / name)], 0.1, most)


def carry_out(plan, results, seconds: float = 600) -> dict[str, str]:
    """States by name after the plan had so much time beside its reserve."""
    gpu.carry_out(plan, results, time.monotonic() + gpu.RESERVE + seconds)
    return {stage.name: results.state(stage.name) for stage in plan}


def found(tmp_path, name: str) -> dict:
    (path,) = (tmp_path / "out").glob(f"????-??-??-{name}-some-gpu.json")
    return json.loads(path.read_text())


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_fails_or_hangs_is_told_and_the_rest_done(tmp_path, results, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    plan = [
        stage(tmp_path, "broken", "print('some line'); raise SystemExit('it broke')"),
        stage(tmp_path, "study-x", HANGS, most=4),
        stage(tmp_path, "step", MEASURES),
    ]
    states = carry_out(plan, results())
    assert states == {"broken": "failed", "study-x": "cut", "step": "done"}
    table = found(tmp_path, "gpu")["figures"]
    assert {name: row["state"] for name, row in table.items()} == states
    assert "it broke" in table["broken"]["message"]
    assert "limit of 4 s" in table["study-x"]["message"]
    assert not lives(int((tmp_path / "work/study-x/child.txt").read_text()))
    assert found(tmp_path, "step") == REPORT
    study = found(tmp_path, "study-x")
    assert study["figures"] == {"knn": 1}
    assert study["remarks"] == [gpu.UNFINISHED]
    assert study["runs"][0]["found"] == []
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        names = {Path(name).name.split("-", 3)[-1] for name in archive.namelist()}
    assert {"step-some-gpu.json", "study-x-some-gpu.md", "gpu-some-gpu.json", "stdout.txt"} <= names

    # Again, on another machine to which the results have come, and with what was wrong mended.
    for path in (tmp_path / "work").rglob("*"):
        if path.is_file() and path.name != "starts.txt":
            path.unlink()
    plan[:2] = [stage(tmp_path, "broken", MEASURES), stage(tmp_path, "study-x", GOES_ON)]
    capsys.readouterr()
    assert set(carry_out(plan, results()).values()) == {"done"}
    assert "step: done before" in capsys.readouterr().out
    starts = {path.parent.name: path.read_text() for path in tmp_path.rglob("starts.txt")}
    assert starts == {"broken": "x", "study-x": "xx", "step": "x"}
    assert found(tmp_path, "study-x")["runs"][0]["found"] == ["cmd-seed0.json"]
    assert not found(tmp_path, "study-x")["remarks"]
    assert not lives(int((tmp_path / "work/study-x/child.txt").read_text()))


def test_what_the_end_of_the_time_cuts_is_taken_up_at_its_place(tmp_path, results):
    plan = [
        stage(tmp_path, "long", f"{WRITES}import time; time.sleep(600)"),
        stage(tmp_path, "step", MEASURES),
    ]
    began = time.monotonic()
    assert set(carry_out(plan, results(), seconds=2).values()) == {"not reached"}
    assert time.monotonic() - began < gpu.RESERVE
    table = found(tmp_path, "gpu")["figures"]
    assert "taken up the next time" in table["long"]["message"]
    assert "were left" in table["step"]["message"]
    plan[0] = stage(tmp_path, "long", MEASURES)
    assert set(carry_out(plan, results()).values()) == {"done"}


def test_the_report_of_the_tests_is_what_pytest_said(tmp_path, results, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_it(x): assert x == 1\n"
        "def test_none(): pytest.skip('needs two')\n"
    )
    code = (
        "import os, pytest; os.mkdir('tests'); os.rename('test_some.py', 'tests/test_some.py'); "
        "words = '-v -p no:cacheprovider --rootdir . -c /dev/null tests'.split(); "
        "raise SystemExit(pytest.main(words))"
    )
    code = f"import os; os.chdir({str(tmp_path)!r}); {code}"
    assert carry_out([stage(tmp_path, "tests", code)], results()) == {"tests": "failed"}
    report = found(tmp_path, "tests")
    assert report["figures"]["counts"] == {"failed": 1, "passed": 1, "skipped": 1}
    tests = report["figures"]["tests"]
    assert tests["tests/test_some.py::test_it[2]"] == "FAILED"
    assert tests["tests/test_some.py::test_none"] == "SKIPPED needs two"
    assert (report["device"], report["remarks"]) == ("Some GPU", [])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_commands_are_accepted(tmp_path, monkeypatch, device):
    """A rehearsal has other sizes: a wrong word for a GPU would be met on the day."""
    data = tmp_path / "some photographs"
    (data / "train" / "a").mkdir(parents=True)
    (data / "train" / "a" / "1.jpg").touch()
    args = Namespace(device=device, data=[data], reference=[tmp_path / "EsViT", tmp_path / "CMD"])
    beside = {}
    for each in gpu.stages(args, tmp_path):
        (tmp_path / each.name).mkdir()
        first, *words = each.words
        if first == "compare.py":
            words, pairs = split_pairs(words, [])
            assert dict(pairs)["TRAIN.EPOCHS"] == ("1" if device == "cpu" else str(1150 * 128))
            study = load(words[words.index("--study") + 1], pairs)
            assert next(study.runs(study.cells, study.seeds)) == ("cmd", 0)
            assert words[words.index("--data_path") + 1] == str(data)
        elif words[0].startswith("benchmarks."):
            module = importlib.import_module(words[0])
            monkeypatch.setattr(sys, "argv", words)
            parsed = module.parse()
            for name in getattr(parsed, "contestants", None) or [parsed.contestant]:
                own_step.options(common.settings_of(parsed, name))
            assert parsed.output == tmp_path / each.name / "report.json"
            if device == "cuda":
                assert parsed.batch == (32 if each.name == "chunks" else 64)
            beside[each.name] = getattr(parsed, "reference", None)
    assert beside["step-cmd"] == tmp_path / "CMD"
    assert beside["step-esvit"] == beside["step-dino"] == tmp_path / "EsViT"


def write_wheel(folder: Path, name: str) -> None:
    """A package of nothing."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: numpy>=1\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", head)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_a_bundle_brings_wheels_and_as_large_images_as_fit(tmp_path, monkeypatch, capsys):
    write_wheel(tmp_path / "index", "lacking")
    photographs = tmp_path / "birds"
    for split in ("train", "val"):
        (photographs / split / "a").mkdir(parents=True)
        image = Image.effect_noise((300, 400), 60).convert("RGB")
        image.save(photographs / split / "a" / "1.jpg", quality=95)
    (photographs / "val" / "a" / "aside").mkdir()
    (photographs / "val" / "a" / "broken.jpg").write_bytes(b"no image")
    checkout = tmp_path / "EsViT"
    checkout.mkdir()
    for name in ("main_esvit.py", "picture.png"):
        (checkout / name).write_bytes(b"1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))

    def make(limit: float) -> list[str]:
        words = f"bundle --data {photographs} --reference {checkout} --wheels lacking"
        words += f" --output {tmp_path}/bundle --limit {limit}"
        monkeypatch.setattr(sys, "argv", words.split())
        bundle.main()
        assert bundle.bytes_of(tmp_path / "bundle") <= limit * bundle.MIB
        files = [path for path in (tmp_path / "bundle").rglob("*") if path.is_file()]
        return sorted(str(path.relative_to(tmp_path / "bundle")) for path in files)

    rest = ["reference/EsViT/main_esvit.py", "wheels/lacking-1.0-py3-none-any.whl"]
    images = ["train/a/1.jpg", "val/a/1.jpg", "val/a/broken.jpg"]
    assert make(1) == [*(f"data/birds/{name}" for name in images), *rest]
    assert "they need numpy there" in capsys.readouterr().out
    source = photographs / "train/a/1.jpg"
    copy = tmp_path / "bundle/data/birds/train/a/1.jpg"
    assert copy.read_bytes() == source.read_bytes()
    reduced = make(1.2 * source.stat().st_size / bundle.MIB)
    (side,) = {int(name.split("birds-")[1].split("px")[0]) for name in reduced if "birds-" in name}
    with Image.open(tmp_path / "bundle" / reduced[0]) as image:
        assert min(image.size) == side
    assert side < 300
    with pytest.raises(InputError, match="birds does not fit into the"):
        bundle.take_images(photographs, tmp_path / "small", 4000)

    # On the other machine, whose Python lacks a package.
    (tmp_path / "requirements.txt").write_text("lacking>=1\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "BUNDLE", tmp_path / "nowhere")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(InputError, match=r"lacks lacking: .*make gpu-bundle"):
        gpu.provide_packages(tmp_path / "site")
    monkeypatch.setattr(gpu, "BUNDLE", tmp_path / "bundle")
    gpu.provide_packages(tmp_path / "site")
    launch_python("-c", "import lacking")


def test_a_rehearsal_writes_nothing_among_the_results(monkeypatch):
    monkeypatch.setattr(sys, "argv", f"gpu --device cpu --out {gpu.RESULTS}/sub".split())
    with pytest.raises(InputError, match="not for a rehearsal's"):
        gpu.main()
    assert not (gpu.RESULTS / "sub").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--data photos/nowhere", "nowhere must hold train and val"),
        ("--data photos/cars photos/cars/train", "train must hold train and val"),
        ("--data photos/cars other/cars", "two are cars"),
        ("--reference photos", "photos holds no main_esvit.py"),
    ],
)
def test_wrong_sources_are_told_before_anything_begins(tmp_path, monkeypatch, words, told):
    for name in ("photos/cars/train/a/1.jpg", "photos/cars/val/a/1.jpg"):
        for place in (tmp_path / name, tmp_path / name.replace("photos", "other")):
            place.parent.mkdir(parents=True)
            place.touch()
    monkeypatch.chdir(tmp_path)
    for script, rest in ((gpu, "--device cpu --out out"), (bundle, "--output bundle")):
        monkeypatch.setattr(sys, "argv", ["script", *words.split(), *rest.split()])
        with pytest.raises(InputError, match=told):
            script.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "photos"]


def test_a_plan_needs_time(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--minutes", "0"])
    with pytest.raises(InputError, match="a number above 0"):
        gpu.main()


@pytest.mark.slow
def test_the_whole_plan_rehearsed(tmp_path, environment):
    before = sorted(gpu.RESULTS.iterdir())
    words = f"-m benchmarks.gpu --minutes 9 --device cpu --out {tmp_path}/out".split()
    words += ["--archive", f"{tmp_path}/all.zip"]
    said = launch_python(*words, environment=environment).stdout
    args = Namespace(device="cpu", data=[Path("drawn")], reference=[])
    names = [each.name for each in gpu.stages(args, tmp_path)]
    reports = {}
    for name in [*names, "gpu"]:
        (path,) = (tmp_path / "out").glob(f"*-{name}-rehearsal.json")
        reports[name] = json.loads(path.read_text())
        assert reports[name]["rehearsal"] == gpu.REHEARSAL
    assert {row["state"] for row in reports["gpu"]["figures"].values()} == {"done"}
    assert reports["tests"]["figures"]["counts"]["passed"] > 10
    for objective in gpu.OBJECTIVES:
        assert list(reports[f"step-{objective}"]["figures"]) == ["bf16"]
        assert list(reports[f"compile-{objective}"]["figures"]) == ["bf16", "bf16+compile"]
    sizes = {name: found["peak_memory_gib"] for name, found in reports["chunks"]["figures"].items()}
    assert list(sizes) == [f"bf16+LOSS.CHUNK_MIB={mib}" for mib in gpu.CHUNKS[:2]]
    assert all(sizes.values())
    assert list(reports["train"]["figures"]) == ["step alone", "decode", "ram"]
    runs = {(run["name"], run["seed"]) for run in reports["study-drawn"]["runs"]}
    assert runs == {("random", 0), ("cmd", 0), ("esvit", 0)}
    assert all(f"{name}: done after" in said for name in names)
    again = launch_python(*words, environment=environment).stdout
    assert all(f"{name}: done before" in again for name in names)
    assert "begins" not in again
    assert sorted(gpu.RESULTS.iterdir()) == before
    assert not list(ROOT.glob("*.zip"))
