"""The flags of each entry script: names that EsViT users type, and the options they set."""

from dataclasses import dataclass, field

_NUMBERS = {"nargs": "+"}


@dataclass(frozen=True)
class Face:
    """What one script's command line looks like.

    flags: flag -> (option, what --help says, further arguments of add_argument).
    no_meaning: flags of EsViT that are accepted, and why they are ignored.
    pretrains: whether the two flags that mean a choice of several options are there too.
    extra: flags that set no option; the script reads them itself.
    switches: flags without a value -> what --help says; CommandLine has a field for each.
    """

    usage: str
    flags: dict[str, tuple[str, str, dict]]
    no_meaning: dict[str, str] = field(default_factory=dict)
    pretrains: bool = False
    extra: dict[str, dict] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=dict)


PRETRAIN = Face(
    usage="--data_path FOLDER --output_dir FOLDER",
    pretrains=True,
    switches={"--check": "tell what the run would meet, in words and as check.json; no training"},
    flags={
        "--arch": ("MODEL.ARCH", "backbone, e.g. swin_tiny, deit_small, resnet50", {}),
        "--patch_size": ("MODEL.PATCH_SIZE", "pixels a side", {}),
        "--out_dim": ("HEAD.OUT_DIM", "number of prototypes K", {}),
        "--norm_last_layer": ("HEAD.NORM_LAST_LAYER", "freeze the prototypes' magnitude", {}),
        "--use_bn_in_head": ("HEAD.USE_BN", "BatchNorm in the heads", {}),
        "--momentum_teacher": ("TRAIN.MOMENTUM_TEACHER", "EMA momentum at the start", {}),
        "--objective": ("LOSS.OBJECTIVE", "dino, esvit, cmd, released, moco_v2 or lcr", {}),
        "--warmup_teacher_temp": ("LOSS.WARMUP_TEACHER_TEMP", "teacher temperature at epoch 0", {}),
        "--teacher_temp": ("LOSS.TEACHER_TEMP", "teacher temperature after its warm-up", {}),
        "--warmup_teacher_temp_epochs": ("LOSS.WARMUP_TEACHER_TEMP_EPOCHS", "epochs", {}),
        "--lambda1": ("CMD.LAMBDA1", "weight of the inter-level terms", {}),
        "--optimizer": ("TRAIN.OPTIMIZER", "adamw or sgd", {}),
        "--precision": ("TRAIN.PRECISION", "auto, fp32, bf16 or fp16", {}),
        "--weight_decay": ("TRAIN.WEIGHT_DECAY", "at the start", {}),
        "--weight_decay_end": ("TRAIN.WEIGHT_DECAY_END", "at the end", {}),
        "--clip_grad": ("TRAIN.CLIP_GRAD", "largest norm of a parameter's gradient; 0: off", {}),
        "--batch_size_per_gpu": (
            "TRAIN.BATCH_SIZE_PER_GPU",
            "images a micro-batch",
            {},
        ),
        "--accum_steps": ("TRAIN.ACCUM_STEPS", "micro-batches to an optimizer step", {}),
        "--epochs": ("TRAIN.EPOCHS", "length of the run", {}),
        "--freeze_last_layer": ("TRAIN.FREEZE_LAST_LAYER", "epochs with prototypes held", {}),
        "--lr": ("TRAIN.BASE_LR", "learning rate at 256 images a step", {}),
        "--warmup_epochs": ("TRAIN.WARMUP_EPOCHS", "of the learning rate", {}),
        "--min_lr": ("TRAIN.MIN_LR", "learning rate at the end", {}),
        "--global_crops_scale": ("AUG.GLOBAL_CROPS_SCALE", "share of the area", _NUMBERS),
        "--local_crops_number": ("AUG.LOCAL_CROPS_NUMBER", "one number for each size", _NUMBERS),
        "--local_crops_size": ("AUG.LOCAL_CROPS_SIZE", "pixels", _NUMBERS),
        "--local_crops_scale": ("AUG.LOCAL_CROPS_SCALE", "share of the area", _NUMBERS),
        "--dataset": ("DATA.DATASET", "kind of data set", {}),
        "--data_path": ("DATA.PATH", "folder of training images", {}),
        "--num_workers": ("DATA.WORKERS", "loader processes for each training process", {}),
        "--pretrained_weights_ckpt": ("INIT.WEIGHTS", "checkpoint to start from, at epoch 0", {}),
        "--pretrained_weights": ("INIT.WEIGHTS", "the same", {}),
        "--checkpoint_key": (
            "INIT.CHECKPOINT_KEY",
            "teacher or student",
            {},
        ),
        "--output_dir": ("OUTPUT_DIR", "the run's folder", {}),
        "--saveckp_freq": ("CKPT.KEEP_EVERY", "epochs between checkpoints kept for good", {}),
        "--seed": ("SEED", "of everything random", {}),
        "--device": ("DEVICE", "auto, cpu or cuda", {}),
        "--resume": ("RESUME", "auto, or force where the options differ", {}),
    },
    no_meaning={
        "--start_epoch": "a run resumes from its own checkpoint",
        "--dist_url": "torchrun and torch.distributed.launch give the address",
        "--zip_mode": "images are read from folders",
        "--tsv_mode": "images are read from folders",
        "--sampler": "there is one sampler, shuffled every epoch",
        "--use_mixup": "the dense losses have no mixed targets",
        "--num_mixup_views": "there is no mixup",
        "--mixup": "there is no mixup",
        "--cutmix": "there is no mixup",
        "--cutmix-minmax": "there is no mixup",
        "--mixup-prob": "there is no mixup",
        "--mixup-switch-prob": "there is no mixup",
        "--mixup-mode": "there is no mixup",
        "--smoothing": "there is no classifier",
        "--aug-opt": "there is one augmentation, DINO's; its options are AUG.*",
        "--color-jitter": "the option is AUG.COLOR_JITTER",
        "--aa": "there is one augmentation, DINO's; its options are AUG.*",
        "--train-interpolation": "crops are bicubic",
        "--reprob": "there is no random erasing",
        "--remode": "there is no random erasing",
        "--recount": "there is no random erasing",
        "--resplit": "there is no random erasing",
    },
)

