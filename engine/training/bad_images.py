"""Images that a run could not read: one warning each, a list in its folder, a stop if too many."""

import os
from collections.abc import Iterable
from pathlib import Path

from datasets.folder import BadImage, UnreadableImage, load_image
from utils import distributed
from utils.errors import InputError
from utils.files import write_json
from utils.logging import logger

LIST = "bad_images.json"


class BadImages:
    """One process's view of a run's bad images; by `exchange` all processes know the same.

    images: number of images in the data set; share: of them, that may be bad. known: path ->
    reason of all that every process knows, sorted by path, which a checkpoint stores and a
    resumed run begins with. An image counts once, however often and by whomever it was met.
    """

    def __init__(self, images: int, share: float, known: dict[str, str] | None = None) -> None:
        self.images, self.share = images, share
        self.known = dict(known or {})
        self._new: dict[str, str] = {}

    @property
    def pending(self) -> int:
        """Images that this process has noted since the last exchange and that are not known."""
        return len(self._new)

    def note(self, bad: Iterable[BadImage]) -> None:
        """Keep what this process has met; the others do not learn of it yet."""
        for image in bad:
            if image.path not in self.known:
                self._new.setdefault(image.path, image.reason)

    def forget_repaired(self) -> None:
        """All processes, when a run goes on: forget images that were repaired or removed since."""
        # What the first process finds is taken, so that all know the same.
        known = self.known.items()
        self.known = distributed.on_main(
            lambda: {path: why for path, why in known if _is_bad(path)}
        )

    def exchange(self, folder: Path) -> None:
        """All processes together: warn of what is new and write the list, folder/bad_images.json.

        Raises InputError on all processes where more than `share` of the images are bad, or all.
        """
        found = distributed.gather_objects(self._new)
        self._new = {}
        new = {path: why for theirs in found for path, why in theirs.items()}
        new = {path: why for path, why in sorted(new.items()) if path not in self.known}
        self.known = dict(sorted({**self.known, **new}.items()))
        for path, reason in new.items():
            logger.warning(
                f"{path} cannot be read ({reason}): repair it or remove it; until then other "
                "images take its place"
            )
        distributed.on_main(lambda: self._write(folder / LIST))
        if self.known and len(self.known) > min(self.share * self.images, self.images - 1):
            path, reason = next(iter(self.known.items()))
            raise InputError(
                f"{len(self.known)} of {self.images} images cannot be read, more than "
                f"DATA.MAX_BAD {self.share:g} allows: {folder / LIST} lists them, for instance "
                f"{path} ({reason}); repair or remove them (a resume on them takes --resume force)"
                + (", or raise DATA.MAX_BAD." if len(self.known) < self.images else ".")
            )

    def _write(self, path: Path) -> None:
        if not self.known and not path.exists():
            return
        bad = [{"path": name, "reason": reason} for name, reason in self.known.items()]
        contents = {"images": self.images, "count": len(bad), "bad": bad}
        try:
            write_json(path, contents, "list of bad images")
        # The run can do without: it has warned of each of them.
        except InputError as error:
            logger.warning(str(error))


def _is_bad(path: str) -> bool:
    """Whether an image that could not be read, or a folder that could not be listed, still is so.

    A member of a shard is, for it can be read only through the shard's index.
    """
    if not os.path.lexists(path):
        return ".tar:" in path
    try:
        if os.path.isdir(path):
            os.scandir(path).close()
        else:
            load_image(path)
    except (OSError, UnreadableImage):
        return True
    return False
