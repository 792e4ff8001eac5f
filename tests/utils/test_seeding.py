"""Any two places have two seeds (by hypothesis)."""

from hypothesis import given
from hypothesis import strategies as st

from tests.examples import often
from utils.seeding import derive_seed

PARTS = st.integers(0, 9) | st.integers(0, 2**32 - 1)  # steps, ranks and images fit in 32 bits
PLACES = st.tuples(st.integers(0, 9) | st.integers(0, 2**63 - 1), st.lists(PARTS, max_size=4))


@often
@given(st.lists(PLACES, min_size=2, max_size=30, unique_by=repr))
def test_no_two_places_have_one_seed(places):
    seeds = [derive_seed(seed, *path) for seed, path in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [derive_seed(seed, *path) for seed, path in places]
    assert all(0 <= seed < 2**64 for seed in seeds)
