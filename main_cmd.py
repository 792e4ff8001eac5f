"""Self-supervised pretraining: CMD, EsViT and DINO as its special cases, MoCo v2 and LCR.

One process, on a GPU or the CPU:
    python main_cmd.py --data_path DATA/train --output_dir OUT
Several GPUs of one machine:
    torchrun --nproc_per_node=8 main_cmd.py --data_path DATA/train --output_dir OUT
The same command with the same --output_dir goes on where it stopped.
"""

from pathlib import Path

from datasets.feed import step_sampler
from datasets.fine_grained import build_dataset, prepare
from datasets.folder import refuse_among_images
from datasets.loader import steps_per_epoch, usable_workers
from engine import build, preflight
from engine.evaluation.opening import join
from engine.preflight import advice, machine, memory
from engine.training import resume
from engine.training.bad_images import BadImages
from engine.training.determinism import explain_refusal, set_deterministic
from engine.training.lines import summary
from engine.training.loop import train
from engine.training.record import Record
from engine.training.step import Pretraining
from engine.training.validation import Validation
from models.registry import resolve
from utils import checkpoint, cli, config, distributed, lock
from utils.errors import InputError, run_script
from utils.logging import logger
from utils.precision import precision_of
from utils.signals import StopSignals


def main() -> None:
    with StopSignals() as signals:
        pretrain(signals)


def pretrain(signals: StopSignals) -> None:
    # Options: nothing runs before they are checked.
    command = cli.parse(__doc__)
    cfg = command.cfg
    if not (cfg.OUTPUT_DIR or "--check" in command.extra):
        raise InputError("no folder for the run: give --output_dir.")
    if not cfg.DATA.PATH:
        raise InputError("no images: give --data_path (python -m datasets.synthetic makes some).")
    resolve(build.backbone_spec(cfg))

    # Processes and device.
    world = join(command)
    set_deterministic(cfg)
    precision_of(cfg, world.device)  # refuses what the device lacks, before any work
    if "--check" in command.extra:
        preflight.run(cfg, world)
        distributed.stop()
        return

    # Data.
    prepare(cfg.DATA.DATASET, cfg.DATA.PATH, cfg.DATA.DOWNLOAD)
    images = build_dataset(cfg.DATA.DATASET, cfg.DATA.PATH, cfg.DATA.PARTIAL)
    batch, accumulation = cfg.TRAIN.BATCH_SIZE_PER_GPU, cfg.TRAIN.ACCUM_STEPS
    epoch_steps = steps_per_epoch(len(images), batch, world.size, accumulation)
    validation = Validation.of(cfg, images)
    evaluated = validation.labelled if validation else ()
    refuse_among_images(Path(cfg.OUTPUT_DIR), images, *evaluated)
    # Files are read for it, once: by one process, for all.
    fingerprint = distributed.on_main(lambda: images.fingerprint)

    # Networks, the same on every process; objective, optimizer, schedules.
    student, teacher = build.networks(cfg)
    per_step = batch * world.size * accumulation
    found = resume.find(cfg, len(images), fingerprint, per_step, world)
    for warning in distributed.on_main(lambda: [*advice.warnings(cfg, world.size, images)]):
        logger.warning(warning)
    if found is None:
        resume.start_from(cfg, student, teacher)
    run = Pretraining.build(cfg, world, student, teacher, epoch_steps)
    record = Record(BadImages(len(images), cfg.DATA.MAX_BAD), fingerprint)

    # Going on where a checkpoint stands in the run's folder.
    refused = []
    if found is not None:
        resume.resume(run, record, found)
        refused = [path for path, _ in found.refused]
        del found
    distributed.agree(
        {"images in DATA.PATH": len(images), "the step to start from": run.step},
        "put DATA.PATH and OUTPUT_DIR where all of them see the same files",
    )
    if run.step == run.total_steps:
        logger.info(f"the run is complete ({cfg.TRAIN.EPOCHS} epochs); raise --epochs to go on")
        distributed.stop()
        return
    folder = Path(cfg.OUTPUT_DIR)
    size = memory.checkpoint_size(cfg, student, teacher)
    sizes = distributed.on_main(lambda: images.sizes_looked_at)
    distributed.on_main(lambda: open_folder(cfg, refused, size, sizes))

    # From images to crops; where images are kept, they are decoded here.
    feed = build.feed(cfg, images, world, memory.room_for_step(cfg, world))
    record.bad_images.forget_repaired()
    record.bad_images.note(feed.bad)
    record.bad_images.exchange(folder)

    # Training.
    logger.info(summary(run, len(images), feed))
    steps = (run.step, run.total_steps)
    sampler = step_sampler(images, batch, accumulation, world, cfg.SEED, *steps)
    signals.defer()
    with explain_refusal():
        batches = feed.batches(sampler, usable_workers(cfg.DATA.WORKERS))
        train(run, record, batches, folder, validation, signals)
    logger.info(f"done: {folder}")
    distributed.stop()


def open_folder(cfg: config.Node, refused: list[Path], size: int, sizes: list) -> None:
    """Make the run's folder, keep others out of it, and write the resolved options into it.

    refused: files that step aside. size: bytes of a checkpoint. sizes: sides of a sample of images.
    InputError where a checkpoint or the loader's batches lack room.
    """
    folder = Path(cfg.OUTPUT_DIR)
    lock.claim(folder, "pretraining")
    for warning in machine.warnings(cfg, sizes, machine.disk_needed(cfg, folder, size)):
        logger.warning(warning)
    for path in refused:
        logger.info(f"{path} is kept as {checkpoint.set_aside(path)}")
    config.write(cfg, folder / "config.yaml")


if __name__ == "__main__":
    run_script(main, "the same command goes on from the last checkpoint, if there is one")
