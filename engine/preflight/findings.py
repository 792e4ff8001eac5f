"""What --check has found: plain data, of which check.json is made, and the words for it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from utils.errors import InputError

SHOWN = 10  # of each list, in words; the JSON has all
T = TypeVar("T")


@dataclass
class Findings:
    """Sections are dicts of plain data, None where there was nothing to look at.

    warnings: what is unwise; problems: what would stop the run, each a sentence.
    """

    images: dict | None = None
    validation: dict | None = None
    batch: dict | None = None
    crops: dict | None = None
    memory: dict | None = None
    disk: dict | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, function: Callable[[], T]) -> T | None:
        """What the function gives; None where it raised an InputError, which is a problem."""
        try:
            return function()
        except InputError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def as_dict(self) -> dict:
        """All of it, and whether the run can work, for JSON."""
        return {"works": not self.problems, **asdict(self)}

    def lines(self) -> list[str]:
        """The sections in words."""
        sections = (
            (self.images, _images),
            (self.validation, _validation),
            (self.crops, _crops),
            (self.batch, _batch),
            (self.memory, _memory),
            (self.disk, _disk),
        )
        return [line for found, tell in sections if found is not None for line in tell(found)]


def in_words(size: int) -> str:
    """Bytes as GiB, few ones as MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _listed(lines: list[str]) -> list[str]:
    more = len(lines) - SHOWN
    return [f"    {line}" for line in lines[:SHOWN] + ([f"and {more:,} more"] if more > 0 else [])]


def _sides(entry: dict) -> str:
    return "{} ({} x {})".format(entry["path"], *entry["size"])


def _bad(entry: dict) -> str:
    return f"{entry['path']}: {entry['reason']}"


def _images(found: dict) -> list[str]:
    count, bad, tiny = found["count"], found["unreadable"], found["tiny"]
    copies = found["duplicates"]
    return [
        f"images: {count:,} in {found['path']}",
        f"  unreadable: {len(bad):,} ({found['unreadable_share']:.2%}; DATA.MAX_BAD allows "
        f"{found['max_bad']:.2%}). Only headers were read: a file that is cut short behind its "
        "header is met in training, where it is skipped and listed",
        *_listed([_bad(entry) for entry in bad]),
        f"  tiny (a side of less than {found['tiny_below']} pixels): {len(tiny):,}",
        *_listed([_sides(entry) for entry in tiny]),
        f"  with the same bytes as another: {sum(map(len, copies)):,} in {len(copies):,} groups",
        *_listed([" = ".join(group) for group in copies]),
        f"  classes: {_classes(found['classes'])}",
    ]


def _classes(classes: dict[str, int] | None) -> str:
    if not classes:
        return "no labels (pretraining uses none)"
    least, most = min(classes, key=classes.get), max(classes, key=classes.get)
    return (
        f"{len(classes):,}, of {classes[least]:,} ({least}) to {classes[most]:,} ({most}) images "
        "(pretraining uses no labels)"
    )


def _validation(found: dict) -> list[str]:
    bad, leaks = found["unreadable"], found["in_training"]
    return [
        f"validation: {found['count']:,} images in {found['path']} ({found['source']})",
        f"  unreadable: {len(bad):,}",
        *_listed([_bad(entry) for entry in bad]),
        f"  with the same bytes as a training image: {len(leaks):,}",
        *_listed([f"{leak['validation']} = {leak['training']}" for leak in leaks]),
    ]


def _crops(found: dict) -> list[str]:
    sizes = found["sizes"]
    runs = [f"{sizes.count(size)} x {size}" for size in dict.fromkeys(sizes)]
    workers = f"the loader (processes {found['workers']} x {found['processes']})"
    if found["made_on"] == "loader":
        where = f"made image by image by {workers}"
    elif found["cache"] == "none":
        where = f"made by the batch on {found['made_on']}, of images decoded by {workers}"
    else:
        where = f"made by the batch on {found['made_on']}, of images kept decoded"
    return [f"crops: {' + '.join(runs)} pixels an image, {where}"]


def _batch(found: dict) -> list[str]:
    return [
        f"batch: {found['images_per_step']:,} images a step (batch {found['batch']} x processes "
        f"{found['processes']} x accumulation {found['accumulation']})",
        f"  {found['steps_per_epoch']:,} steps an epoch, {found['total_steps']:,} in "
        f"{found['epochs']} epochs; {found['left_over']:,} images left over each epoch, others "
        "each time",
        f"  peak learning rate {found['peak_lr']:.3g}",
    ]


def _memory(found: dict) -> list[str]:
    kept = ("without", "with")[found["checkpointing"]]
    other = found["activations" if found["checkpointing"] else "recomputed"]
    if other is None:
        told = "this backbone cannot do with TRAIN.CHECKPOINTING"
    else:
        told = f"{('with', 'without')[found['checkpointing']]} it {in_words(other)}"
    own = found["recomputed" if found["checkpointing"] else "activations"]
    names = ("student", "teacher", "optimizer", "crops")
    parts = [f"{name} {in_words(found[name])}" for name in names]
    compiled = "; TRAIN.COMPILE lowers it" if found["compiled"] else ""
    lines = [
        f"memory: a step of {found['micro_batch']} images in {found['precision']} on "
        f"{found['device']} takes about {in_words(found['peak'])} at its peak{compiled}",
        f"  {', '.join(parts)}, the objective's state {in_words(found['carried'])}",
        f"  saved activations {in_words(own)} ({kept} TRAIN.CHECKPOINTING; {told})",
        f"  loss, teacher's views and what else is there at the peak "
        f"{in_words(found['rest_at_peak'])}; gradients {in_words(found['gradients'])}, which "
        "come as the activations go",
    ]
    if found["cache"]:
        lines.append(f"  images kept decoded (DATA.CACHE): {in_words(found['cache'])}")
    if found["loader"]:
        lines.append(f"  crops waiting in the loader: up to {in_words(found['loader'])}")
    if found["needed_on_gpu"] is not None:
        lines.append(
            f"  {found['device']}: about {in_words(found['needed_on_gpu'])}, of "
            f"{in_words(found['free_on_gpu'])} free"
        )
    free = found["free_on_machine"]
    lines.append(
        f"  this machine: about {in_words(found['needed_on_machine'])}, of which "
        f"{found['processes_here']} x {in_words(found['program'])} for Python and torch, of "
        f"{'an unknown amount' if free is None else in_words(free)} free"
    )
    return lines


def _disk(found: dict) -> list[str]:
    goes_on = found["resumes_at_step"]
    told = f"; it goes on from step {goes_on:,}, whose checkpoint is there" if goes_on else ""
    return [
        f"disk: a checkpoint is {in_words(found['checkpoint'])}; the last two, one being written "
        f"and {found['kept_for_good']:,} kept for good still need {in_words(found['needed'])} in "
        f"{found['path']}, of {in_words(found['free'])} free{told}"
    ]
