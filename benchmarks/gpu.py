r"""All that is worth measuring on one GPU, in the order of worth, within a given time.

    make gpu MINUTES=25                 # python -m benchmarks.gpu --minutes 25
    make gpu MINUTES=5 DEVICE=cpu       # a rehearsal at toy size; its figures are of nothing

Each stage is a process, ended at its limit with all that it started. What it found is written to
OUT/DATE-WHAT-DEVICE.json as it comes, how it ended to OUT/DATE-gpu-DEVICE.json, and an archive has
all of these and what the stages printed. The same command goes on where it stopped: what is done is
not done again (remove its file to have it made anew), what the end of the time cut is taken up, and
what failed is tried again after the rest. Exit code 0: all is done; 1: something failed; 75: the
time did not reach for all. Nothing is fetched from a network.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError, run_script
from utils.files import make_folder, replacing, write_json
from utils.signals import EXIT_PREEMPTED, StopSignals

# torch and the rest may come with the bundle: this file imports none of them.
ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundle"  # what benchmarks/bundle.py prepares
RESULTS = ROOT / "benchmarks" / "results"
GRACE = 20  # seconds that a stage has to end when it is asked to: a run writes a checkpoint
RESERVE = GRACE + 5  # before the end of the time, for that and for writing
REHEARSAL = "made at toy size on a CPU, to see that the plan works: the figures say nothing"
UNFINISHED = "Not all: the stage had not ended."


# The plan

OBJECTIVES = ("cmd", "esvit", "dino")
FULL = "--arch swin_tiny --batch 64 --threads 4"
CHUNKS = (16, 32, 64, 128, 256, 1024)  # MiB, of LOSS.CHUNK_MIB
STUDY = "experiments/studies/photographs.yaml"
STEPS, BATCH = 1150, 128  # of a study's cell, whatever the number of images
TOY = "--arch swin_tiny --prototypes 64 --batch 4 --global_size 32 --local_crops 2 --local_size 16"
TOY_NETWORK = """
    MODEL.EMBED_DIM 16 MODEL.DEPTHS [1,1] MODEL.NUM_HEADS [1,2] MODEL.WINDOW_SIZE 4
    MODEL.IMG_SIZE 32 HEAD.HIDDEN_DIM 48 HEAD.BOTTLENECK_DIM 32 HEAD.POOL_HIDDEN 8
"""
TOY_STUDY = f"""
    --cells cmd,esvit --seeds 0 MODEL.ARCH swin_tiny HEAD.OUT_DIM 64 AUG.GLOBAL_CROPS_SIZE 32
    AUG.LOCAL_CROPS_NUMBER [] TRAIN.EPOCHS 1 TRAIN.BATCH_SIZE_PER_GPU 8 TRAIN.WARMUP_EPOCHS 0
    DATA.CACHE_SIZE 32 MOCO.BN_IMAGES 4 DEVICE cpu {TOY_NETWORK}
