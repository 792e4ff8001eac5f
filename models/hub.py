"""The weights that timm would download for one of its models, as a file on this machine."""

import os
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError
from timm.models._hub import download_cached_file

from models.timm_backbone import PREFIX, timm_name
from utils.errors import InputError

TIMM = "timm"
# What timm looks for in a model's folder on the hub, in this order.
FILES = ("model.safetensors", "pytorch_model.bin")


def located(weights: str | Path, arch: str = "") -> Path:
    """INIT.WEIGHTS as a path, downloaded where it is the word timm, or timm/NAME.

    arch: MODEL.ARCH, whose NAME the word alone stands for. Of several processes with one cache the
    first downloads, under the hub's own lock, and the others wait. Raises InputError for a name
    without weights, and where they cannot be had.
    """
    name = named(weights, arch)
    return _downloaded(name) if name else Path(weights)


def named(weights: str | Path, arch: str = "") -> str:
    """timm's NAME of INIT.WEIGHTS that are timm or timm/NAME; "" of a file or folder."""
    if str(weights) == TIMM:
        if not arch.startswith(PREFIX):
            raise InputError(
                f"--init timm takes the weights that timm has for --arch timm/NAME; MODEL.ARCH is "
                f"{arch or 'not given'}: give one of timm's, or a file of weights."
            )
        return arch.removeprefix(PREFIX)
    is_name = str(weights).startswith(PREFIX) and not os.path.exists(weights)
    return str(weights).removeprefix(PREFIX) if is_name else ""


def _downloaded(name: str) -> Path:
    """The file in timm's cache, put there first if it is not."""
    facts = timm.get_pretrained_cfg(timm_name(PREFIX + name))
    if not (facts and facts.has_weights) or facts.custom_load:
        raise InputError(
            f"timm {timm.__version__} has no weights of {name} that can be read here: give a file."
        )
    try:
        if not facts.hf_hub_id:
            return Path(download_cached_file(facts.url))
        for file in (facts.hf_hub_filename,) if facts.hf_hub_filename else FILES:
            try:
                return Path(hf_hub_download(facts.hf_hub_id, file))
            except EntryNotFoundError:
                continue
        reason = "its folder holds none"
    except Exception as error:  # whatever a network that is not there makes a client do
        reason = " ".join(str(error).split(". ")[0].split())[:200]
    raise InputError(
        f"the weights of timm/{name} could not be downloaded ({reason}). Without a network, bring "
        f"its file here and give --init FILE."
    )
