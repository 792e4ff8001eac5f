"""Going on where a run stopped: after kills, signals, damage, and with other options."""

import functools
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.evaluation.source import load_source
from engine.training.resume import Found, find, resume
from tests.conftest import TRAINED
from tests.datasets.photographs import edit
from tests.processes import (
    PATIENCE,
    Script,
    free_port,
    run_python,
    start_group,
    start_python,
    workers_of,
)
from tests.runs import (
    SWIN,
    assert_same_run,
    batch_of,
    cfg_of,
    checkpoint_of,
    copy_of,
    crops_for,
    load,
    log_of,
    pretraining,
    record_of,
    small_config,
    tensors,
)
from utils import checkpoint, config
from utils.distributed import World
from utils.errors import InputError
from utils.logging import RunLog
from utils.options import CONTRASTIVE, OPTIONS
from utils.signals import EXIT_PREEMPTED

# Four steps an epoch of two micro-batches each, and lines of the log that span checkpoints.
OFTEN = """
    LOSS.OBJECTIVE cmd SEED 3 PRINT_FREQ 3 TRAIN.ACCUM_STEPS 2 CKPT.EVERY_MINUTES 0
    CKPT.KEEP_EVERY 2 DATA.WORKERS 1 HEAD.USE_BN true
"""
ALONE = "TRAIN.BATCH_SIZE_PER_GPU 2"
TOGETHER = "TRAIN.BATCH_SIZE_PER_GPU 2 TRAIN.ACCUM_STEPS 1 TRAIN.TIMEOUT_MINUTES 1"
# torchrun, as EsViT's README starts it: each process is told --local-rank too.
LAUNCHER = ("-m", "torch.distributed.launch", "--nproc_per_node=2", "--max_restarts=2")


class Lives:
    """The processes of one command, started together as a launcher would, again and again."""

    def __init__(self, words: list[str], environment: dict[str, str], processes: int = 1) -> None:
        self.words, self.environment, self.processes = words, environment, processes
        self.running: list[Script] = []

    def start(self) -> None:
        # Each is a job of its own.
        how = {"environment": self.environment, "merged": True, "new_session": True}
        if self.processes > 1:
            self.running = start_group(self.processes, *self.words, **how)
        else:
            self.running = [start_python(*self.words, **how)]

    def end(self) -> list[tuple[int, str]]:
        """Exit codes and all that was said, once every process has ended by itself."""
        running, self.running = self.running, []
        try:
            said = [process.communicate(timeout=PATIENCE)[0] for process in running]
        finally:
            for process in running:
                process.kill()
        return [(process.returncode, text) for process, text in zip(running, said, strict=True)]

    def wait_for_checkpoints(self, folder: Path, number: int) -> bool:
        """Until `number` more checkpoints have been written; False where a process ends first."""
        deadline, seen, found = time.monotonic() + PATIENCE, stamp(folder), 0
        while found < number:
            if any(process.poll() is not None for process in self.running):
                return False
            assert time.monotonic() < deadline
            now = stamp(folder)
            found, seen = found + (now != seen), now
            time.sleep(0.001)
        return True


def stamp(folder: Path) -> tuple[int, int]:
    """What changes whenever the last checkpoint is written anew."""
    try:
        status = (folder / "checkpoint.pth").stat()
        return status.st_ino, status.st_mtime_ns
    except FileNotFoundError:
        return 0, 0


@pytest.fixture(scope="module")
def options(knn_options) -> Callable[[int, int], str]:
    """The options of a run by so many processes: four images a step, four steps an epoch."""

    def of(processes: int, epochs: int) -> str:
        size = ALONE if processes == 1 else TOGETHER
        return f"{OFTEN} {size} TRAIN.EPOCHS {epochs} {knn_options}"

    return of


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command, environment, options) -> Callable[[int, int], Path]:
    """The folder of an uninterrupted run by so many processes; each is made once."""

    @functools.cache
    def run(processes: int, epochs: int) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        lives = Lives(command(folder, options(processes, epochs)), environment, processes)
        lives.start()
        for code, said in lives.end():
            assert code == 0, said
        return folder

    return lambda processes, epochs=3: run(processes, epochs)


