"""Any contents of a checkpoint come back bit for bit (by hypothesis)."""

import math
import struct

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.examples import seldom
from utils import checkpoint

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]
LAYOUTS = {
    "as made": lambda tensor: tensor,
    "turned": lambda tensor: tensor.permute(tuple(reversed(range(tensor.ndim)))),
    "a part": lambda tensor: tensor[..., 1:] if tensor.ndim else tensor,
    "every second": lambda tensor: tensor[..., ::2] if tensor.ndim else tensor,
    "repeated": lambda tensor: tensor[None].expand(3, *tensor.shape),
    "a parameter's data": lambda tensor: tensor.detach(),
}


@st.composite
def tensors(draw) -> torch.Tensor:
    """A tensor of any kind, with any bits in it: NaNs of all payloads, infinities, zeros."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count, highest = math.prod(shape) * dtype.itemsize, 2 if dtype == torch.bool else 256
    bits = torch.randint(0, highest, (count,), generator=generator, dtype=torch.uint8)
    return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](bits.view(dtype).reshape(shape))


KEYS = st.text(max_size=8) | st.integers(-(2**40), 2**40)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=30)
    | tensors()
)
CONTENTS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


def bits_of(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""  # whatever its strides
    # Of one element any stride counts as contiguous: a copy has the plain one.
    plain = tensor.clone(memory_format=torch.contiguous_format)
    return bytes(plain.reshape(-1).view(torch.uint8).tolist())


def assert_bits_equal(found: object, wanted: object) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert bits_of(found) == bits_of(wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_bits_equal(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_bits_equal(one, other)
    elif isinstance(wanted, float):
        assert struct.pack("d", found) == struct.pack("d", wanted)
    else:
        assert found == wanted


@seldom
@given(st.dictionaries(KEYS, CONTENTS, max_size=5))
def test_every_checkpoint_comes_back_bit_for_bit(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "any.pth"
    checkpoint.save(contents, path)
    assert_bits_equal(checkpoint.load_file(path), contents)