"""


@dataclass(frozen=True)
class Stage:
    """One process. name: the WHAT of its file. words: what follows `python`.

    least: seconds without which it is not begun. most: seconds after which it is ended.
    """

    name: str
    words: list[str]
    least: float
    most: float


def stages(args: Namespace, work: Path) -> list[Stage]:
    """The stages in the order of worth; each has the folder `work`/NAME for itself."""
    toy = args.device == "cpu"
    plan = []

    def quote(path: Path) -> str:
        return shlex.quote(str(path))

    def add(name: str, words: str, least: float, most: float) -> None:
        plan.append(Stage(name, shlex.split(words), 10 if toy else least, most))

    def measure(name: str, words: str, least: float, most: float) -> None:
        size, network = (f"{TOY} --threads 1", TOY_NETWORK) if toy else (FULL, "")
        report = quote(work / name / "report.json")
        module, words = words.split(" ", 1)
        add(name, f"-m benchmarks.{module} {size} --output {report} {words} {network}", least, most)

    add("tests", "-m pytest tests/gpu -m gpu -v -rfE --tb=short --color=no -o addopts=", 60, 180)
    counted = "--warm_up 1 --steps 2" if toy else "--warm_up 4 --steps 12"
    for objective in OBJECTIVES:
        rivals = [p for p in args.reference if ("cmd" in p.name.lower()) == (objective == "cmd")]
        beside = "".join(f" --reference {quote(path)}" for path in rivals)
        words = f"step --contestants bf16 --objective {objective}{beside} {counted}"
        measure(f"step-{objective}", words, 45, 120)
    for objective in OBJECTIVES:
        words = f"step --contestants bf16 bf16+compile --objective {objective} {counted}"
        measure(f"compile-{objective}", words, 90, 240)
    sizes = " ".join(f"bf16+LOSS.CHUNK_MIB={mib}" for mib in (CHUNKS[:2] if toy else CHUNKS))
    # At half the batch, because all are on the GPU at once.
    words = f"step --contestants {sizes} --objective cmd {counted} --batch {2 if toy else 32}"
    measure("chunks", words, 75, 180)
    feeding = f"--workers {max(1, len(os.sched_getaffinity(0)) - 2)} --images 512 --turns 2"
    if toy:
        feeding = "--ways decode ram --workers 0 --images 6 --turns 1 --steps 2"
    measure("train", f"train --objective cmd --contestant bf16 {feeding}", 90, 240)
    for folder in args.data:
        name = f"study-{_slug(folder.name)}"
        words = f"compare.py --study {STUDY} --data_path {quote(folder)}"
        images = sum(path.is_file() for path in folder.glob("train/*/*"))
        size = TOY_STUDY if toy else f"TRAIN.EPOCHS {max(12, STEPS * BATCH // max(1, images))}"
        add(name, f"{words} --output_dir {quote(work / name)} {size}", 60, float("inf"))
    return plan


# What there is so far


class Results:
    """The files in OUT: one for each stage, and one of the plan itself.

    label: what their names call the device. device: its name. table: how each stage ended.
    """

    def __init__(self, args: Namespace, work: Path, label: str, device: str) -> None:
        self.out, self.archive, self.work = args.out, args.archive, work
        self.label, self.device = label, device
        self.marks = {"rehearsal": REHEARSAL} if args.device == "cpu" else {}
        path = self.path("gpu")
        self.table = json.loads(path.read_text())["figures"] if path.is_file() else {}

    def path(self, name: str) -> Path:
        """The file of a stage: the one that is there, else one of today."""
        there = sorted(self.out.glob(f"????-??-??-{name}-{self.label}.json"))
        return there[-1] if there else self.out / f"{_today()}-{name}-{self.label}.json"

    def state(self, name: str) -> str:
        """Of a stage: done, failed, cut (at its limit) or not reached (in time, or to its end)."""
        state = self.table.get(name, {}).get("state", "not reached")
        return state if state != "done" or self.path(name).is_file() else "not reached"

    def publish(self, name: str, is_whole: bool) -> None:
        """Write what a stage has found up to now into OUT, if it has found anything."""
        folder = self.work / name
        report = _of_tests(folder) if name == "tests" else {}
        report = self._headed(report) if report else _read(folder)
        if report:
            remarks = report.get("remarks", []) + ([] if is_whole else [UNFINISHED])
            write_json(self.path(name), self.marks | report | {"remarks": remarks}, "result")
        for beside in (folder / "table.md", folder / "curves.png"):  # of a study
            if beside.is_file():
                with replacing(self.path(name).with_suffix(beside.suffix)) as temporary:
                    shutil.copyfile(beside, temporary)

    def note(self, name: str, state: str, seconds: float, message: str) -> None:
        """Write down how a stage ended, and the archive of all up to now."""
        self.table[name] = {"state": state, "seconds": round(seconds, 1), "message": message}
        report = {
            "what": "the plan for one GPU, by stages",
            "seconds": round(sum(row["seconds"] for row in self.table.values()), 1),
            "figures": self.table,
        }
        write_json(self.path("gpu"), self.marks | self._headed(report), "result")
        files = {path: Path(path.name) for path in self.out.glob(f"*-{self.label}.*")}
        if self.out.is_relative_to(ROOT):
            files = {path: path.relative_to(ROOT) for path in files}
        for path in self.work.rglob("*.txt"):  # what was printed
            files[path] = Path("outputs", self.work.name, path.relative_to(self.work))
        with (
            replacing(self.archive, "archive") as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for path in sorted(files):
                archive.write(path, files[path])

    def _headed(self, report: dict) -> dict:
        """A report with what benchmarks/README.md asks of each."""
        versions = {"torch": importlib.metadata.version("torch")}
        return {
            "what": report["what"],
            "date": _today(),
            "device": self.device,
            "versions": versions | {"python": platform.python_version()},
            "commands": [shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])],
            **report,
        }

    def restore(self, name: str) -> None:
        """Give a study whose folder is gone the results that OUT has, so that it goes on."""
        if name.startswith("study-") and self.path(name).is_file():
            folder = self.work / name / "results"
            make_folder(folder)
            for run in json.loads(self.path(name).read_text())["runs"]:
                path = folder / f"{run['name']}-seed{run['seed']}.json"
                if not path.is_file():
                    write_json(path, run)


def _read(folder: Path) -> dict:
    """What a measurement, or a study, has written into its folder; {} before it has."""
    for path in (folder / "report.json", folder / "results.json"):
        if path.is_file():
            return json.loads(path.read_text())
    return {}


def _of_tests(folder: Path) -> dict:
    """The tests' report by the lines that pytest has printed; {} without any."""
    line = r"^(tests/\S+::.+?) ([A-Z]{4,})(?: \((.*?)\))?(?: +\[.*\])?$"
    found = re.findall(line, (folder / "stdout.txt").read_text(errors="replace"), re.M)
    ends = [end for _, end, _ in found]
    counts = {end.lower(): ends.count(end) for end in sorted(set(ends))}
    figures = {"counts": counts, "tests": {name: " ".join(end).strip() for name, *end in found}}
    return {"what": "the tests that need a GPU", "figures": figures} if found else {}


