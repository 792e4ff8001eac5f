"""Every option of a run, each declared once: a new option is one line of the table below.

Checks, flags and --help, docs/configuration.md, what a resumed run may change, the identity of a
study's figures and a table's 'options that are not the defaults' all read these declarations.
"""

from dataclasses import dataclass
from typing import Any

# What an option decides. Each of these decides what stands after it, too.
SHAPES = "shapes"  # which weights there are, and their shapes
WEIGHTS = "weights"  # what training makes of them
FIGURES = "figures"  # what an evaluation of given weights says
NOTHING = "nothing"  # places, speed, the log: no figure

# The scripts that offer an option's flags.
PRETRAIN, TABLE = "main_cmd", "evaluate"
KNN, RETRIEVAL, LINEAR = "eval_knn", "eval_retrieval", "eval_linear"
ONE_NETWORK = (KNN, RETRIEVAL, LINEAR)
EVALUATIONS = (*ONE_NETWORK, TABLE)
ALL = (PRETRAIN, *EVALUATIONS)

# Objectives that distil, and those that contrast a pair of crops.
DISTILLING = ("dino", "esvit", "cmd", "released")
CONTRASTIVE = ("moco_v2", "lcr")


@dataclass(frozen=True)
class Section:
    """A section of options: its meaning, and what its options decide, which scripts and (none: all)
    which objectives read them, where an option does not say otherwise."""

    name: str
    meaning: str
    decides: str
    scripts: tuple[str, ...]
    objectives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """What is true of one option.

    name: SECTION.KEY. default: the option has its type. meaning: for --help and the page.
    choices: the texts that it may be. at_least, at_most: bounds of a number, and of each entry of
    a list. length: how many entries a list has; filled: at least one. whole: a list's entries are
    whole numbers. lower: capitals mean nothing in it, as in choices. path: a file or folder; ~ is
    the user's home.
    flags: of the scripts in `scripts`. yes_no: a flag of EsViT's that takes true or false, and the
    values that these mean. decides: see above. resume_may_change: although it decides weights.
    objectives: that read it; none: all.
    """

    name: str
    default: Any
    meaning: str
    decides: str
    scripts: tuple[str, ...]
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    length: int | None = None
    filled: bool = False
    whole: bool = False
    lower: bool = False
    path: bool = False
    flags: tuple[str, ...] = ()
    yes_no: tuple[str, str, str] | None = None
    resume_may_change: bool = False
    objectives: tuple[str, ...] = ()


SECTIONS: dict[str, Section] = {}
OPTIONS: dict[str, Option] = {}


def section(name: str, *facts: Any) -> None:
    """Begin a section: its options follow. facts: the other fields of Section, in their order."""
    SECTIONS[name] = Section(name, *facts)


def option(name: str, default: Any, meaning: str, *, flag: str = "", **facts: Any) -> None:
    """Declare an option; `facts` are fields of Option. Several flags: `flag` with spaces between.

    An option that decides no weights may differ in a resumed run.
    """
    own = SECTIONS[name.rpartition(".")[0]]
    facts.setdefault("decides", own.decides)
    facts.setdefault("scripts", own.scripts)
    facts.setdefault("objectives", own.objectives)
    facts.setdefault("resume_may_change", facts["decides"] in (FIGURES, NOTHING))
    OPTIONS[name] = Option(name, default, meaning, flags=tuple(flag.split()), **facts)


# The table. Where memory or time is the real limit, at_most is far beyond what is sensible: a
# sentence in the place of a crash.
# fmt: off

section("", "the run", NOTHING, ALL)
option("SEED", 0, "of initialisation, data order, augmentation and device-side randomness",
       at_least=0, flag="--seed", decides=WEIGHTS)
option("OUTPUT_DIR", "", "the run's folder: checkpoints, log.txt, config.yaml, TensorBoard events",
       path=True, flag="--output_dir")
option("DEVICE", "auto", "auto (a GPU where there is one), cpu or cuda",
       choices=("auto", "cpu", "cuda"), flag="--device")
