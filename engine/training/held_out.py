"""The k-NN test of the teacher on held-out images, during a run."""

from datasets.benchmarks import Splits
from datasets.loader import usable_workers
from datasets.multicrop import default_resize
from engine.evaluation.feature_cache import SplitFeatures
from engine.evaluation.features import Reading
from engine.evaluation.measure import KNN, measure
from engine.evaluation.source import Source
from engine.training.step import Pretraining
from utils import config, distributed


def knn_is_due(run: Pretraining) -> bool:
    """Whether the epochs that are done call for a k-NN test: every EVAL.KNN_EVERY, and the last."""
    every = run.cfg.EVAL.KNN_EVERY
    if not every or run.step % run.steps_per_epoch:
        return False
    return run.epoch % every == 0 or run.step == run.total_steps


def held_out_knn(run: Pretraining, held_out: Splits) -> tuple[float, float]:
    """k-NN top-1 and top-5, percent, of the teacher's image features on the held-out folders."""
    cfg, size = run.cfg, config.eval_size(run.cfg)
    backbone = run.teacher.backbone.eval()
    # A process may have statistics of its own: what is tested is what a checkpoint holds.
    statistics = {name: buffer.cpu() for name, buffer in backbone.named_buffers()}
    backbone.load_state_dict(distributed.of_main(statistics), strict=False)
    reading = Reading(
        run.world,
        size,
        default_resize(size),
        run.precision,
        cfg.EVAL.BATCH_SIZE_PER_GPU,
        usable_workers(cfg.DATA.WORKERS),
        cfg.DATA.MAX_BAD,
        config.normalisation(cfg),
    )
    features = SplitFeatures(Source(None, run.teacher), held_out, reading)
    (found,) = measure(features, [KNN([cfg.EVAL.KNN_K])])
    run.freezing.set_modes()
    figures = found.figures["k"][str(cfg.EVAL.KNN_K)]
    return figures["top1"], figures["top5"]