# What every evaluation takes.
_EVALUATION = {
    "--arch": PRETRAIN.flags["--arch"],
    "--patch_size": PRETRAIN.flags["--patch_size"],
    "--dataset": PRETRAIN.flags["--dataset"],
    "--data_path": ("DATA.PATH", "the benchmark's folder, or one with train and val (or test)", {}),
    "--num_workers": PRETRAIN.flags["--num_workers"],
    "--checkpoint_key": PRETRAIN.flags["--checkpoint_key"],
    "--pooling": ("EVAL.POOLING", "default, mean or mil", {}),
    "--size": ("EVAL.SIZE", "pixels of the centre crop", {}),
    "--batch_size_per_gpu": ("EVAL.BATCH_SIZE_PER_GPU", "images a process and forward", {}),
    "--precision": ("EVAL.PRECISION", "of the backbone: fp32, bf16, fp16 or auto", {}),
    "--output_dir": ("OUTPUT_DIR", "folder of the results", {}),
    "--seed": PRETRAIN.flags["--seed"],
    "--device": PRETRAIN.flags["--device"],
}
_WEIGHTS = {
    "--pretrained_weights": ("INIT.WEIGHTS", "checkpoint to evaluate", {}),
    "--dump_features": ("EVAL.DUMP_FEATURES", "folder to keep features in", {}),
    "--load_features": ("EVAL.LOAD_FEATURES", "folder of kept features to use", {}),
}
_KNN = {
    "--nb_knn": ("KNN.KS", "numbers of neighbours", _NUMBERS),
    "--temperature": ("KNN.TEMPERATURE", "of the votes", {}),
}
_RETRIEVAL = {"--split": ("RETRIEVAL.SPLIT", "standard or ratio", {})}
_LINEAR = {
    "--n_last_blocks": ("LINEAR.N_LAST_BLOCKS", "blocks whose features are concatenated", {}),
    "--avgpool_patchtokens": ("LINEAR.AVGPOOL_PATCHTOKENS", "true: append the patches' mean", {}),
    "--classifier": ("LINEAR.CLASSIFIER", "sgd or logistic", {}),
    "--features": ("LINEAR.FEATURES", "augmented or cached", {}),
    "--epochs": ("LINEAR.EPOCHS", "of the SGD", {}),
    "--lr": ("LINEAR.BASE_LR", "learning rate at 256 images a step", {}),
    "--sweep": ("LINEAR.SWEEP", "several learning rates, on one pass of features", _NUMBERS),
    "--label_shares": ("LINEAR.LABEL_SHARES", "shares of the training labels", _NUMBERS),
    "--val_freq": ("LINEAR.VAL_FREQ", "epochs between tests", {}),
    "--num_labels": ("LINEAR.NUM_LABELS", "outputs of the classifier", {}),
}
_NO_MEANING = {
    "--dist_url": PRETRAIN.no_meaning["--dist_url"],
    "--zip_mode": PRETRAIN.no_meaning["--zip_mode"],
}
_USAGE = "--pretrained_weights FILE --data_path FOLDER --output_dir FOLDER"

KNN = Face(
    _USAGE,
    _EVALUATION | _WEIGHTS | _KNN,
    _NO_MEANING | {"--use_cuda": "features go where the network is; --device cpu keeps off GPUs"},
)
RETRIEVAL = Face(_USAGE, _EVALUATION | _WEIGHTS | _RETRIEVAL, _NO_MEANING)
LINEAR = Face(_USAGE, _EVALUATION | _WEIGHTS | _LINEAR, _NO_MEANING)
TABLE = Face(
    "--checkpoint FILE [FILE ...] --data_path FOLDER --output_dir FOLDER",
    _EVALUATION
    | _KNN
    | _RETRIEVAL
    | _LINEAR
    | {"--seeds": ("EVAL.SEEDS", "linear probes to average over", {})},
    extra={"--checkpoint": {"nargs": "+", "help": "checkpoints to compare, a row each"}},
)