option("PRINT_FREQ", 10, "steps between two lines of the log; metrics are fetched only then",
       at_least=1)
option("RESUME", "auto", "auto (from OUTPUT_DIR if it holds a checkpoint) or force (though options "
       "differ)", choices=("auto", "force"), flag="--resume", scripts=(PRETRAIN,))

section("MODEL", "the backbone", SHAPES, ALL)
option("MODEL.ARCH", "swin_tiny", "a name in models/registry.py, e.g. deit_small, resnet50; or "
       "timm/NAME, any model of timm with a map of patches",
       flag="--arch")
option("MODEL.EMBED_DIM", 0, "width of the first stage; 0: the architecture's own",
       at_least=0, at_most=2**16)
option("MODEL.DEPTHS", [], "blocks of each stage; []: the architecture's own",
       at_least=1, at_most=1000, whole=True)
option("MODEL.NUM_HEADS", [], "attention heads of each stage; []: the architecture's own",
       at_least=1, at_most=2**10, whole=True)
option("MODEL.WINDOW_SIZE", 7, "Swin's window, patches a side", at_least=1, at_most=2**10)
option("MODEL.PATCH_SIZE", 0, "pixels a side; 0: the architecture's own (Swin 4, ViT 16)",
       at_least=0, at_most=2**12, flag="--patch_size")
option("MODEL.IMG_SIZE", 224, "pixels that windows and position embeddings are laid out for",
       at_least=1, at_most=2**12)
option("MODEL.DROP_PATH", 0.1, "the student's stochastic depth at its last block; the teacher has "
       "none", at_least=0, at_most=0.999, decides=WEIGHTS)
option("MODEL.NUM_CLASSES", 0, "always 0: backbones have no classifier (EsViT's commands set it)",
       at_least=0, at_most=0)

section("HEAD", "DINO's heads, and the pooling; the projection of moco_v2 and lcr",
        SHAPES, (PRETRAIN,))
option("HEAD.OUT_DIM", 65536, "K, prototypes (a projection has none)",
       at_least=2, at_most=2**24, flag="--out_dim", objectives=DISTILLING)
option("HEAD.HIDDEN_DIM", 2048, "width of the MLP", at_least=1, at_most=2**16)
option("HEAD.BOTTLENECK_DIM", 256, "d, width of the embeddings", at_least=1, at_most=2**16)
option("HEAD.LAYERS", 3, "linears in the MLP", at_least=1, at_most=100)
option("HEAD.USE_BN", False, "BatchNorm in the MLP", flag="--use_bn_in_head")
option("HEAD.NORM_LAST_LAYER", True, "freeze the prototypes' magnitude at 1",
       flag="--norm_last_layer", objectives=DISTILLING)
option("HEAD.POOL_HIDDEN", 128, "hidden units of the MIL attention", at_least=1, at_most=2**16,
       objectives=("cmd",))

section("LOSS", "objective; temperatures and centres of those that distil", WEIGHTS, (PRETRAIN,))
option("LOSS.OBJECTIVE", "cmd", "dino, esvit, cmd, released, moco_v2 or lcr (losses/objective.py)",
       choices=(*DISTILLING, *CONTRASTIVE), decides=SHAPES, flag="--objective",
       yes_no=("--use_dense_prediction", "cmd", "dino"))
option("LOSS.STUDENT_TEMP", 0.1, "temperature of all student distributions, and of L_S and L_T",
       at_least=1e-4, objectives=DISTILLING)
option("LOSS.WARMUP_TEACHER_TEMP", 0.04, "the teacher's temperature at the first epoch",
       at_least=1e-4, flag="--warmup_teacher_temp", objectives=DISTILLING)
option("LOSS.TEACHER_TEMP", 0.04, "the teacher's temperature after the warm-up",
       at_least=1e-4, flag="--teacher_temp", objectives=DISTILLING)
option("LOSS.WARMUP_TEACHER_TEMP_EPOCHS", 0, "epochs of that warm-up, which is linear",
       at_least=0, flag="--warmup_teacher_temp_epochs", objectives=DISTILLING)
