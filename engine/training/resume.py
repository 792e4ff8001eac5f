"""Going on from a run's own checkpoint, and starting from someone's weights."""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine import build
from engine.training.optim import take_moments
from engine.training.record import Record
from engine.training.schedules import scaled_lr
from engine.training.step import Pretraining
from models import registry
from models.hub import located
from models.network import Network, load_shared, make_teacher
from models.pretrained import load_pretrained
from utils import checkpoint, config
from utils.config import Node
from utils.distributed import World
from utils.errors import InputError
from utils.logging import logger
from utils.options import OPTIONS


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from.

    refused: newer files that were passed over, and why; forced: whether options or data differ
    from the stored run's and RESUME force took them.
    """

    path: Path
    state: dict
    refused: list[tuple[Path, str]]
    forced: bool


def find(
    cfg: Node, images: int, fingerprint: str, images_per_step: int, world: World
) -> Found | None:
    """The newest intact checkpoint in OUTPUT_DIR, checked against `cfg`; None for a fresh start.

    images: in DATA.PATH, and their fingerprint. Raises InputError where files are there and none
    is ours and intact, or when options differ in more than epochs, paths, workers and logging, or
    the images, naming them; RESUME force overrides the latter two, but not where weights have
    other shapes or the objective keeps other state. Another number of processes is a warning, and
    so is a checkpoint that does not say of which images it is, or that is of a version without some
    option. DATA.CROPS auto and INIT's recipe in `cfg` are settled: as the stored run has them.
    """
    newest = checkpoint.newest_intact(Path(cfg.OUTPUT_DIR))
    if newest is None:
        config.settle_crops(cfg, world.device.type)
        config.settle_start(cfg)
        return None
    path, state, refused = newest
    for file, reason in refused:
        logger.warning(f"{file} is passed over: {reason}")
    stored, processes = config.from_dict(state["config"], str(path)), world.size
    _take_crops(cfg, stored, world)
    # Settled by the weights that the run began with; and [] is ImageNet's.
    if not cfg.DATA.MEAN or config.normalisation(cfg) == config.normalisation(stored):
        cfg.DATA.MEAN, cfg.DATA.STD = stored.DATA.MEAN, stored.DATA.STD
    config.settle_start(cfg, stored)
    names, known = _must_agree(cfg, stored), dict(config.flat(state["config"], str(path)))
    new = ", ".join(f"{n} {_said(config.get(cfg, n))}" for n in names if n not in known)
    if new:
        logger.warning(f"{path} is of a version without these options, by which it goes on: {new}")
    changes = [
        (name, config.get(stored, name), config.get(cfg, name))
        for name in config.differing(cfg, stored, names)
    ]
    others = state["processes"] != processes
    per_process = images_per_step // processes
    if state["images_per_step"] != images_per_step and not (
        others and state["images_per_step"] == per_process * state["processes"]
    ):
        changes.append(("images per step", state["images_per_step"], images_per_step))
    if state["steps_per_epoch"] != (steps := images // state["images_per_step"]):
        name = "the number of images in DATA.PATH, in steps per epoch"
        changes.append((name, state["steps_per_epoch"], steps))
    was = state.get("images")
    if was is None:
        logger.warning(
            f"{path} does not say which images it was trained on: whether they are those in "
            "DATA.PATH is not known"
        )
    elif was != fingerprint:
        changes.append(("the images in DATA.PATH", _shown(was), _shown(fingerprint)))
    text = ", ".join(f"{name} (was {_said(was)}, now {_said(now)})" for name, was, now in changes)
    if build.objective(stored).needs_bag_head and not state["model"].get("bag_head"):
        raise InputError(
            f"{path} is a run with the L_T of an earlier version, and cannot go on with this one. "
            f"Use the version of the code that wrote it, or another --output_dir."
        )
    # Weights of another shape cannot go on, even by force.
    reshaped = _networks(cfg) != _networks(stored)
    if reshaped or (changes and cfg.RESUME != "force"):
        force = ", or --resume force to go on with the new ones"
        raise InputError(
            f"{path} is from a run with other options: {text}. Use the old options, or "
            f"another --output_dir{'' if reshaped else force}."
        )
    if changes:
        logger.warning(f"resuming with other options: {text}")
    if others:
        logger.warning(_other_processes(cfg, state, images_per_step, processes))
    if cfg.INIT.WEIGHTS and cfg.INIT.WEIGHTS != stored.INIT.WEIGHTS:
        logger.warning(
            f"INIT.WEIGHTS {cfg.INIT.WEIGHTS} is not read: the run goes on from {path}. To start "
            f"from other weights, give another --output_dir"
        )
    return Found(path, state, refused, forced=bool(changes))


def _said(value: object) -> object:
    """As it stands in a sentence, where nothing would be no word."""
    return "''" if value == "" else value


def _shown(fingerprint: str) -> str:
    """The beginning of a hash of images' names and contents."""
    return f"{fingerprint.rpartition(':')[2][:12]} by names and contents"


def _other_processes(cfg: Node, state: dict, images_per_step: int, processes: int) -> str:
    """What changes for a run that goes on with another number of processes."""
    before = state["images_per_step"]
    if before == images_per_step:
        step = f"images per step stay {before}, and so does the learning rate"
    else:
        step = (
            f"images per step {images_per_step} (was {before}), so the peak learning rate is "
            f"{scaled_lr(cfg, images_per_step):.3g} (was {scaled_lr(cfg, before):.3g}), and it "
            f"goes on at the same place of the epoch (to keep them, change --batch_size_per_gpu "
            f"or --accum_steps)"
        )
    return (
        f"the run had {state['processes']} processes and goes on with {processes}: {step}. Drop "
        f"path and the order of sums depend on the processes, so what follows is not bit for bit "
        f"what the others would have given"
    )


