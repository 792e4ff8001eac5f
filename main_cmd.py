"""Self-supervised pretraining: CMD, EsViT and DINO as its special cases, MoCo v2 and LCR.

One process, on a GPU or the CPU:
    python main_cmd.py --data_path DATA/train --output_dir OUT
Several GPUs of one machine:
    torchrun --nproc_per_node=8 main_cmd.py --data_path DATA/train --output_dir OUT
The same command with the same --output_dir goes on where it stopped.
"""

from pathlib import Path

from torch import nn

from datasets.feed import step_sampler
from datasets.fine_grained import build_dataset, prepare
from datasets.loader import steps_per_epoch, usable_workers
from engine import build, preflight
from engine.evaluation.evaluation import join
from engine.evaluation.features import gallery_and_queries
from engine.preflight import advice
from engine.training import resume
from engine.training.bad_images import BadImages
from engine.training.determinism import explain_refusal, set_deterministic
from engine.training.loop import train
from engine.training.step import Pretraining, scaled_lr
from models.pretrained import count_parameters
from models.registry import resolve
from utils import checkpoint, cli, config, distributed
from utils.errors import InputError, run_script
from utils.files import make_folder
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
    if not (cfg.OUTPUT_DIR or command.check):
        raise InputError("no folder for the run: give --output_dir.")
    if not cfg.DATA.PATH:
        raise InputError("no images: give --data_path (python -m datasets.synthetic makes some).")
    resolve(build.backbone_spec(cfg))

    # Processes and device.
    world = join(command)
    set_deterministic(cfg)
    precision_of(cfg, world.device)  # refuses what the device lacks, before any work
    if command.check:
        preflight.run(cfg, world)
        distributed.stop()
        return

    # Data: the images, shuffled every epoch.
    prepare(cfg.DATA.DATASET, cfg.DATA.PATH, cfg.DATA.DOWNLOAD)
    dataset = build_dataset(cfg.DATA.DATASET, cfg.DATA.PATH, partial=cfg.DATA.PARTIAL)
    batch, accumulation = cfg.TRAIN.BATCH_SIZE_PER_GPU, cfg.TRAIN.ACCUM_STEPS
    images_per_step = batch * world.size * accumulation
    epoch_steps = steps_per_epoch(len(dataset), batch, world.size, accumulation)
    for warning in advice.warnings(cfg, world.size, len(dataset)):
        logger.warning(warning)
    knn_folders = (cfg.EVAL.KNN_TRAIN, cfg.EVAL.KNN_VAL) if cfg.EVAL.KNN_EVERY else ()

    # Networks, the same on every process.
    student, teacher = build.networks(cfg)
    found = resume.find(cfg, len(dataset), images_per_step, world.size)
    if found is None:
        resume.start_from(cfg, student, teacher)
    # Contrast has groups of its own in their place (models/grouped_norm.py).
    synchronised = not build.objective(cfg).projects
    if world.size > 1 and world.device.type == "cuda" and synchronised:
        student, teacher = map(nn.SyncBatchNorm.convert_sync_batchnorm, (student, teacher))
    student, teacher = student.to(world.device), teacher.to(world.device)

    # Objective, optimizer, schedules.
    run = Pretraining.build(
        cfg,
        world,
        student,
        teacher,
        epoch_steps,
        held_out=gallery_and_queries(*knn_folders, config.eval_size(cfg)) if knn_folders else (),
        bad_images=BadImages(len(dataset), cfg.DATA.MAX_BAD),
    )

    # Going on where a checkpoint stands in the run's folder.
    refused = []
    if found is not None:
        resume.resume(run, found)
        refused = found.refused
        del found
    distributed.agree(
        {"images in DATA.PATH": len(dataset), "the step to start from": run.step},
        "put DATA.PATH and OUTPUT_DIR where all of them see the same files",
    )
    if run.step == run.total_steps:
        logger.info(f"the run is complete ({cfg.TRAIN.EPOCHS} epochs); raise --epochs to go on")
        distributed.stop()
        return
    folder = Path(cfg.OUTPUT_DIR)
    distributed.on_main(lambda: open_folder(cfg, folder, [path for path, _ in refused]))

    # The way from images to crops, of which a part may be done here once and for all.
    feed = build.feed(cfg, dataset, world)
    run.bad_images.recall(folder)
    run.bad_images.note(feed.bad)
    run.bad_images.exchange(folder)
    workers = usable_workers(cfg.DATA.WORKERS)

    logger.info(
        f"{len(dataset)} images in {cfg.DATA.PATH}; "
        f"processes {world.size} on {world.device.type}, {run.precision}\n"
        f"{feed.description} (loader processes {workers} x {world.size})\n"
        f"{cfg.MODEL.ARCH}: backbone {count_parameters(student.backbone) / 1e6:.2f} M parameters, "
        f"student in all {count_parameters(student) / 1e6:.2f} M; "
        f"objective {run.objective.name}\n"
        f"images per step {images_per_step} (batch {batch} x processes {world.size} x "
        f"accumulation {accumulation}); steps per epoch {epoch_steps}, in all {run.total_steps}; "
        f"images left over each epoch {len(dataset) - epoch_steps * images_per_step}\n"
        f"base lr {cfg.TRAIN.BASE_LR:.3g} at 256 images, "
        f"peak lr {scaled_lr(cfg, images_per_step):.3g}"
    )

    steps = (run.step, run.total_steps)
    sampler = step_sampler(dataset, batch, accumulation, world, cfg.SEED, *steps)
    signals.defer()
    with explain_refusal():
        train(run, feed.batches(sampler, workers), folder, signals)
    logger.info(f"done: {folder}")
    distributed.stop()


def open_folder(cfg: config.Node, folder: Path, refused: list[Path]) -> None:
    """Make the run's folder and write the resolved options into it; refused files step aside."""
    make_folder(folder)
    for path in refused:
        logger.info(f"{path} is kept as {checkpoint.set_aside(path)}")
    config.write(cfg, folder / "config.yaml")


if __name__ == "__main__":
    run_script(main, "the same command goes on from the last checkpoint, if there is one")