option("LOSS.CENTER_MOMENTUM", 0.9, "of the EMA of the centres", at_least=0, at_most=1,
       objectives=DISTILLING)
option("LOSS.CHUNK_MIB", 0, "MiB of a [rows, K] matrix in the cross-entropies, which take rows by "
       "chunks; 0: 32 on a CPU, 256 on a GPU", at_least=0, at_most=2**20, decides=NOTHING)

section("CMD", "the inter-level terms", WEIGHTS, (PRETRAIN,), ("cmd",))
option("CMD.LAMBDA1", 0.3, "weight of L_S + L_T, and of released's terms", at_least=0,
       flag="--lambda1", objectives=("cmd", "released"))
option("CMD.LS", True, "whether L_S is on, where the student's bag recognises the teacher's image "
       "among those of the micro-batch; it alone trains the attention")
option("CMD.LT", True, "whether L_T is on, where the student's image recognises the teacher's bag "
       "among those of the micro-batch's images; without L_S the shares of its patches stay even")
option("CMD.ATTENTION_RATE", 10.0, "factor of the learning rate for the MIL attention", at_least=0)

section("MOCO", "contrast with a queue of keys", WEIGHTS, (PRETRAIN,), CONTRASTIVE)
option("MOCO.QUEUE", 65536, "keys of other images that a query is compared with",
       at_least=1, at_most=2**24, decides=SHAPES)
option("MOCO.BN_IMAGES", 32, "images of a process that share BatchNorm's statistics; keys are "
       "shuffled among such groups", at_least=2)

section("LCR", "the branch that is fitted to GradCAM", WEIGHTS, (PRETRAIN,), ("lcr",))
option("LCR.CHANNELS", 32, "of its convolution", at_least=1, at_most=2**16, decides=SHAPES)
option("LCR.WEIGHT", 0.01, "of L_F, a sum over the images of a micro-batch on all processes",
       at_least=0)

section("DATA", "the images", WEIGHTS, ALL)
option("DATA.DATASET", "folder", "kind of data set: a name in datasets/fine_grained.py",
       lower=True, flag="--dataset")
option("DATA.PATH", "", "its folder; pretraining uses no labels; evaluations read train and val "
       "(or test) in it", path=True, flag="--data_path", decides=NOTHING)
option("DATA.WORKERS", 8, "loader processes for each process of the run; 0: in that process",
       at_least=0, flag="--num_workers", decides=NOTHING)
option("DATA.MAX_BAD", 0.01, "share of unreadable images that are skipped and listed; above it, "
       "stop", at_least=0, at_most=1, resume_may_change=True)
option("DATA.PARTIAL", False, "take a benchmark although not all its images are there",
       resume_may_change=True)
option("DATA.CACHE", "none", "where all images are kept decoded: none (nowhere), ram (this "
       "machine's memory) or device (each process's)", choices=("none", "ram", "device"))
option("DATA.CACHE_SIZE", 448, "pixels of the shorter side to which images are reduced before "
       "crops are made of them on the device; 0: not at all", at_least=0)
option("DATA.CROPS", "auto", "who makes the crops of images that are not kept: workers (of one "
       "image at a time), device (of a batch at a time, as of kept images) or auto (device on a "
       "GPU, else workers; a run goes on as it began)", choices=("auto", "workers", "device"))
option("DATA.MEAN", [], "of the images' red, green and blue, which is taken off; []: what the "
       "weights were trained with; ImageNet's where none are read or they do not say",
       at_least=0, at_most=1, length=3)
option("DATA.STD", [], "by which they are then divided", at_least=1e-3, at_most=1, length=3)
option("DATA.DOWNLOAD", False, "let torchvision fetch a benchmark that is not there",
       decides=NOTHING)

section("AUG", "multi-crop augmentation (datasets/multicrop.py)", WEIGHTS, (PRETRAIN,))
option("AUG.GLOBAL_CROPS_SIZE", 224, "pixels", at_least=1, at_most=2**12)
option("AUG.GLOBAL_CROPS_SCALE", [0.4, 1.0], "share of the image's area, lowest and highest",
       at_least=0, at_most=1, length=2, flag="--global_crops_scale")