def _today() -> str:
    return datetime.date.today().isoformat()


def _slug(text: str) -> str:
    """In lower case, what is no letter, digit or dot as a hyphen: for names of files."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


# Carrying it out


def carry_out(plan: list[Stage], results: Results, deadline: float, **environment: str) -> None:
    """The stages that are not done, until `deadline`, a time.monotonic()."""
    waiting = []
    for stage in plan:
        if results.state(stage.name) == "done":
            print(f"{stage.name}: done before, in {results.path(stage.name)}", flush=True)
        else:
            waiting.append(stage)
    for stage in sorted(waiting, key=lambda s: results.state(s.name) in ("failed", "cut")):
        left = max(0, deadline - time.monotonic() - RESERVE)
        if left >= stage.least:
            run(stage, min(left, stage.most), results, environment)
        elif results.state(stage.name) == "not reached":
            words = f"needs {stage.least:.0f} s, and {left:.0f} were left"
            results.note(stage.name, "not reached", 0, words)


def run(stage: Stage, limit: float, results: Results, environment: dict[str, str]) -> None:
    """One stage, for `limit` seconds at most; what it finds is published as it comes."""
    print(f"{stage.name}: begins, at most {limit:.0f} s", flush=True)
    folder = results.work / stage.name
    make_folder(folder)
    results.restore(stage.name)
    (folder / "report.json").unlink(missing_ok=True)  # of an earlier attempt
    token = {"GPU_PLAN_STAGE": f"{stage.name} {os.getpid()} {time.time_ns()}"}
    began, log = time.monotonic(), folder / "stdout.txt"
    state, message = "not reached", "ended with the plan; it is taken up the next time"
    with open(log, "wb") as stdout:
        process = subprocess.Popen(
            [sys.executable, *stage.words],
            cwd=ROOT,
            env=os.environ | environment | token,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        seen, study = None, folder / "results.json"
        while process.poll() is None and time.monotonic() < began + limit:
            time.sleep(0.2)
            if study.is_file() and (now := study.stat().st_mtime_ns) != seen:
                seen = now
                results.publish(stage.name, is_whole=False)
        if process.poll() is not None:
            state = "failed" if process.returncode else "done"
            tail = log.read_text(errors="replace").split("\n")[-12:]
            words = f"exit code {process.returncode}: {' | '.join(filter(None, tail))[-600:]}"
            message = words if process.returncode else ""
        elif limit == stage.most:
            state, message = "cut", f"ended at its limit of {limit:.0f} s; what it had is kept"
    finally:
        _end(process, token)
        results.publish(stage.name, is_whole=state in ("done", "failed"))
        results.note(stage.name, state, time.monotonic() - began, message)
    said = log.read_text(errors="replace").splitlines()[-3:]
    print("\n  ".join([f"{stage.name}: {state} after {time.monotonic() - began:.0f} s", *said]))


def _end(process: subprocess.Popen, token: dict[str, str]) -> None:
    """End a stage and all that it started, in whatever session: asked to, and after GRACE killed.

    token: the variable of their environment by which they are known.
    """
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    ((name, value),) = token.items()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{name}={value}".encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)
    process.wait()


# The machine


def check_sources(data: list[Path], reference: list[Path]) -> None:
    """Raise InputError where photographs or checkouts are not there; a stage meets it too late."""
    for folder in data:
        if not all(any(folder.glob(f"{split}/*/*")) for split in ("train", "val")):
            raise InputError(f"--data: {folder} must hold train and val, with a subfolder a class.")
    for checkout in reference:
        if not (checkout / "main_esvit.py").is_file():
            raise InputError(f"--reference: {checkout} holds no main_esvit.py.")
    names = [_slug(folder.resolve().name) for folder in data]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"--data: results are named by the folder, and two are {min(twice)}.")


def provide_packages(site: Path) -> None:
    """The bundle's wheels into `site`, where packages are missing; InputError if some still are."""
    wheels = sorted(BUNDLE.glob("wheels/*.whl"))
    if _missing() and wheels and not site.is_dir():
        words = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([sys.executable, *words, "--target", str(site), *wheels], check=False)
    if site.is_dir():
        sys.path.insert(0, str(site))
        paths = [str(site), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if missing := _missing():
        raise InputError(
            f"{sys.executable} lacks {', '.join(missing)}: `make dev` makes an environment with "
            f"them; to a machine without a network `make gpu-bundle` brings them as wheels."
        )


def _missing() -> list[str]:
    """The packages of requirements.txt, and pytest, that this Python does not have."""
    names = re.findall(r"^[\w.-]+", (ROOT / "requirements.txt").read_text(), re.M)
    there = {_slug(found.name) for found in importlib.metadata.distributions()}
    return [name for name in [*names, "pytest"] if _slug(name) not in there]


def gpu() -> str:
    """The name of the first GPU; InputError where torch can use none."""
    words = "import torch; print(torch.cuda.get_device_name())"
    asked = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    if asked.returncode:
        *_, last = asked.stderr.splitlines() or ["no word"]
        raise InputError(f"no GPU that torch can use ({last}); DEVICE=cpu rehearses the plan.")
    return asked.stdout.splitlines()[-1]


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, here = parser.add_argument, Path.resolve
    add("--minutes", type=float, default=25, help="in all (%(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    words = "folders with train and val [those of bundle/data]"
    add("--data", type=lambda text: here(Path(text)), nargs="+", help=words)
    words = "public checkouts; of CMD where the name says so, else of EsViT [bundle/reference]"
    add("--reference", type=lambda text: here(Path(text)), nargs="+", help=words)
    add("--out", type=lambda text: here(Path(text)), help="for results [benchmarks/results]")
    add("--archive", type=lambda text: here(Path(text)), help="[outputs/gpu/results.zip]")
    return parser.parse_args()


def main() -> None:
    args, began = parse(), time.monotonic()
    toy = args.device == "cpu"
    work = ROOT / "outputs" / ("gpu-rehearsal" if toy else "gpu")
    args.out = args.out or (work / "results" if toy else RESULTS)
    if toy and args.out.is_relative_to(RESULTS):
        raise InputError(f"--out {args.out} is for figures of a GPU, not for a rehearsal's.")
    args.archive = args.archive or work / "results.zip"
    args.data = args.data or sorted(BUNDLE.glob("data/*"))
    args.reference = args.reference or sorted(BUNDLE.glob("reference/*"))
    if not args.minutes > 0:
        raise InputError(f"--minutes {args.minutes:g}: a number above 0 is needed.")
    check_sources(args.data, args.reference)
    for folder in (args.out, work, args.archive.parent):
        make_folder(folder, "the folder")
    provide_packages(ROOT / "outputs" / "site")
    environment = {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    if toy:
        label = device = "rehearsal"
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACCELERATOR": "cpu"}
        environment["TORCHDYNAMO_DISABLE"] = "1"  # on a CPU compiling takes minutes
        if not args.data:
            args.data = [work / "drawn"]
            words = ["-m", "datasets.synthetic", "--train", "48", "--val", "24", "--size", "32"]
            words += ["--output", str(args.data[0])]
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    else:
        device = gpu()
        label = _slug(device)
    results, plan = Results(args, work, label, device), stages(args, work)
    if not args.data:
        print("no photographs: give --data, or bring bundle/data; the plan goes without a study")
    try:
        with StopSignals():
            carry_out(plan, results, began + 60 * args.minutes, **environment)
    finally:
        states = {stage.name: results.state(stage.name) for stage in plan}
        for name, state in states.items():
            row = results.table.get(name, {"seconds": 0, "message": ""})
            print(f"{name:20} {state:12}{row['seconds']:7.1f} s  {row['message']}")
        print(f"results: {args.out}; all in one file: {args.archive}", flush=True)
    if set(states.values()) != {"done"}:
        sys.exit(1 if {"failed", "cut"} & set(states.values()) else EXIT_PREEMPTED)


if __name__ == "__main__":
    run_script(main, "the same command goes on where it stopped")
