"""Going on from a run's own checkpoint, and starting from someone's weights."""

from pathlib import Path

import torch

from engine.pretrain import Pretraining
from models.network import Network, load_shared, make_teacher
from models.pretrained import load_pretrained
from utils import checkpoint, config
from utils.config import Node
from utils.errors import InputError
from utils.logging import logger
from utils.options import RESUME_MAY_DIFFER


def find(cfg: Node, images_per_step: int, steps_per_epoch: int) -> dict | None:
    """The state in OUTPUT_DIR, checked against `cfg`; None for a fresh start.

    Raises InputError when the file is not ours, or when options differ in more than epochs,
    paths, workers and logging, or the data in number, naming them; RESUME force overrides
    the latter two.
    """
    path = Path(cfg.OUTPUT_DIR) / checkpoint.LAST
    try:
        if not path.exists():
            return None
    except OSError as error:
        raise InputError(f"--output_dir: {path} cannot be read ({error.strerror}).") from None
    state = checkpoint.load_own(path)
    stored = config.from_dict(state["config"], str(path))
    changes = [
        (name, config.get(stored, name), config.get(cfg, name))
        for name in config.differing(cfg, stored, _may_differ(cfg, stored))
    ]
    if state["images_per_step"] != images_per_step:
        changes.append(("images per step", state["images_per_step"], images_per_step))
    elif state["steps_per_epoch"] != steps_per_epoch:
        name = "the number of images in DATA.PATH, in steps per epoch"
        changes.append((name, state["steps_per_epoch"], steps_per_epoch))
    text = ", ".join(f"{name} (was {was}, now {now})" for name, was, now in changes)
    if changes and cfg.RESUME != "force":
        # Weights of another shape cannot go on, even by force.
        reshaped = [
            name
            for name, _, _ in changes
            if name.startswith(("MODEL.", "HEAD.")) and name != "MODEL.DROP_PATH"
        ]
        force = ", or --resume force to go on with the new ones"
        raise InputError(
            f"{path} is from a run with other options: {text}. Use the old options, or "
            f"another --output_dir{'' if reshaped else force}."
        )
    if changes:
        logger.warning(f"resuming with other options: {text}")
    return state


def _may_differ(cfg: Node, stored: Node) -> tuple[str, ...]:
    """Options in which the run may differ from the stored one and still be the same run."""
    on_device = config.crops_on_device(cfg)
    if on_device != config.crops_on_device(stored):
        return RESUME_MAY_DIFFER
    # Where decoded images are kept changes no crop; how large they are, only those from them.
    where = ("DATA.CACHE", "DATA.CROPS", *(() if on_device else ("DATA.CACHE_SIZE",)))
    return (*RESUME_MAY_DIFFER, *where)


def resume(run: Pretraining, state: dict) -> None:
    """Put the run where the state was written, and say so."""
    epoch, within = divmod(state["step"], state["steps_per_epoch"])
    # The same place in the epoch, where its steps are of another size or number.
    step = epoch * run.steps_per_epoch + within * run.steps_per_epoch // state["steps_per_epoch"]
    if step > run.total_steps:
        raise InputError(
            f"the checkpoint in {run.cfg.OUTPUT_DIR} is at step {step}, beyond the run of "
            f"{run.total_steps} steps: raise --epochs."
        )
    try:
        _restore(run, state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"the checkpoint in {run.cfg.OUTPUT_DIR} does not fit these options ({reason} ...): "
            f"use the old ones, or another --output_dir."
        ) from None
    run.step, run.logged_step = step, state["step"]
    logger.info(f"resuming from {run.cfg.OUTPUT_DIR}/{checkpoint.LAST} at step {run.step}")


def _restore(run: Pretraining, state: dict) -> None:
    """Weights, centres, optimizer and scaler; the latter two start fresh where they differ."""
    run.student.load_state_dict(state["student"])
    load_shared(run.teacher, state["teacher"])
    run.centres.load_state_dict(state["centres"])
    if state["config"]["TRAIN"]["OPTIMIZER"] == run.cfg.TRAIN.OPTIMIZER:
        saved = state["optimizer"]
        # How a step is computed belongs to this machine, not to the one that saved.
        for group, own in zip(saved["param_groups"], run.optimizer.param_groups, strict=True):
            group |= {name: own[name] for name in ("fused", "foreach") if name in own}
        run.optimizer.load_state_dict(saved)
        _lay_out_as_parameters(run.optimizer)
    else:
        logger.warning("TRAIN.OPTIMIZER differs: the optimizer starts without its moments")
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
    """INIT.WEIGHTS, if given, for student and teacher, at epoch 0; says which parts fitted."""
    if not cfg.INIT.WEIGHTS:
        return
    read = load_pretrained(student, cfg.INIT.WEIGHTS, cfg.INIT.CHECKPOINT_KEY)
    make_teacher(student, teacher)
    logger.info(f"starting from {cfg.INIT.WEIGHTS}: {', '.join(read)}")
