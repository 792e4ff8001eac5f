"""What holds for any input: options, samplers, schedules, checkpoints, seeds (by hypothesis)."""

import itertools
import math
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from datasets.loader import EpochSampler, StepSampler, epoch_order, steps_per_epoch
from datasets.shards import ShardOrder
from engine.training.schedules import cosine, teacher_temperature
from utils import checkpoint, cli, config
from utils.config import Node
from utils.distributed import World
from utils.errors import InputError
from utils.options import OPTIONS
from utils.seeding import derive_seed

# The same examples every time, and nothing kept: a pass is a pass for ever.
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
PROFILE = {"derandomize": True, "deadline": None, "database": None}
often = settings(max_examples=200, **PROFILE)
seldom = settings(max_examples=60, **PROFILE)

DEFAULTS = config.defaults()
CPU = torch.device("cpu")

# Options

# What may stand in a path; a command line's words have no null and are text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
WHOLE = st.integers(-config.LARGEST_NUMBER, config.LARGEST_NUMBER) | st.integers(-3, 300)
REAL = st.floats(allow_nan=False, allow_infinity=False) | st.floats(0, 1)


def any_value(key: str) -> st.SearchStrategy:
    """A value of the option's type, sensible or not."""
    default = config.get(DEFAULTS, key)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return WHOLE
    if isinstance(default, float):
        return REAL
    if isinstance(default, list):
        return st.lists(WHOLE | REAL, max_size=5)
    if OPTIONS[key].lower or OPTIONS[key].choices:
        return TEXTS.map(str.lower) | st.sampled_from(OPTIONS[key].choices or ("",))
    return TEXTS


def valid_value(key: str) -> st.SearchStrategy:
    """A value that `check` takes, whatever the other options are; the default where none is."""
    default = config.get(DEFAULTS, key)
    option = OPTIONS[key]
    low, high = option.at_least, option.at_most
    if key in ENTANGLED:
        return st.just(default)
    if option.choices:
        return st.sampled_from(option.choices)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(low or 0, 10**9 if high is None else high)
    if isinstance(default, float):
        return st.floats(low or 0, 1e9 if high is None else high)
    if isinstance(default, list):
        entries = st.integers(1, high or 1000)
        if high is not None and not option.whole:
            entries = st.floats(low, high)
        return st.lists(entries, min_size=1, max_size=4)
    return TEXTS.filter(lambda text: not text.startswith("~"))


# What another option forbids, or a rule beside its declaration.
ENTANGLED = {
    *("AUG.GLOBAL_CROPS_SCALE", "AUG.LOCAL_CROPS_SCALE", "AUG.COLOR_JITTER", "AUG.BLUR_PROB"),
    *("AUG.LOCAL_CROPS_NUMBER", "AUG.LOCAL_CROPS_SIZE", "TRAIN.EPOCHS"),
    *("TRAIN.WARMUP_EPOCHS", "LOSS.WARMUP_TEACHER_TEMP_EPOCHS"),
    *("EVAL.KNN_EVERY", "EVAL.KNN_TRAIN", "EVAL.KNN_VAL", "LOSS.OBJECTIVE"),
    *("TRAIN.BATCH_SIZE_PER_GPU", "INIT.HEADS_EPOCHS", "DATA.MEAN", "DATA.STD"),
}


@st.composite
def settings_of(draw, value=valid_value, most: int = 30) -> dict[str, object]:
    """A value for each of some options."""
    keys = draw(st.lists(st.sampled_from(list(OPTIONS)), unique=True, max_size=most))
    return {key: draw(value(key)) for key in keys}


def with_settings(chosen: dict[str, object]) -> Node:
    cfg = config.defaults()
    for key, value in chosen.items():
        config.put(cfg, key, value, "the test")
    return cfg


def same(first: object, second: object) -> bool:
    """Equal, of one type, and NaN is NaN."""
    return type(first) is type(second) and repr(first) == repr(second)


@often
@given(st.sampled_from(list(OPTIONS)).flatmap(lambda key: st.tuples(st.just(key), any_value(key))))
def test_an_option_set_from_its_text_comes_back(pair):
    key, value = pair
    cfg = config.defaults()
    config.put(cfg, key, str(value), "the test")
    assert same(config.get(cfg, key), value)
    assert config.differing(cfg, DEFAULTS) in ([], [key])


@seldom
@given(settings_of(any_value))
def test_options_come_back_from_plain_data_and_from_a_file(tmp_path_factory, chosen):
    cfg = with_settings(chosen)
    tree = config.to_dict(cfg)
    assert same(config.to_dict(config.from_dict(tree)), tree)
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    config.write(cfg, path)
    again = config.defaults()
    assert set(config.merge_file(again, path)) == set(OPTIONS)
    assert same(config.to_dict(again), tree)