def _networks(cfg: Node) -> dict:
    """What decides the shapes of weights and of the objective's state, unread options left out."""
    cfg = cfg.clone()
    for name in config.unread(cfg):
        config.put(cfg, name, OPTIONS[name].default, name)
    own = {"backbone": registry.identity(build.backbone_spec(cfg)), "queue": cfg.MOCO.QUEUE}
    return build.model_description(cfg) | own


def _take_crops(cfg: Node, stored: Node, world: World) -> None:
    """Of DATA.CROPS auto: crops are made as in the stored run; a line where it began elsewhere."""
    config.settle_crops(stored, "cpu")  # of a version without the option, which had workers
    if cfg.DATA.CROPS == "auto":
        cfg.DATA.CROPS, device = stored.DATA.CROPS, world.device.type
        if config.AUTO_CROPS[device] != cfg.DATA.CROPS and cfg.DATA.CACHE == "none":
            logger.warning(
                f"the run began with DATA.CROPS {cfg.DATA.CROPS} and goes on with it; on {device} "
                f"a new run has {config.AUTO_CROPS[device]}"
            )


def _must_agree(cfg: Node, stored: Node) -> list[str]:
    """Options in which the run must be as the stored one to be the same run."""
    names = {name for name, option in OPTIONS.items() if not option.resume_may_change}
    names -= config.unread(cfg, stored)
    on_device = config.crops_on_device(cfg)
    if on_device == config.crops_on_device(stored):
        # Where decoded images are kept changes no crop; how large they are, only those from them.
        names -= {"DATA.CACHE", "DATA.CROPS", *(() if on_device else ("DATA.CACHE_SIZE",))}
    return [name for name in OPTIONS if name in names]


def resume(run: Pretraining, record: Record, found: Found) -> None:
    """Put the run and its record where the state was written, and say so.

    Raises InputError where the state does not fit the networks or lies beyond the run's end.
    """
    state = found.state
    epoch, within = divmod(state["step"], state["steps_per_epoch"])
    # The same place in the epoch, where its steps are of another size or number.
    step = epoch * run.steps_per_epoch + within * run.steps_per_epoch // state["steps_per_epoch"]
    if step > run.total_steps:
        raise InputError(
            f"{found.path} is at step {step}, beyond the run of "
            f"{run.total_steps} steps: raise --epochs."
        )
    try:
        _restore(run, state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{found.path} does not fit these options ({reason} ...): "
            f"use the old ones, or another --output_dir."
        ) from None
    run.step = step
    record.bad_images.known.update(state["bad_images"])
    record.log_step, record.log_lines = state["step"], state["log_lines"]
    if "standing" in state:
        record.standing.load_state_dict(state["standing"])
    if not found.forced:
        record.window.load_state_dict(state["window"], run.world)
        record.watch.load_state_dict(state["watch"])
    logger.info(f"resuming from {found.path} at step {run.step}")
    epochs, now = state["config"]["TRAIN"]["EPOCHS"], run.cfg.TRAIN.EPOCHS
    if epochs != now and run.step < run.total_steps:
        groups = state["optimizer"]["param_groups"]
        last = max(group["lr"] for group in groups if group.get("rate", 1) <= 1)
        logger.warning(
            f"TRAIN.EPOCHS is {now} (was {epochs}), and the schedules stretch to it: the learning "
            f"rate, {last:.3g} at the last step, goes on at {run.schedules.lr[run.step]:.3g}"
        )


def _restore(run: Pretraining, state: dict) -> None:
    """Weights, the objective's state, counts; optimizer and scaler, fresh where they differ."""
    run.student.load_state_dict(state["student"])
    load_shared(run.teacher, state["teacher"])
    run.carried.load_state_dict(state["carried"])
    run.guard.load_state_dict(state["guard"])
    if state["config"]["TRAIN"]["OPTIMIZER"] != run.cfg.TRAIN.OPTIMIZER:
        logger.warning("TRAIN.OPTIMIZER differs: the optimizer starts without its moments")
    elif take_moments(run.optimizer, state["optimizer"]):
        _lay_out_as_parameters(run.optimizer)
    else:
        logger.warning(
            "what trains differs, and the checkpoint does not say whose its moments are: the "
            "optimizer starts without them"
        )
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give moments their parameters' memory layout, which may have been another when saved.

    The fused kernel walks through both side by side.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def start_from(cfg: Node, student: Network, teacher: Network) -> None:
    """INIT.WEIGHTS, if given, for student and teacher, at epoch 0; says which parts fitted.

    Their normalisation of images becomes the run's, DATA.MEAN and DATA.STD, if these are not given.
    """
    if not cfg.INIT.WEIGHTS:
        return
    path = located(cfg.INIT.WEIGHTS, cfg.MODEL.ARCH)
    read = load_pretrained(student, path, cfg.INIT.CHECKPOINT_KEY, build.backbone_spec(cfg))
    make_teacher(student, teacher)
    logger.info(f"starting from {cfg.INIT.WEIGHTS}: {', '.join(read)}")
    theirs, given = student.backbone.normalisation, config.normalisation(cfg)
    if not cfg.DATA.MEAN and theirs != given:
        cfg.DATA.MEAN, cfg.DATA.STD = map(list, theirs)
    elif theirs != given:
        logger.warning(
            f"images are normalised by DATA.MEAN and DATA.STD: {given}; those of "
            f"{cfg.INIT.WEIGHTS} were by {theirs}"
        )
