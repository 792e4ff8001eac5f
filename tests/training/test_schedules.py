"""Any schedule keeps its line, its bounds and its end (by hypothesis)."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.training.schedules import cosine, teacher_temperature
from tests.examples import often

LENGTHS = st.tuples(st.integers(1, 30), st.integers(1, 40))  # epochs, steps an epoch
RATES = st.floats(0, 1e3)


@often
@given(RATES, RATES, LENGTHS, st.integers(0, 30))
def test_every_cosine_warms_up_in_a_line_and_falls_or_rises_to_its_end(start, end, lengths, warm):
    epochs, steps = lengths
    warm = min(warm, epochs)
    values = cosine(start, end, epochs, steps, warm)
    assert values.dtype == np.float64
    assert len(values) == epochs * steps
    rounding = 1e-12 * max(start, end) + 1e-300
    assert values.min() >= (0 if warm else min(start, end)) - rounding
    assert values.max() <= max(start, end if len(values) > warm * steps else 0) + rounding
    line, curve = values[: warm * steps], values[warm * steps :]
    if len(line) > 1:
        wanted = [start * step / (len(line) - 1) for step in range(len(line))]
        assert np.allclose(line, wanted, rtol=1e-9, atol=rounding)
    if len(curve):
        assert abs(curve[0] - start) <= rounding
        assert (np.diff(curve) * np.sign(end - start) >= -rounding).all()
        # The last value is one step before the end, where the cosine is flat.
        nearness = (math.pi / (2 * len(curve))) ** 2
        assert abs(curve[-1] - end) <= abs(start - end) * min(1, nearness) + rounding


@often
@given(st.floats(1e-4, 10), st.floats(1e-4, 10), st.integers(0, 40), st.integers(1, 40))
def test_every_teacher_temperature_goes_in_a_line_and_stays(first, last, warm, epochs):
    warm = min(warm, epochs)
    values = teacher_temperature(first, last, warm, epochs)
    assert len(values) == epochs
    assert (values[warm:] == last).all()
    assert values.min() >= min(first, last) * (1 - 1e-12)
    assert values.max() <= max(first, last) * (1 + 1e-12)
    if warm:
        assert values[0] == first
    if warm > 1:
        assert abs(values[warm - 1] - last) <= 1e-12 * last
        assert np.allclose(np.diff(values[:warm], 2), 0, atol=1e-12 * max(first, last))
