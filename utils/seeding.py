"""Seeds derived from one another: the same path gives the same seed, everywhere."""

import numpy as np

# First step of every path: what the seed is for.
ORDER, AUGMENTATION, INITIALISATION, _, STEPS = range(5)
PROBE, LABELS, HELD_OUT, SUBSTITUTES, QUEUE, SHUFFLING, _, COPIES = range(5, 13)


def derive_seed(seed: int, *path: int) -> int:
    """A 64-bit seed for the branch `path` of the stream `seed`; all integers are >= 0."""
    # A spawn key, unlike a list of entropy, tells (1, 2) from (1, 2, 0).
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)[0])