@pytest.fixture
def lives(command, environment, options, tmp_path) -> Callable[..., Lives]:
    """The processes of a run in tmp_path, which is of three epochs, with further options."""

    def of(processes: int, epochs: int = 3, more: str = "") -> Lives:
        words = command(tmp_path, f"{options(processes, epochs)} {more}")
        return Lives(words, environment, processes)

    return of


# Kills


def soak(
    folder: Path, lives: Lives, kills: int, draw: random.Random, steps: int
) -> tuple[int, list[int]]:
    """Start and kill at random moments until the run is complete: kills, and where it went on."""
    done, resumed = 0, []
    while True:
        lives.start()
        victim = draw.choice(lives.running)
        alive = lives.wait_for_checkpoints(folder, draw.randint(1, steps)) and done < kills
        if alive:
            # Within a step, between two, or while a checkpoint is being written.
            time.sleep(draw.uniform(0, 0.05))
            victim.send_signal(signal.SIGKILL)
        ended = lives.end()
        resumed += [int(step) for step in re.findall(r"at step (\d+)", ended[0][1])[:1]]
        if all(code == 0 for code, _ in ended):
            return done, resumed
        assert alive, ended
        # The killed one, and nobody is left waiting.
        assert all(code != 0 for code, _ in ended), ended
        done += 1


