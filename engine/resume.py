"""Going on from a run's own checkpoint, and starting from someone's weights."""

from pathlib import Path

from engine.pretrain import Pretraining
from models.network import Network, make_teacher
from models.pretrained import load_pretrained
from utils import checkpoint, config
from utils.config import Node
from utils.errors import InputError
from utils.logging import logger


def find(cfg: Node, images_per_step: int) -> dict | None:
    """The state in OUTPUT_DIR, checked against `cfg`; None for a fresh start.

    Raises InputError when the file is not ours, or when options differ in more than
    epochs, paths, workers and logging, naming them; RESUME force overrides the latter.
    """
    path = Path(cfg.OUTPUT_DIR) / checkpoint.LAST
    if not path.exists():
        return None
    state = checkpoint.load_file(path)
    if not checkpoint.is_own(state):
        raise InputError(
            f"{path} is not a checkpoint of this project: choose another --output_dir."
        )
    checkpoint.check_format(state, path)
    stored = config.from_dict(state["config"], str(path))
    names = config.differing(cfg, stored, config.RESUME_MAY_DIFFER)
    texts = [
        f"{name} (was {config.get(stored, name)}, now {config.get(cfg, name)})" for name in names
    ]
    if state["images_per_step"] != images_per_step:
        texts.append(f"images per step (was {state['images_per_step']}, now {images_per_step})")
    if texts and cfg.RESUME != "force":
        raise InputError(
            f"{path} is from a run with other options: {', '.join(texts)}. Use the old options, "
            f"another --output_dir, or --resume force to go on with the new ones."
        )
    if texts:
        logger.warning(f"resuming with other options: {', '.join(texts)}")
    return state


def resume(run: Pretraining, state: dict) -> None:
    """Put the run where the state was written, and say so."""
    if state["images_per_step"] != run.images_per_step:
        # Steps of another size: go on at the same number of images seen.
        seen = state["step"] * state["images_per_step"]
        state = {**state, "step": seen // run.images_per_step}
    try:
        run.restore(state)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the checkpoint in {run.cfg.OUTPUT_DIR} does not fit these options: {reason}."
        ) from None
    if run.step > run.total_steps:
        raise InputError(
            f"the checkpoint in {run.cfg.OUTPUT_DIR} is at step {run.step}, beyond the run of "
            f"{run.total_steps} steps: raise --epochs."
        )
    logger.info(f"resuming from {run.cfg.OUTPUT_DIR}/{checkpoint.LAST} at step {run.step}")


def start_from(cfg: Node, student: Network, teacher: Network) -> None:
    """INIT.WEIGHTS, if given, for student and teacher, at epoch 0; says which parts fitted."""
    if not cfg.INIT.WEIGHTS:
        return
    read = load_pretrained(student, cfg.INIT.WEIGHTS, cfg.INIT.CHECKPOINT_KEY)
    make_teacher(student, teacher)
    logger.info(f"starting from {cfg.INIT.WEIGHTS}: {', '.join(read)}")