option("AUG.LOCAL_CROPS_NUMBER", [8], "one entry for each local size; [] for none",
       at_least=0, at_most=100, whole=True, flag="--local_crops_number")
option("AUG.LOCAL_CROPS_SIZE", [96], "pixels", at_least=0, at_most=2**12, whole=True,
       flag="--local_crops_size")
option("AUG.LOCAL_CROPS_SCALE", [0.05, 0.4], "share of the image's area, lowest and highest",
       at_least=0, at_most=1, length=2, flag="--local_crops_scale")
option("AUG.COLOR_JITTER", [0.4, 0.4, 0.2, 0.1], "brightness, contrast, saturation, hue; in 8 of "
       "10 crops", at_least=0, length=4)
option("AUG.GRAY_PROB", 0.2, "how often a crop loses its colour", at_least=0, at_most=1)
option("AUG.BLUR_PROB", [1.0, 0.1, 0.5], "how often the first global crop, the second and local "
       "crops are blurred", at_least=0, at_most=1, length=3)
option("AUG.SOLARIZE_PROB", 0.2, "how often the second global crop is solarised",
       at_least=0, at_most=1)

section("TRAIN", "length, batch, optimizer", WEIGHTS, (PRETRAIN,))
option("TRAIN.EPOCHS", 100, "length of the run; the schedules stretch to it",
       at_least=1, at_most=10**6, flag="--epochs", resume_may_change=True)
# Of batch and micro-batches, only the product with the processes counts; resume.py checks it.
option("TRAIN.BATCH_SIZE_PER_GPU", 64, "images for each process and micro-batch",
       at_least=1, flag="--batch_size_per_gpu", resume_may_change=True)
option("TRAIN.ACCUM_STEPS", 1, "micro-batches to an optimizer step",
       at_least=1, flag="--accum_steps", resume_may_change=True)
option("TRAIN.OPTIMIZER", "adamw", "adamw or sgd (momentum 0.9)",
       choices=("adamw", "sgd"), flag="--optimizer")
option("TRAIN.BASE_LR", 0.0005, "learning rate at 256 images a step; the peak is BASE_LR * images "
       "/ 256", at_least=0, flag="--lr")
option("TRAIN.MIN_LR", 1e-6, "learning rate at the end of the cosine", at_least=0, flag="--min_lr")
option("TRAIN.WARMUP_EPOCHS", 10, "epochs in which the learning rate rises from 0",
       at_least=0, flag="--warmup_epochs")
option("TRAIN.WEIGHT_DECAY", 0.04, "at the start; not on biases and 1-D parameters",
       at_least=0, flag="--weight_decay")
option("TRAIN.WEIGHT_DECAY_END", 0.4, "weight decay at the end of its cosine",
       at_least=0, flag="--weight_decay_end")
option("TRAIN.MOMENTUM_TEACHER", 0.996, "momentum of the teacher's EMA at the start",
       at_least=0, at_most=1, flag="--momentum_teacher")
option("TRAIN.MOMENTUM_TEACHER_END", 1.0, "and at the end of its cosine", at_least=0, at_most=1)
option("TRAIN.CLIP_GRAD", 3.0, "largest norm of each parameter's gradient on its own; 0: no "
       "clipping", at_least=0, flag="--clip_grad")
option("TRAIN.FREEZE_LAST_LAYER", 1, "epochs in which the prototypes do not move",
       at_least=0, flag="--freeze_last_layer", objectives=DISTILLING)
option("TRAIN.PRECISION", "auto", "auto (bf16 on a GPU that has it, fp16 on another, fp32 on CPU), "
       "fp32, bf16 or fp16", choices=("auto", "fp32", "bf16", "fp16"), flag="--precision",
       yes_no=("--use_fp16", "fp16", "fp32"))
option("TRAIN.COMPILE", False, "torch.compile of backbone and heads: minutes at the start, faster "
       "steps")
option("TRAIN.CHECKPOINTING", False, "recompute blocks in the backward pass: less memory, more "
       "time", decides=NOTHING)
