"""Any values of any options: as text, in a file, on the command line, checked (by hypothesis)."""

import itertools

import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.examples import often, seldom
from utils import cli, config
from utils.config import Node
from utils.errors import InputError
from utils.options import OPTIONS

DEFAULTS = config.defaults()


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
    *("TRAIN.BATCH_SIZE_PER_GPU", "INIT.HEADS_EPOCHS", "INIT.BATCH_NORM"),
    *("DATA.MEAN", "DATA.STD"),
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
