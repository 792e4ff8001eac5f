"""The command line of each script: the flags of the options it reads, and what it takes beside."""

from dataclasses import dataclass, field

from utils import options
from utils.options import OPTIONS, Option


@dataclass(frozen=True)
class Face:
    """What one script's command line looks like.

    script: the name under which utils/options.py declares its flags.
    no_meaning: flags of EsViT that are accepted, and why they are ignored.
    extra: flags that set no option; the script reads them itself.
    switches: flags without a value -> what --help says; CommandLine has a field for each.
    """

    script: str
    usage: str
    no_meaning: dict[str, str] = field(default_factory=dict)
    extra: dict[str, dict] = field(default_factory=dict)
    switches: dict[str, str] = field(default_factory=dict)

    @property
    def flags(self) -> dict[str, Option]:
        """The option that each flag sets."""
        mine = [option for option in OPTIONS.values() if self.script in option.scripts]
        return {flag: option for option in mine for flag in option.flags}

    @property
    def yes_no(self) -> dict[str, Option]:
        """The option that each of EsViT's flags with a truth value sets."""
        mine = [option for option in OPTIONS.values() if self.script in option.scripts]
        return {option.yes_no[0]: option for option in mine if option.yes_no}


_LAUNCH = {
    "--dist_url": "torchrun and torch.distributed.launch give the address",
    "--zip_mode": "images are read from folders",
}
_EVALUATION = _LAUNCH | {
    "--use_cuda": "features go where the network is; --device cpu keeps off GPUs"
}
_NO_MIXUP, _NO_ERASING = "there is no mixup", "there is no random erasing"
_AUGMENTATION = "there is one augmentation, DINO's; its options are AUG.*"

PRETRAIN = Face(
    options.PRETRAIN,
    "--data_path FOLDER --output_dir FOLDER",
    _LAUNCH
    | {
        "--start_epoch": "a run resumes from its own checkpoint",
        "--tsv_mode": "images are read from folders",
        "--sampler": "there is one sampler, shuffled every epoch",
        "--use_mixup": "the dense losses have no mixed targets",
        "--num_mixup_views": _NO_MIXUP,
        "--mixup": _NO_MIXUP,
        "--cutmix": _NO_MIXUP,
        "--cutmix-minmax": _NO_MIXUP,
        "--mixup-prob": _NO_MIXUP,
        "--mixup-switch-prob": _NO_MIXUP,
        "--mixup-mode": _NO_MIXUP,
        "--smoothing": "there is no classifier",
        "--aug-opt": _AUGMENTATION,
        "--color-jitter": "the option is AUG.COLOR_JITTER",
        "--aa": _AUGMENTATION,
        "--train-interpolation": "crops are bicubic",
        "--reprob": _NO_ERASING,
        "--remode": _NO_ERASING,
        "--recount": _NO_ERASING,
        "--resplit": _NO_ERASING,
    },
    switches={"--check": "tell what the run would meet, in words and as check.json; no training"},
)
_USAGE = "--pretrained_weights FILE --data_path FOLDER --output_dir FOLDER"
KNN = Face(options.KNN, _USAGE, _EVALUATION)
RETRIEVAL = Face(options.RETRIEVAL, _USAGE, _LAUNCH)
LINEAR = Face(options.LINEAR, _USAGE, _LAUNCH)
TABLE = Face(
    options.TABLE,
    "--checkpoint FILE [FILE ...] --data_path FOLDER --output_dir FOLDER",
    extra={"--checkpoint": {"nargs": "+", "help": "checkpoints to compare, a row each"}},
)
