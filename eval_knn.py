"""k-NN classification of a benchmark's test images by its training images, on frozen features.

One process, on a GPU or the CPU:
    python eval_knn.py --pretrained_weights CKPT --data_path DATA --output_dir OUT
Several GPUs of one machine:
    torchrun --nproc_per_node=8 eval_knn.py --pretrained_weights CKPT --data_path DATA
DATA holds train and val (or test) with class subfolders; --dataset cub, cars, aircraft, nabirds,
flowers or pets reads that benchmark's own format. Written into OUT: knn.json, classes.png (the
accuracy of every class, the pairs most confused) and tsne.png.
"""

from pathlib import Path

from engine.evaluation.feature_cache import SplitFeatures
from engine.evaluation.measure import KNN, KNNFigures, measure
from engine.evaluation.opening import join, open_features, results_folder
from engine.evaluation.provenance import provenance
from engine.pictures.classes import most_confused, per_class_accuracy, plot_classes
from engine.pictures.drawing import save
from engine.pictures.tsne import plot_tsne
from utils import cli, distributed
from utils.config import Node
from utils.errors import run_script
from utils.files import write_json
from utils.logging import logger


def main() -> None:
    command = cli.parse(__doc__, face=cli.KNN)
    world = join(command)
    cfg = command.cfg
    features = open_features(command, world)
    folder = results_folder(cfg, "eval_knn")

    (found,) = measure(features, [KNN(cfg.KNN.KS, cfg.KNN.TEMPERATURE)])
    for k, figures in found.figures["k"].items():
        logger.info(f"{k}-NN: top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %")
    for remark in found.figures["remarks"]:
        logger.warning(remark)

    distributed.on_main(lambda: write(cfg, features, found, folder))
    logger.info(f"written: {folder}/knn.json" + ", classes.png, tsne.png" * cfg.EVAL.PICTURES)
    distributed.stop()


def write(cfg: Node, features: SplitFeatures, found: KNNFigures, folder: Path) -> None:
    """The figures, also class by class, and their pictures: for the first number of neighbours."""
    k, test = cfg.KNN.KS[0], features.of("test")
    by_class = per_class_accuracy(found.predicted[k], test.labels, test.classes)
    confused = most_confused(found.predicted[k], test.labels, test.classes)
    classes = {"k": k, "accuracy": by_class, "most_confused": confused}
    figures = found.figures | {"classes": classes}
    write_json(folder / "knn.json", figures | provenance(cfg, features))
    if cfg.EVAL.PICTURES:
        save(plot_classes(by_class, confused, f"{k}-NN"), folder / "classes.png")
        figure = plot_tsne(test.values, test.labels, test.classes, cfg.SEED)
        if figure is not None:
            save(figure, folder / "tsne.png")


if __name__ == "__main__":
    run_script(main)
