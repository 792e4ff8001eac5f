"""Retrieval: a benchmark's test images look for their class among its training images.

One process, on a GPU or the CPU:
    python eval_retrieval.py --pretrained_weights CKPT --data_path DATA --output_dir OUT
Several GPUs of one machine:
    torchrun --nproc_per_node=8 eval_retrieval.py --pretrained_weights CKPT --data_path DATA
DATA as for eval_knn.py. --split ratio takes every ninth test image as a query and all the rest as
the gallery, as the authors' released code does. Written into OUT: retrieval.json and retrieval.png
(queries with their first hits).
"""

from pathlib import Path

from engine.evaluation.feature_cache import SplitFeatures
from engine.evaluation.measure import Retrieval, RetrievalFigures, measure
from engine.evaluation.opening import join, open_features, results_folder
from engine.evaluation.provenance import provenance
from engine.pictures.drawing import save
from engine.pictures.retrieved import choose_queries, plot_retrieved
from utils import cli, distributed
from utils.config import Node
from utils.errors import run_script
from utils.files import write_json
from utils.logging import logger


def main() -> None:
    command = cli.parse(__doc__, face=cli.RETRIEVAL)
    world = join(command)
    cfg = command.cfg
    features = open_features(command, world)
    folder = results_folder(cfg, "eval_retrieval")

    (found,) = measure(features, [Retrieval(cfg.RETRIEVAL.SPLIT)])
    figures = found.figures
    logger.info(
        f"retrieval, split {figures['split']}: {figures['queries']} queries, "
        f"{figures['gallery_images']} images in the gallery\n"
        f"Rank-1 {figures['rank1']:.2f} %, Rank-5 {figures['rank5']:.2f} %, "
        f"mAP {figures['map']:.2f} %\n"
        f"mAP@100 as in the authors' released code, which flatters: "
        f"{figures['map_at_100_released']:.2f} %"
    )
    for remark in figures["remarks"]:
        logger.warning(remark)

    distributed.on_main(lambda: write(cfg, features, found, folder))
    shown = cfg.EVAL.PICTURES and features.splits is not None
    logger.info(f"written: {folder}/retrieval.json" + ", retrieval.png" * shown)
    if cfg.EVAL.PICTURES and not shown:
        logger.info("no picture: --data_path would give the images to show")
    distributed.stop()


def write(cfg: Node, features: SplitFeatures, found: RetrievalFigures, folder: Path) -> None:
    """The figures, and where the images are at hand, some queries with their first hits."""
    write_json(folder / "retrieval.json", found.figures | provenance(cfg, features))
    if cfg.EVAL.PICTURES and features.splits is not None:
        images = features.images_with_features()
        chosen = choose_queries(found.ranked.average_precision)
        figure = plot_retrieved(
            images.subset(found.queries),
            images.subset(found.gallery),
            found.ranked.first[chosen],
            chosen,
            "Queries, from the best average precision to the worst, and their first hits",
        )
        save(figure, folder / "retrieval.png")


if __name__ == "__main__":
    run_script(main)
