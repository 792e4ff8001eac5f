"""Linear probe on frozen features: EsViT's recipe, a sweep of it, or logistic regression.

One process, on a GPU or the CPU:
    python eval_linear.py --pretrained_weights CKPT --data_path DATA --output_dir OUT
Several GPUs of one machine:
    torchrun --nproc_per_node=8 eval_linear.py --pretrained_weights CKPT --data_path DATA \\
        --output_dir OUT
DATA as for eval_knn.py. --features cached extracts the training features once, without
augmentation (minutes instead of hours); --sweep 0.0001 0.001 0.01 trains a head for each rate on
one pass; --classifier logistic takes scikit-learn's regression; --label_shares 0.1 0.2 0.5 1 probes
with that part of every class's labels. The same command goes on where it stopped. Written into
OUT: linear.json, and the heads, linear.pth.
"""

from engine.evaluation.measure import measure
from engine.evaluation.opening import join, open_features, results_folder
from engine.evaluation.probing import LinearProbe
from engine.evaluation.provenance import provenance
from utils import cli, distributed
from utils.errors import InputError, run_script
from utils.files import write_json
from utils.logging import logger


def main() -> None:
    command = cli.parse(__doc__, face=cli.LINEAR)
    cfg = command.cfg
    asks_for_augmented = "LINEAR.FEATURES" in command.typed and cfg.LINEAR.FEATURES == "augmented"
    if cfg.LINEAR.CLASSIFIER == "logistic" and asks_for_augmented:
        raise InputError(
            "--classifier logistic works on features extracted once: drop --features augmented."
        )
    world = join(command)
    features = open_features(command, world)
    folder = results_folder(cfg, "eval_linear")

    results = []
    for share in cfg.LINEAR.LABEL_SHARES:
        (found,) = measure(features, [LinearProbe(cfg.LINEAR, share, cfg.SEED, folder)])
        results.append(found.figures)
        logger.info(describe(found.figures))

    contents = {"protocol": "linear probe", "results": results} | provenance(cfg, features)
    distributed.on_main(lambda: write_json(folder / "linear.json", contents))
    logger.info(f"written: {folder / 'linear.json'}")
    distributed.stop()


def describe(figures: dict) -> str:
    """One line for the user."""
    labels = f"{100 * figures['label_share']:g} % of the labels ({figures['train_images']} images)"
    line = f"{labels}: top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %"
    if "best_top1" in figures:
        line += (
            f" after the last epoch; best on the test images, which flatters: "
            f"{figures['best_top1']:.2f} % at epoch {figures['best_epoch']}"
        )
    if figures["sweep"]:
        name = "C" if "C" in figures else "base_lr"
        line += f"; {name} {figures[name]:g}, chosen on held-out training images"
    return "; ".join([line, *figures["remarks"]])


if __name__ == "__main__":
    run_script(main, if_interrupted="the same command goes on where it stopped")