@seldom
@given(settings_of())
def test_valid_options_pass_and_come_back_from_a_command_line(chosen):
    cfg = with_settings(chosen)
    config.check(cfg)
    words = [word for key, value in chosen.items() for word in (key, str(value))]
    assert same(config.to_dict(cli.parse("", words).cfg), config.to_dict(cfg))


@often
@given(settings_of(any_value))
def test_a_check_passes_or_names_an_option(chosen):
    cfg = with_settings(chosen)
    message = ""
    try:
        config.check(cfg)
    except InputError as error:
        message = str(error)
    assert not message or any(name in message for name in OPTIONS)


# Flags that set one option each, the last of several for it.
FLAG_OF = {option.name: flag for flag, option in cli.PRETRAIN.flags.items()}
PLAIN = sorted(
    key
    for key in set(FLAG_OF) - ENTANGLED
    if not isinstance(config.get(DEFAULTS, key), list | str) or OPTIONS[key].choices
)


@st.composite
def layers(draw) -> list[dict[str, object]]:
    """Values of the same few options in a file, in flags and in pairs, each for some of them."""
    keys = draw(st.lists(st.sampled_from(PLAIN), unique=True, max_size=8))
    return [{key: draw(valid_value(key)) for key in keys if draw(st.booleans())} for _ in range(3)]


@seldom
@given(layers(), st.randoms(use_true_random=False))
def test_pairs_beat_flags_beat_the_file_beat_defaults(tmp_path_factory, layers, order):
    in_file, in_flags, in_pairs = layers
    path = tmp_path_factory.getbasetemp() / "layer.yaml"
    tree: dict = {}
    for key, value in in_file.items():
        *sections, name = key.split(".")
        (tree.setdefault(sections[0], {}) if sections else tree)[name] = value
    path.write_text(yaml.dump(tree, Dumper=config._Writer))
    groups = [["--cfg", str(path)]]
    groups += [[FLAG_OF[key], str(value).split("\n")[0]] for key, value in in_flags.items()]
    groups += [[key, str(value)] for key, value in in_pairs.items()]
    order.shuffle(groups)
    cfg = cli.parse("", list(itertools.chain(*groups))).cfg
    wanted = in_file | in_flags | in_pairs
    for key in OPTIONS:
        assert same(config.get(cfg, key), wanted.get(key, config.get(DEFAULTS, key)))


# Samplers