option("TRAIN.MAX_BAD_STEPS", 20, "skipped steps in a row (loss or gradient not finite) at which "
       "the run stops", at_least=1, resume_may_change=True)
option("TRAIN.DETERMINISTIC", False, "only operations that give the same bits every time: on GPUs "
       "slower, and an error where there is none", resume_may_change=True)
option("TRAIN.TIMEOUT_MINUTES", 30.0, "after which a process that waits for another gives up",
       at_least=0.01, at_most=10**5, decides=NOTHING)

section("INIT", "starting weights", WEIGHTS, ALL)
option("INIT.WEIGHTS", "", "weights to evaluate, a file or a folder for timm; in pretraining, to "
       "start student and teacher from at epoch 0 (timm: those that timm has for MODEL.ARCH "
       "timm/NAME)", path=True, flag="--init --pretrained_weights --pretrained_weights_ckpt",
       scripts=(PRETRAIN, *ONE_NETWORK), resume_may_change=True)
option("INIT.CHECKPOINT_KEY", "teacher", "which of its networks: teacher, student, or another name "
       "in it", flag="--checkpoint_key", resume_may_change=True)
option("INIT.HEADS_EPOCHS", -1, "epochs in which heads and pooling train alone, from frozen "
       "features; -1: 1 where INIT.WEIGHTS is given, else 0", at_least=-1, flag="--heads_epochs",
       scripts=(PRETRAIN,))
option("INIT.FROZEN", 0.0, "share of the backbone's blocks that stay as they are, the lowest, and "
       "the stem with them", at_least=0, at_most=1, flag="--frozen", scripts=(PRETRAIN,))
option("INIT.LAYER_DECAY", 0.0, "factor of the learning rate from each block to the one below; 0: "
       "0.9 where INIT.WEIGHTS is given, else 1", at_least=0, at_most=1, flag="--layer_decay",
       scripts=(PRETRAIN,))
option("INIT.BATCH_NORM", "", "what the backbone's BatchNorm normalises by: statistics, those that "
       "came with the weights, or batch, the batch's; by itself statistics where INIT.WEIGHTS is "
       "given, else batch", choices=("", "statistics", "batch"), scripts=(PRETRAIN,))

section("CKPT", "checkpoints", NOTHING, (PRETRAIN,))
option("CKPT.EVERY_MINUTES", 10.0, "minutes between writings of the last checkpoint; 0: one after "
       "every optimizer step", at_least=0)
option("CKPT.KEEP_EVERY", 20, "epochs between checkpoints that are kept for good; 0: only the last",
       at_least=0, flag="--saveckp_freq")
option("CKPT.KEEP", "last", "last, or best: checkpoint_best.pth too, of the best figure "
       "(EVAL.KNN_EVERY), the start's among them", choices=("last", "best"), flag="--keep")

section("EVAL", "all evaluations, and figures of the features during pretraining", FIGURES,
        EVALUATIONS)
option("EVAL.SIZE", 0, "pixels of the centre crop; 0: those of the checkpoint's global crops, else "
       "224", at_least=0, flag="--size")
option("EVAL.RESIZE", 0, "pixels of the shorter side before that crop; 0: 256/224 of EVAL.SIZE",
       at_least=0)
option("EVAL.POOLING", "default", "an image's feature: default (the backbone's), mean (of its "
       "patch features), mil (their mean weighted by the MIL attention) or lcr (by LCR's predicted "
       "map)", choices=("default", "mean", "mil", "lcr"), flag="--pooling")
option("EVAL.BATCH_SIZE_PER_GPU", 128, "images for each process and forward; the linear probe's "
       "batch", at_least=1, flag="--batch_size_per_gpu")
option("EVAL.PRECISION", "fp32", "of the frozen backbone: fp32, bf16, fp16 or auto (as in TRAIN)",
       choices=("auto", "fp32", "bf16", "fp16"), flag="--precision")
option("EVAL.DUMP_FEATURES", "", "folder to keep features in; those that fit are used again",
       path=True, flag="--dump_features", scripts=ONE_NETWORK, decides=NOTHING)
