"""Full batches although images cannot be read: others take their places (ours)."""

import itertools
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset

from datasets.loader import BadImage, Key, KeyedDataset
from utils.seeding import SUBSTITUTES, derive_seed

TRIES = 100  # images that are read in search of one that can be


def candidates(length: int, seed: int, key: Key) -> Iterator[int]:
    """0 .. length - 1 in the order in which they are tried in the place of the image of `key`.

    A shuffle of Fisher and Yates that is made only as far as it is asked for.
    """
    generator = np.random.default_rng(derive_seed(seed, SUBSTITUTES, *key))
    moved: dict[int, int] = {}
    for place in range(length):
        chosen = int(generator.integers(place, length))
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.get(place, place)


class FullBatches(Dataset):
    """The batches of a `KeyedDataset`, in which a bad image is replaced by another of the set.

    The substitute is the first of the key's `candidates` that can be read and is not in the batch,
    augmented by the random numbers of the key that it replaces. So a batch is a function of its
    keys and of which images can be read.

    A loader calls __getitems__(keys) for a whole batch. It gives the batch's samples, then every
    `BadImage` that was met; these alone where an image had no substitute.
    """

    def __init__(self, dataset: KeyedDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[Key]) -> list:
        samples = [self.dataset[key] for key in keys]
        bad = {sample: None for sample in samples if isinstance(sample, BadImage)}
        if not bad:
            return samples
        taken = {index for _, index in keys}
        for place, key in enumerate(keys):
            if isinstance(samples[place], BadImage):
                samples[place] = self._substitute(key, taken, bad)
        if any(sample is None for sample in samples):
            return list(bad)
        return samples + list(bad)

    def _substitute(self, key: Key, taken: set[int], bad: dict[BadImage, None]) -> tuple | None:
        """A sample in place of the key's; joins `taken`, and those that were bad join `bad`."""
        images = candidates(len(self.dataset), self.dataset.seed, key)
        for image in itertools.islice((i for i in images if i not in taken), TRIES):
            sample = self.dataset.sample(key, image)
            if not isinstance(sample, BadImage):
                taken.add(image)
                return sample
            bad[sample] = None
        return None