@st.composite
def divisions(draw, images: int) -> tuple[int, int, int]:
    """(world, batch, accumulation) of a product."""
    divisors = [n for n in range(1, images + 1) if images % n == 0]
    world = draw(st.sampled_from(divisors))
    batch = draw(st.sampled_from([n for n in divisors if images // world % n == 0]))
    return world, batch, images // world // batch


def joined(lists: Iterable[list]) -> list:
    return list(itertools.chain.from_iterable(lists))


def steps_of(length, division, seed, first, last, order=None) -> list[list[list[int]]]:
    """The (epoch, image) keys of each step on each rank: [step][rank], micro-batches in a row."""
    world, batch, accumulation = division
    ranks = []
    for rank in range(world):
        sampler = StepSampler(length, batch, rank, world, accumulation, seed, first, last, order)
        micro = list(sampler)
        assert len(micro) == len(sampler)
        assert all(len(keys) == batch for keys in micro)
        ranks.append(
            [joined(micro[i : i + accumulation]) for i in range(0, len(micro), accumulation)]
        )
    return [list(step) for step in zip(*ranks, strict=True)]


@st.composite
def runs(draw) -> tuple:
    """(length, product, division, another division, seed, steps an epoch, epochs)."""
    images = draw(st.integers(1, 24))
    length = draw(st.integers(images, 4 * images + 5))
    divisions_ = [draw(divisions(images)) for _ in range(2)]
    return length, images, *divisions_, draw(st.integers(0, 2**40)), draw(st.integers(1, 3))


@often
@given(runs(), st.data())
def test_every_step_sampler_takes_each_epoch_once_and_resumes_to_the_tail(run, data):
    length, images, division, other, seed, epochs = run
    per_epoch = steps_per_epoch(length, division[1], division[0], division[2])
    assert per_epoch == length // images
    total = per_epoch * epochs
    steps = steps_of(length, division, seed, 0, total)
    assert len(steps) == total
    for epoch in range(epochs):
        keys = joined(joined(steps[epoch * per_epoch : (epoch + 1) * per_epoch]))
        order = epoch_order(length, seed, epoch).tolist()
        assert sorted(order) == list(range(length))
        assert {key[0] for key in keys} == {epoch}
        # Each once, but for the tail that fills no step.
        assert sorted(key[1] for key in keys) == sorted(order[: len(order) - length % images])
    # However it is divided, and wherever it starts.
    first = data.draw(st.integers(0, total))
    tail = steps_of(length, other, seed, first, total)
    assert [joined(step) for step in tail] == [joined(step) for step in steps[first:]]


@seldom
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_too_few_images_for_a_step_are_refused(length, batch, world, accumulation):
    images = batch * world * accumulation
    if length >= images:
        assert steps_per_epoch(length, batch, world, accumulation) == length // images
    else:
        with pytest.raises(InputError, match=f"{length} images but one step takes {images}"):
            steps_per_epoch(length, batch, world, accumulation)


@often
@given(
    indices=st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=60),
    batch=st.integers(1, 70),
    world=st.integers(1, 7),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 2),
)
def test_every_epoch_sampler_takes_each_image_once(indices, batch, world, seed, first):
    ranks = [
        list(EpochSampler(indices, batch, World(rank, world, CPU), seed, first, 3))
        for rank in range(world)
    ]
    per_epoch = -(-len(indices) // batch)
    assert {len(batches) for batches in ranks} == {per_epoch * (3 - first)}
    together = [joined(parts) for parts in zip(*ranks, strict=True)]
    assert together == list(EpochSampler(indices, batch, World(0, 1, CPU), seed, first, 3))
    assert (
        together
        == list(EpochSampler(indices, batch, World(0, 1, CPU), seed, 0, 3))[first * per_epoch :]
    )
    for number, epoch in enumerate(range(first, 3)):
        batches = together[number * per_epoch : (number + 1) * per_epoch]
        assert all(len(keys) == batch for keys in batches[:-1])
        keys = joined(batches)
        assert {key[0] for key in keys} == {epoch}
        assert sorted(key[1] for key in keys) == sorted(indices)
    for parts in zip(*ranks, strict=True):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@often
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    world=st.integers(1, 5),
    batch=st.integers(1, 4),
    accumulation=st.integers(1, 2),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_every_order_of_shards_is_a_permutation_of_spans(
    counts, world, batch, accumulation, seed, epoch
):
    length, step = sum(counts), batch * accumulation
    order = ShardOrder(counts, world, step, seed)
    images = order(epoch).tolist()
    assert images == ShardOrder(counts, world, step, seed)(epoch).tolist()
    assert sorted(images) == list(range(length))
    spans = [span.tolist() for span in order.spans(epoch)]
    assert sorted(joined(spans)) == list(range(length))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1
    # Shards in a row are cut into spans: a span ends in at most two shards of others.
    shard_of = np.repeat(range(len(counts)), counts)
    held = [set(shard_of[span].tolist()) for span in spans]
    sharing = Counter(itertools.chain(*held))
    for mine in held:
        assert sum(sharing[shard] > 1 for shard in mine) <= 2
    # StepSampler gives each rank its own span and nothing else.
    if length >= step * world:
        per_epoch = length // (step * world)
        division = (world, batch, accumulation)
        steps = steps_of(length, division, seed, epoch * per_epoch, (epoch + 1) * per_epoch, order)
        for rank, span in enumerate(spans):
            seen = [image for each in steps for _, image in each[rank]]
            assert seen == span[: len(seen)]


class NarrowOrder(ShardOrder):
    """Shuffled within a window that is small beside the shards."""

    window = 5


@seldom
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 99))
def test_images_of_a_shard_a_window_apart_keep_their_order(counts, world, seed):
    shard_of = np.repeat(range(len(counts)), counts)
    for span in NarrowOrder(counts, world, 1, seed).spans(0):
        for shard in range(len(counts)):
            mine = [image for image in span.tolist() if shard_of[image] == shard]
            highest = itertools.accumulate(mine, max)
            assert all(image > top - 5 for image, top in zip(mine, highest, strict=True))


# Schedules

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


# Checkpoints

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


# Seeds

PARTS = st.integers(0, 9) | st.integers(0, 2**32 - 1)  # steps, ranks and images fit in 32 bits
PLACES = st.tuples(st.integers(0, 9) | st.integers(0, 2**63 - 1), st.lists(PARTS, max_size=4))


@often
@given(st.lists(PLACES, min_size=2, max_size=30, unique_by=repr))
def test_no_two_places_have_one_seed(places):
    seeds = [derive_seed(seed, *path) for seed, path in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [derive_seed(seed, *path) for seed, path in places]
    assert all(0 <= seed < 2**64 for seed in seeds)