@pytest.mark.parametrize(
    ("processes", "kills", "epochs"),
    [
        pytest.param(1, 2, 3, id="one"),
        pytest.param(1, 20, 24, id="one-soak", marks=pytest.mark.slow),
        pytest.param(2, 20, 24, id="two-soak", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_moments_ends_as_the_whole_one(
    processes, kills, epochs, whole, lives, tmp_path
):
    run, draw = lives(processes, epochs), random.Random(processes)
    done, resumed = soak(tmp_path, run, kills, draw, steps=4)
    assert done == kills
    assert len(resumed) == kills
    assert any(step % 4 for step in resumed)  # in the middle of an epoch
    assert resumed == sorted(resumed)
    assert_same_run(whole(processes, epochs), tmp_path)


def test_ctrl_c_leaves_a_run_that_goes_on_from_its_last_checkpoint(whole, lives, tmp_path):
    lives = lives(1)
    lives.start()
    assert lives.wait_for_checkpoints(tmp_path, 2)
    lives.running[0].send_signal(signal.SIGINT)
    ((code, said),) = lives.end()
    assert code == 130
    assert "interrupted: the same command goes on from the last checkpoint" in said
    lives.start()
    assert lives.end()[0][0] == 0
    assert_same_run(whole(1), tmp_path)


# Signals


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_run_with_a_checkpoint_of_the_step_it_was_at(
    number, whole, lives, tmp_path
):
    # No checkpoint is due: the only one is made for the signal.
    lives = lives(1, more="CKPT.EVERY_MINUTES 60 CKPT.KEEP_EVERY 0 PRINT_FREQ 1")
    lives.start()
    lives.running[0].wait_for("step 2/12")
    lives.running[0].send_signal(number)
    ((code, said),) = lives.end()
    assert code == EXIT_PREEMPTED == 75
    step = load(tmp_path)["step"]
    assert 2 <= step <= 12
    last = said.splitlines()[-1]
    assert last.startswith(
        f"preempted: stopped by {number.name} after step {step}; {tmp_path} holds a"
    )
    assert "Traceback" not in said
    lives.start()
    ((code, said),) = lives.end()
    assert code == 0
    assert f"resuming from {tmp_path}/checkpoint.pth at step {step}" in said
    assert [line["step"] for line in log_of(tmp_path) if "loss" in line] == list(range(1, 13))
    first, second = load(whole(1))["student"], load(tmp_path)["student"]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_signals_to_the_whole_job_leave_the_loader_at_work(whole, lives, tmp_path):
    """As Slurm sends them: to loader workers too, and again a little later."""
    lives = lives(1)
    lives.start()
    assert lives.wait_for_checkpoints(tmp_path, 1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        os.killpg(lives.running[0].pid, number)
        time.sleep(0.01)
    ((code, said),) = lives.end()
    assert code == EXIT_PREEMPTED, said
    # The first of those that wait for a busy interpreter is the one of the lowest number.
    assert re.match(r"preempted: stopped by SIG(TERM|USR1) after step", said.splitlines()[-1])
    lives.start()
    assert lives.end()[0][0] == 0
    assert_same_run(whole(1), tmp_path)


def test_a_signal_to_one_of_two_stops_both_at_the_same_step(whole, lives, tmp_path):
    lives = lives(2)
    lives.start()
    assert lives.wait_for_checkpoints(tmp_path, 2)
    lives.running[1].send_signal(signal.SIGUSR1)
    codes, said = zip(*lives.end(), strict=True)
    assert codes == (EXIT_PREEMPTED, EXIT_PREEMPTED), said
    (step,) = re.findall(r"stopped by SIGUSR1 after step (\d+)", "".join(said))
    lives.start()
    codes, said = zip(*lives.end(), strict=True)
    assert codes == (0, 0), said
    assert f"resuming from {tmp_path}/checkpoint.pth at step {step}" in said[0]
    assert_same_run(whole(2), tmp_path)


@pytest.mark.slow
def test_after_a_signal_to_one_of_two_the_launcher_goes_on_by_itself(
    whole, command, environment, options, tmp_path
):
    words = command(tmp_path, options(2, 3), launcher=(*LAUNCHER, f"--master_port={free_port()}"))
    lives = Lives(words, environment)
    lives.start()
    assert lives.wait_for_checkpoints(tmp_path, 2)
    os.kill(workers_of(lives.running[0])[-1], signal.SIGUSR1)
    ((code, said),) = lives.end()
    assert code == 0, said
    assert len(re.findall(r"stopped by SIGUSR1 after step \d+", said)) == 1
    assert re.search(r"resuming from .*checkpoint.pth at step \d+", said)
    assert_same_run(whole(2), tmp_path)


# When checkpoints are written


def test_checkpoints_come_by_the_clock_and_at_the_end(pretrain, tmp_path):
    tiny = f"{OFTEN} {ALONE} TRAIN.EPOCHS 1 CKPT.KEEP_EVERY 0"
    for minutes in ("1e-6", "60"):
        pretrain(tmp_path / minutes, f"{tiny} CKPT.EVERY_MINUTES {minutes}")
        assert load(tmp_path / minutes)["step"] == 4
    assert load(tmp_path / "1e-6", "checkpoint_previous.pth")["step"] == 3
    assert not (tmp_path / "60/checkpoint_previous.pth").exists()


def test_a_checkpoint_that_cannot_be_written_ends_in_a_line_and_keeps_the_one_before(
    whole, command, environment, options, tmp_path
):
    folder = copy_of(whole(1), tmp_path / "run", epoch=2)
    before = (folder / "checkpoint.pth").read_bytes()
    # The log fits, a checkpoint does not.
    limits = {resource.RLIMIT_FSIZE: len(before) // 2}
    words = command(folder, f"{options(1, 3)} PRINT_FREQ 1")
    done = run_python(*words, environment=environment, limits=limits, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: the checkpoint {folder}/checkpoint.pth could not be written")
    assert "File too large" in line
    assert (folder / "checkpoint.pth").read_bytes() == before
    steps = [entry["step"] for entry in log_of(folder) if "loss" in entry]
    assert steps[-1] < 12


# Damage


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_kept(
    whole, pretrain, options, tmp_path
):
    folder = copy_of(whole(1), tmp_path / "run")
    damaged = bytearray((folder / "checkpoint.pth").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "checkpoint.pth").write_bytes(damaged)
    before = load(folder, "checkpoint_previous.pth")["step"]
    done = pretrain(folder, options(1, 3))
    assert f"warning: {folder}/checkpoint.pth is passed over: " in done.stdout
    assert f"resuming from {folder}/checkpoint_previous.pth at step {before}" in done.stdout
    assert_same_run(whole(1), folder)
    assert (folder / "checkpoint.pth.refused").read_bytes() == bytes(damaged)


def test_where_no_checkpoint_is_whole_the_run_stops_and_touches_nothing(whole, refuse, tmp_path):
    folder = copy_of(whole(1), tmp_path / "run")
    for path in folder.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    before = {path: path.read_bytes() for path in folder.glob("*.pth")}
    line = refuse(folder, OFTEN)
    assert "checkpoint.pth" in line
    assert "another --output_dir" in line
    assert {path: path.read_bytes() for path in folder.glob("*.pth")} == before


def test_lines_of_larger_step_numbers_stay_where_steps_are_numbered_anew(tmp_path):
    log = RunLog(tmp_path, 0, 0)
    for step in (10, 20, 30):
        log.write(step, {"epoch": step / 10})
    log.close()
    # The checkpoint was of step 20, which is step 5 now.
    log = RunLog(tmp_path, 2, 5)
    log.write(6, {"epoch": 2.4})
    assert log.lines == 3
    log.close()
    assert [line["step"] for line in log_of(tmp_path)] == [10, 20, 6]


# Another number of processes


@pytest.mark.parametrize(
    ("size", "told", "last"),
    [
        # As typed for two: half the images in a step, so twice the steps an epoch.
        (
            "TRAIN.BATCH_SIZE_PER_GPU 2 TRAIN.ACCUM_STEPS 1",
            r"images per step 2 \(was 4\), so the peak learning rate is 0.000391 "
            r"\(was 0.000781\), and it goes on at the same place of the epoch",
            24,
        ),
        (
            "TRAIN.BATCH_SIZE_PER_GPU 2 TRAIN.ACCUM_STEPS 2",
            "images per step stay 4, and so does the learning rate",
            12,
        ),
    ],
)
def test_a_run_of_two_goes_on_as_one_and_says_what_changes(
    size, told, last, whole, pretrain, options, tmp_path
):
    folder = copy_of(whole(2), tmp_path / "run", epoch=2)  # at step 8 of 12
    done = pretrain(folder, f"{options(2, 3)} {size}")
    start = rf"warning: the run had 2 processes and goes on with 1: {told}"
    assert re.search(start, done.stdout), done.stdout
    assert "not bit for bit" in done.stdout
    state = load(folder)
    assert (state["step"], state["epoch"]) == (last, 3)
    assert log_of(folder)[-1]["epoch"] == 3
    # The lines up to epoch 2 are those of two; a further start cuts none, whatever their steps.
    before = [line for line in log_of(whole(2)) if line["epoch"] <= 2]
    assert log_of(folder)[: len(before)] == before
    pretrain(folder, f"{options(2, 4)} {size} TRAIN.EPOCHS 4")
    assert log_of(folder)[: len(before)] == before
    assert log_of(folder)[-1]["epoch"] == 4


# Repeating


SAME_SHAPES = "SEED 4 MODEL.DROP_PATH 0 MOCO.QUEUE 99 LCR.CHANNELS 8 MODEL.WINDOW_SIZE 5"


@pytest.mark.parametrize(
    ("changed", "named", "can_be_forced"),
    [
        ("LOSS.TEACHER_TEMP 0.07", "LOSS.TEACHER_TEMP (was 0.04, now 0.07)", True),
        (
            SAME_SHAPES,
            "SEED (was 3, now 4), MODEL.WINDOW_SIZE (was 7, now 5), "
            "MODEL.DROP_PATH (was 0.1, now 0.0)",  # cmd reads no queue and no branch
            True,
        ),
        ("TRAIN.BATCH_SIZE_PER_GPU 4", "images per step (was 8, now 4)", True),
        ("HEAD.OUT_DIM 32", "HEAD.OUT_DIM (was 64, now 32)", False),
        ("LOSS.OBJECTIVE dino", "LOSS.OBJECTIVE (was cmd, now dino)", False),
        ("CMD.LT false", "CMD.LT (was True, now False)", False),  # whose head the run has
    ],
)
def test_a_resume_with_other_options_is_refused_by_name(
    changed, named, can_be_forced, trained, refuse
):
    before = {path: path.read_bytes() for path in trained.glob("c*")}
    way = "another --output_dir"
    if can_be_forced:
        way += ", or --resume force to go on with the new ones"
    for how in ("auto",) if can_be_forced else ("auto", "force"):
        line = refuse(trained, f"{TRAINED} {changed} RESUME {how}")
        assert f"is from a run with other options: {named}. Use the old options" in line
        assert line.endswith(f"{way}.")
    assert before == {path: path.read_bytes() for path in trained.glob("c*")}


# What only some objectives read, each with another value than its default.
OWNED = {
    "HEAD.OUT_DIM": 32,
    "HEAD.NORM_LAST_LAYER": False,
    "HEAD.POOL_HIDDEN": 8,
    "LOSS.STUDENT_TEMP": 0.2,
    "LOSS.WARMUP_TEACHER_TEMP": 0.05,
    "LOSS.TEACHER_TEMP": 0.06,
    "LOSS.WARMUP_TEACHER_TEMP_EPOCHS": 1,
    "LOSS.CENTER_MOMENTUM": 0.5,
    "CMD.LAMBDA1": 2.0,
    "CMD.LS": False,
    "CMD.LT": False,
    "CMD.ATTENTION_RATE": 1.0,
    "MOCO.QUEUE": 7,
    "MOCO.BN_IMAGES": 3,
    "LCR.CHANNELS": 5,
    "LCR.WEIGHT": 3.0,
    "TRAIN.FREEZE_LAST_LAYER": 2,
}


@pytest.mark.parametrize("objective", OPTIONS["LOSS.OBJECTIVE"].choices)
def test_what_an_objective_does_not_read_changes_no_bit_of_a_run(objective, tmp_path):
    """So a run goes on, and a study's cell counts as finished, though it differs."""
    assert set(OWNED) == {name for name, option in OPTIONS.items() if option.objectives}
    of = SWIN | {"LOSS__OBJECTIVE": objective, "OUTPUT_DIR": str(tmp_path)}
    if objective in CONTRASTIVE:
        of["AUG__LOCAL_CROPS_NUMBER"] = []
    unread = config.unread(small_config(**of))
    assert unread
    states = []
    for changed in ({}, {name.replace(".", "__"): OWNED[name] for name in unread}):
        run = pretraining(small_config(**of, **changed))
        run.train_step(iter([batch_of(crops_for(run, seed=0))]))
        states.append(tensors(run.state()))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    checkpoint.save_last(checkpoint_of(run) | {"images": "images"}, tmp_path)
    assert not find(small_config(**of), 12, "images", 3, run.world).forced


def test_a_resume_may_change_length_paths_workers_and_print_frequency(
    trained, pretrain, images, tmp_path
):
    folder = copy_of(trained, tmp_path / "run")
    shutil.copytree(images, tmp_path / "moved")
    os.utime(tmp_path / "moved" / "red" / "00.png")  # when it was written is not what it holds
    options = f"TRAIN.EPOCHS 5 PRINT_FREQ 2 DATA.WORKERS 1 DATA.PATH {tmp_path / 'moved'}"
    halved = "TRAIN.BATCH_SIZE_PER_GPU 4 TRAIN.ACCUM_STEPS 2 INIT.WEIGHTS other.pth"
    done = pretrain(folder, f"{TRAINED} {options} {halved}")
    assert "at step 8" in done.stdout
    assert "other options" not in done.stdout
    assert load(folder)["step"] == 10
    # What a resume takes and has another effect than at the start is said.
    assert "warning: INIT.WEIGHTS other.pth is not read: the run goes on from " in done.stdout
    (rates,) = re.findall(
        r"TRAIN.EPOCHS is 5 \(was 4\), and the schedules stretch to it: "
        r"the learning rate, (\S+) at the last step, goes on at (\S+)",
        done.stdout,
    )
    peak, least = 0.05 * 8 / 256, 1e-6
    places = [(1 + math.cos(math.pi * place)) / 2 for place in (7 / 8, 8 / 10)]
    wanted = [least + (peak - least) * place for place in places]
    assert list(map(float, rates)) == pytest.approx(wanted, rel=0.01)


def test_a_forced_resume_goes_on_with_the_new_options_and_says_so(trained, pretrain, tmp_path):
    folder = copy_of(trained, tmp_path / "run", epoch=3)
    changed = "LOSS.TEACHER_TEMP 0.07 TRAIN.OPTIMIZER sgd"
    done = pretrain(folder, f"{TRAINED} {changed}", flags=["--resume", "force"])
    assert "warning: resuming with other options: LOSS.TEACHER_TEMP (was 0.04, now" in done.stdout
    assert "at step 6" in done.stdout
    assert log_of(folder)[-1]["teacher_temp"] == 0.07
    assert cfg_of(folder).LOSS.TEACHER_TEMP == 0.07
    assert "the optimizer starts without its moments" in done.stdout
    groups = load(folder)["optimizer"]["param_groups"]
    assert all(group["momentum"] == 0.9 for group in groups)


def test_a_finished_run_says_so_and_touches_nothing(trained, pretrain, knn_options):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    done = pretrain(trained, f"{TRAINED} {knn_options}")
    assert "resuming from" in done.stdout
    assert "loss" not in done.stdout
    assert "the run is complete (4 epochs); raise --epochs to go on" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_a_forced_resume_with_more_images_goes_on_at_the_same_epoch(
    trained, pretrain, refuse, images, tmp_path
):
    folder = copy_of(trained, tmp_path / "run", epoch=3)
    for copy in ("one", "two"):
        shutil.copytree(images, tmp_path / "images" / copy)
    options = f"{TRAINED} DATA.PATH {tmp_path / 'images'}"
    written = (folder / "config.yaml").read_bytes()
    assert "in steps per epoch (was 2, now 4)" in refuse(folder, options)
    assert (folder / "config.yaml").read_bytes() == written
    done = pretrain(folder, options, flags=["--resume", "force"])
    assert "at step 12" in done.stdout  # epoch 3 of 4 steps
    # The log's old lines, up to the checkpoint at step 6 of old, then the new ones.
    steps = [line["step"] for line in log_of(folder) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 13, 14, 15, 16]


@pytest.fixture(scope="module")
def of_17(images, pretrain, tmp_path_factory) -> tuple[Path, Path]:
    """17 images, of which any of 16 to 23 make 2 steps an epoch; a run's folder at step 3 of 4."""
    root = tmp_path_factory.mktemp("of_17")
    shutil.copytree(images, root / "images")
    shutil.copy(images / "red" / "00.png", root / "images" / "red" / "08.png")
    options = f"{TRAINED} TRAIN.EPOCHS 2 CKPT.EVERY_MINUTES 0 DATA.PATH {root / 'images'}"
    pretrain(root / "run", options)
    shutil.move(root / "run" / "checkpoint_previous.pth", root / "run" / "checkpoint.pth")
    assert load(root / "run")["step"] == 3
    return root / "images", root / "run"


def test_a_resume_on_other_images_is_refused_though_the_steps_agree(of_17, refuse, tmp_path):
    shutil.copytree(of_17[0], tmp_path / "images")
    edit(tmp_path / "images" / "red" / "02.png")
    options = f"{TRAINED} TRAIN.EPOCHS 2 DATA.PATH {tmp_path / 'images'}"
    line = refuse(of_17[1], options)
    was_and_now = r"the images in DATA\.PATH \(was [0-9a-f]{12} by .*, now [0-9a-f]{12} by "
    assert re.search(rf"other options: {was_and_now}", line), line
    assert "--resume force to go on with the new ones" in line


def test_at_an_epochs_edge_too_and_by_force_it_is_said(of_17, pretrain, refuse, tmp_path):
    folder = copy_of(of_17[1], tmp_path / "run", epoch=1)
    images = Path(shutil.copytree(of_17[0], tmp_path / "images"))
    shutil.copy(images / "red" / "01.png", images / "red" / "02.png")
    options = f"{TRAINED} TRAIN.EPOCHS 2 DATA.PATH {images}"
    assert "the images in DATA.PATH (was" in refuse(folder, options)
    done = pretrain(folder, f"{options} RESUME force")
    assert "warning: resuming with other options: the images in DATA.PATH (was" in done.stdout
    assert "at step 2" in done.stdout
    # What it wrote is of the new images.
    assert "warning: resuming" not in pretrain(folder, options).stdout


def test_an_older_checkpoint_goes_on_and_says_what_it_does_not_know(of_17, pretrain, tmp_path):
    state = load(of_17[1])
    del state["images"], state["config"]["CMD"]["LAMBDA1"]
    (tmp_path / "run").mkdir()
    checkpoint.save(state, tmp_path / "run" / "checkpoint.pth")
    done = pretrain(tmp_path / "run", f"{TRAINED} TRAIN.EPOCHS 2 DATA.PATH {of_17[0]}")
    assert "checkpoint.pth does not say which images it was trained on" in done.stdout
    assert "without these options, by which it goes on: CMD.LAMBDA1 0.3\n" in done.stdout
    assert load(tmp_path / "run")["images"].startswith("contents:")


FORMS = {"LT": "residual", "LS_GRAD": "image", "DIVERSE_K": 6}  # as they once were


def test_a_run_by_an_earlier_attention_is_refused(trained, refuse, tmp_path):
    state, path = load(trained), tmp_path / "checkpoint.pth"
    state["config"]["CMD"] |= FORMS
    checkpoint.save(state, path)
    sentence = f"{path} is a run of cmd by an earlier version"
    with pytest.raises(InputError, match=re.escape(sentence)):
        load_source(path)
    assert refuse(tmp_path, TRAINED).startswith(f"error: {sentence}")
    assert load(tmp_path)["step"] == state["step"]


def test_a_run_with_an_earlier_l_t_is_read_and_does_not_go_on(tmp_path):
    """It has the parts of a run without, and said that L_T was on."""
    cfg = small_config(OUTPUT_DIR=str(tmp_path))
    state = checkpoint_of(pretraining(cfg)) | {"images": "images"}
    del state["model"]["bag_head"]
    for side in ("student", "teacher"):
        state[side] = {k: v for k, v in state[side].items() if not k.startswith("head_bag.")}
    checkpoint.save_last(state, tmp_path)
    with pytest.raises(InputError, match="the L_T of an earlier version"):
        find(cfg, 12, "images", 3, World(0, 1, torch.device("cpu")))
    assert load_source(tmp_path / "checkpoint.pth").network.head_bag is None


def test_a_run_of_another_objective_by_an_earlier_version_goes_on(tmp_path):
    cfg = small_config(LOSS__OBJECTIVE="esvit", OUTPUT_DIR=str(tmp_path))
    state = checkpoint_of(pretraining(cfg)) | {"images": "images"}
    state["config"]["CMD"] |= FORMS
    checkpoint.save_last(state, tmp_path)
    assert not find(cfg, 12, "images", 3, World(0, 1, torch.device("cpu"))).forced


@pytest.mark.parametrize("output", ["{0}/run", "{0}", "{0}/red/a/b"])
def test_a_run_among_its_images_is_refused(output, images, refuse):
    before = sorted(images.rglob("*"))
    line = refuse(output.format(images), TRAINED)
    assert f"lies in {images}, the folder of images" in line
    assert sorted(images.rglob("*")) == before


@pytest.mark.parametrize(("steps", "goes_on_at"), [(8, 12), (4, 6), (3, 4), (2, 3)])
def test_a_run_goes_on_at_the_same_place_within_its_epoch(steps, goes_on_at, tmp_path):
    """After 6 steps of 4 an epoch, with so many an epoch: half way through the second."""
    cfg = small_config()
    state = checkpoint_of(pretraining(cfg)) | {"step": 6}
    again = pretraining(cfg, steps)
    resume(again, record_of(), Found(tmp_path, state, [], forced=True))
    assert again.step == goes_on_at


def test_a_run_longer_than_asked_for_keeps_its_files_when_refused(trained, refuse):
    written = (trained / "config.yaml").read_bytes()
    line = refuse(trained, f"{TRAINED} TRAIN.EPOCHS 2")
    assert "is at step 8, beyond the run of 4 steps: raise --epochs." in line
    assert (trained / "config.yaml").read_bytes() == written


# Crops go on as they were made


def crops_of_a_run_on(kind: str, folder: Path, **options) -> str:
    """Who makes the crops of a run that starts or goes on in the folder, on a kind of device."""
    cfg = small_config(OUTPUT_DIR=str(folder), **options)
    find(cfg, 12, "images", 3, World(0, 1, torch.device(kind)))
    return cfg.DATA.CROPS


def test_who_crops_is_decided_by_the_device_once(tmp_path, told):
    assert [crops_of_a_run_on(kind, tmp_path) for kind in ("cuda", "cpu")] == ["device", "workers"]
    assert crops_of_a_run_on("cuda", tmp_path, DATA__CROPS="workers") == "workers"
    for began, at_home, elsewhere in (("workers", "cpu", "cuda"), ("device", "cuda", "cpu")):
        run = pretraining(small_config(DATA__CROPS=began))
        checkpoint.save_last(checkpoint_of(run) | {"images": "images"}, tmp_path)
        assert crops_of_a_run_on(at_home, tmp_path) == began
        assert told.text == ""
        assert crops_of_a_run_on(elsewhere, tmp_path) == began
        assert f"the run began with DATA.CROPS {began} and goes on with it; on {elsewhere}" in (
            told.text
        )
        other = {"workers": "device", "device": "workers"}[began]
        with pytest.raises(InputError, match=rf"DATA\.CROPS \(was {began}, now {other}\)"):
            crops_of_a_run_on(at_home, tmp_path, DATA__CROPS=other)
        told.clear()
