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


def _ignored(flags_by_reason: dict[str, str]) -> dict[str, str]:
    """{reason: flags with spaces between} -> {flag: reason}."""
    return {flag: why for why, flags in flags_by_reason.items() for flag in flags.split()}


# Flags of EsViT without a meaning here, and why.
_LAUNCH = {
    "torchrun and torch.distributed.launch give the address": "--dist_url",
    "images are read from folders": "--zip_mode --tsv_mode",
}
_PRETRAINING = {
    "a run resumes from its own checkpoint": "--start_epoch",
    "there is one sampler, shuffled every epoch": "--sampler",
    "the dense losses have no mixed targets": "--use_mixup",
    "there is no mixup": "--num_mixup_views --mixup --cutmix --cutmix-minmax --mixup-prob "
    "--mixup-switch-prob --mixup-mode",
    "there is no classifier": "--smoothing",
    "there is one augmentation, DINO's; its options are AUG.*": "--aug-opt --aa",
    "the option is AUG.COLOR_JITTER": "--color-jitter",
    "crops are bicubic": "--train-interpolation",
    "there is no random erasing": "--reprob --remode --recount --resplit",
}
_KNN = {"features go where the network is; --device cpu keeps off GPUs": "--use_cuda"}

PRETRAIN = Face(
    options.PRETRAIN,
    "--data_path FOLDER --output_dir FOLDER",
    _ignored(_LAUNCH | _PRETRAINING),
    switches={"--check": "tell what the run would meet, in words and as check.json; no training"},
)
_USAGE = "--pretrained_weights FILE --data_path FOLDER --output_dir FOLDER"
KNN = Face(options.KNN, _USAGE, _ignored(_LAUNCH | _KNN))
RETRIEVAL = Face(options.RETRIEVAL, _USAGE, _ignored(_LAUNCH))
LINEAR = Face(options.LINEAR, _USAGE, _ignored(_LAUNCH))
TABLE = Face(
    options.TABLE,
    "--checkpoint FILE [FILE ...] --data_path FOLDER --output_dir FOLDER",
    extra={"--checkpoint": {"nargs": "+", "help": "checkpoints to compare, a row each"}},
)