option("EVAL.LOAD_FEATURES", "", "folder of kept features that must be used; images are not read",
       path=True, flag="--load_features", scripts=ONE_NETWORK, decides=NOTHING)
option("EVAL.PICTURES", True, "PNGs beside the figures: classes, confusions, retrieved images, "
       "t-SNE", decides=NOTHING)
option("EVAL.SEEDS", 3, "of the linear probes in evaluate.py: SEED, SEED + 1, ...",
       at_least=1, flag="--seeds", scripts=(TABLE,))
option("EVAL.KNN_EVERY", -1, "epochs of pretraining between figures of the teacher's features, "
       "which are taken at the start and the end too; 0: none at all; -1: 1 with CKPT.KEEP best, "
       "the start and the end alone from INIT.WEIGHTS, else none", at_least=-1, decides=NOTHING)
option("EVAL.KNN_TRAIN", "", "for these: folder with class subfolders, the gallery of a k-NN; "
       "without, neighbours of augmented training images are compared", path=True, decides=NOTHING)
option("EVAL.KNN_VAL", "", "for these: folder with class subfolders, the queries",
       path=True, decides=NOTHING)
option("EVAL.KNN_K", 20, "for these: neighbours", at_least=1, decides=NOTHING)

section("KNN", "k-NN classification of the test split by the training split", FIGURES, (KNN, TABLE))
option("KNN.KS", [10, 20, 100, 200], "numbers of neighbours",
       at_least=1, filled=True, whole=True, flag="--nb_knn")
option("KNN.TEMPERATURE", 0.07, "a neighbour's vote is exp(cosine / temperature)",
       at_least=1e-4, flag="--temperature")

section("RETRIEVAL", "nearest images by cosine", FIGURES, (RETRIEVAL, TABLE))
option("RETRIEVAL.SPLIT", "standard", "standard (train is the gallery, test the queries) or ratio "
       "(every ninth test image is a query, all the rest the gallery)",
       choices=("standard", "ratio"), flag="--split")

section("LINEAR", "linear probe on frozen features", FIGURES, (LINEAR, TABLE))
option("LINEAR.CLASSIFIER", "sgd", "sgd (EsViT's recipe) or logistic (regression, by scikit-learn)",
       choices=("sgd", "logistic"), flag="--classifier")
option("LINEAR.FEATURES", "augmented", "augmented (a new crop every epoch) or cached (extracted "
       "once)", choices=("augmented", "cached"), flag="--features")
option("LINEAR.N_LAST_BLOCKS", 4, "blocks whose features are concatenated; pooling mean and mil "
       "use one", at_least=1, flag="--n_last_blocks")
option("LINEAR.AVGPOOL_PATCHTOKENS", False, "append the mean of the last block's patches (ViT)",
       flag="--avgpool_patchtokens")
option("LINEAR.EPOCHS", 100, "of the SGD", at_least=1, at_most=10**6, flag="--epochs")
option("LINEAR.BASE_LR", 0.001, "learning rate at 256 images a step, in proportion otherwise; a "
       "cosine to 0", at_least=0, flag="--lr")
option("LINEAR.SWEEP", [], "several base learning rates, trained side by side on one pass of "
       "features", at_least=0, flag="--sweep")
option("LINEAR.C", [1.0], "logistic regression's inverse regularisation; several are compared",
       at_least=1e-9, filled=True)
option("LINEAR.HOLD_OUT", 0.1, "share of the training images that chooses among several SWEEP or C",
       at_least=0.01, at_most=0.9)
option("LINEAR.VAL_FREQ", 1, "epochs between tests", at_least=1, flag="--val_freq")
option("LINEAR.LABEL_SHARES", [1.0], "shares of the training labels to probe with, e.g. "
       "[0.1, 0.5, 1]", at_least=1e-6, at_most=1, filled=True, flag="--label_shares")
option("LINEAR.NUM_LABELS", 0, "outputs of the classifier; 0: as many as the data has classes",
       at_least=0, flag="--num_labels")
# fmt: on
