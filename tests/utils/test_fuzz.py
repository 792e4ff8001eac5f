"""Wrong input at random: whatever is typed or stands in a file, the answer is one sentence.

1,050 inputs go through cli.parse, and 17 into real processes.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes import ROOT, run_python
from utils import cli, config
from utils.errors import InputError
from utils.options import OPTIONS

LINES, FILES = 700, 350
SECONDS = 2.0  # of this process's own time, for one input: one, and one for a busy machine
CHARACTERS = 2000  # of a message
FACES = {
    "main_cmd.py": cli.PRETRAIN,
    "eval_knn.py": cli.KNN,
    "eval_retrieval.py": cli.RETRIEVAL,
    "eval_linear.py": cli.LINEAR,
    "evaluate.py": cli.TABLE,
}
NAMES = list(OPTIONS)

# Nothing, control characters, other scripts, halves of a pair of surrogates, escapes.
TEXTS = [
    *("", " ", "\t", "\n", "a\nb", "\r\n", "\x00", "a\x00b", "\x1b[31mred", "\x7f", "\x85"),
    *("é", "日本語", "\u202etxet", "\u2028", "\ud800", "\udcff/x", "🜁", "%s%n", "{0}", "$(id)"),
    *("a" * 100_000, "\n" * 5000, "é" * 3000, "a b c", "'", '"', "\\", "=", "-", "--", "---"),
]
NUMBERS = [
    *("nan", ".nan", ".NaN", "inf", ".inf", "-.inf", "1e400", "-1e400", "1e-400", "-1", "-0"),
    *("9" * 20, "9" * 400, "-" + "9" * 400, "9" * 5000, "0x" + "f" * 5000, "0b" + "1" * 20_000),
    *(
        "1_000_",
        "0o9",
        "1:99:99",
        "2001-99-99",
        "2001-01-01",
        "1e",
        "1,5",
        "1.2.3",
        "٣",
        "½",
        "1 2",
    ),
]
YAML = [
    *("[", "]", "{", "}", "[1, 2", "[[1]]", "{a: b}", "{a", "- 1\n- 2", "? ? ?", "%YAML 9.9", "@"),
    *(
        "!!int x",
        "!!int ''",
        "!!float abc",
        "!!bool maybe",
        "!!timestamp x",
        "!!binary é",
        "!!null x",
    ),
    *(
        "!!python/object/apply:os.system [id]",
        "!!python/name:os.system",
        "!local x",
        "!!set {1, 2}",
    ),
    *(
        "!!omap [1]",
        "!!pairs 3",
        "!!str [1]",
        "!!seq x",
        "!!map [1]",
        "&a [*a]",
        "*a",
        "&a",
        "<<: 1",
    ),
    *(
        "[" * 3000,
        "{a: " * 3000,
        "- " * 3000,
        "[1, " * 5000,
        "[" + "1, " * 40_000 + "1]",
        "? " * 3000,
    ),
    *('"\\xZZ"', '"\\ud800"', "'", "|", ">\n a", "null", "~", "true", "[true]", "[a]", "[null]"),
    *("[.nan]", "[1e400]", "[-1]", "[" + "9" * 400 + "]", "[]", "{}", "''", "[[], []]", "a: b: c"),
]
PATHS = [
    *("/nonexistent/x", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "a/" * 3000, "b" * 300),
    *("~nobody-of-this-name/x", "~\x00/x", "~" * 5000, "~/", ".", "..", "/nowhere/../etc/shadow"),
]
CHOICES = [word for option in OPTIONS.values() for word in option.choices]
VALUES = [*TEXTS, *NUMBERS, *YAML, *PATHS, *CHOICES]


def noise(draw: random.Random, longest: int = 60) -> str:
    """Any characters but surrogates, mostly small ones."""
    ends = (0x20, 0x7F, 0x250, 0xD800)
    return "".join(chr(draw.randrange(draw.choice(ends))) for _ in range(draw.randrange(longest)))


def mangled(draw: random.Random, word: str) -> str:
    """The word with a letter lost, doubled, exchanged or added, or in another case."""
    place = draw.randrange(len(word))
    before, letter, after = word[:place], word[place], word[place + 1 :]
    other = chr(draw.randrange(0x21, 0x17F))
    return draw.choice(
        [before + after, word + letter, before + other + after, word.swapcase(), word + "." + word]
    )


def value(draw: random.Random) -> str:
    return draw.choice(VALUES) if draw.random() < 0.8 else noise(draw)


def wrong_line(draw: random.Random, face: cli.Face) -> list[str]:
    """A command line with something wrong; now and then it is right after all."""
    names = [*face.flags, *face.no_meaning, *face.extra, "--cfg", "--local_rank"]
    flag, other = draw.choice(names), draw.choice(names)
    key = draw.choice(NAMES)
    kinds: list[Callable[[], list[str]]] = [
        lambda: [mangled(draw, flag), value(draw)],
        lambda: [flag, value(draw)],
        lambda: [f"{flag}={value(draw)}"],
        lambda: [flag],
        lambda: [flag, value(draw), flag, value(draw), other, value(draw)],
        lambda: ["--use_fp16", value(draw), "--precision", draw.choice(["fp32", value(draw)])],
        lambda: ["--use_dense_prediction", "false", "LOSS.OBJECTIVE", "cmd", flag, value(draw)],
        lambda: [key, value(draw)],
        lambda: [key, value(draw), key, value(draw), draw.choice(NAMES), value(draw)],
        lambda: [mangled(draw, key), value(draw)],
        lambda: [key.split(".")[0], value(draw)],
        lambda: [flag, value(draw), key],
        lambda: ["--cfg", value(draw)],
        lambda: [value(draw) for _ in range(draw.randrange(1, 5))],
        lambda: [draw.choice([flag, key, noise(draw), value(draw)]) for _ in range(8)],
    ]
    return [word.replace("\0", "") for word in draw.choice(kinds)()]  # no command line has one


def bomb(draw: random.Random, leaf: str, layer: Callable[[str], str]) -> str:
    """A short file that stands for 10 ** 12 leaves: each layer names the one below ten times."""
    lines = [f"a0: &a0 {leaf}"]
    lines += [f"a{n}: &a{n} {layer(f'*a{n - 1}')}" for n in range(1, 13)]
    if draw.random() < 0.5:
        lines.append("TRAIN: *a12")
    return "\n".join(lines)


def wrong_file(draw: random.Random, tidy: str) -> bytes:
    """The bytes of an options file with something wrong; now and then it is right after all."""
    section, _, name = draw.choice([key for key in NAMES if "." in key]).partition(".")
    depth = draw.choice([30, 300, 3000])
    cut = draw.randrange(len(tidy))
    kinds: list[Callable[[], str | bytes]] = [
        lambda: draw.randbytes(draw.randrange(400)),
        lambda: "".join(draw.choice("[]{}:,-?&*!|>'\"%@` \n\tab1") for _ in range(200)),
        lambda: noise(draw, 400),
        lambda: f"{section}: {draw.choice('[{')}" * depth,
        lambda: "\n".join(" " * n + f"{section}:" for n in range(min(depth, 300))),
        lambda: bomb(draw, "[1, 2]", lambda below: f"[{', '.join([below] * 10)}]"),
        lambda: bomb(
            draw, "{}", lambda below: f"{{{', '.join(f'{n}: {below}' for n in range(10))}}}"
        ),
        lambda: bomb(draw, "{x: 1}", lambda below: f"{{<<: [{', '.join([below] * 10)}]}}"),
        lambda: f"{section}: &a\n  {name}: *a\n",
        lambda: f"&a {section}: {{{name}: *a}}",
        lambda: f"{section}:\n  {name}: {value(draw)}\n",
        lambda: f"{section}:\n  {name}: {draw.choice(NUMBERS)}\n",
        lambda: f"{section}:\n  {name}: 1\n  {name}: 2\n{section}:\n  {name}: 3\n",
        lambda: f"{section}: {draw.choice(['[1, 2]', '3', 'null', 'text', '[]', value(draw)])}\n",
        lambda: f"{section}:\n  {name}: {{{name}: {{{name}: {value(draw)}}}}}\n",
        lambda: (
            f"{draw.choice(['1', 'null', '[1, 2]', '2.5', '? [a]', '{a: b}', '~', 'true'])}: 3\n"
        ),
        lambda: f"{section}:\n  {draw.choice(['1', '~', '[1]', '.nan', '2001-01-01'])}: 3\n",
        lambda: f"{section}:\n  {name}:\n",
        lambda: f"{section}.{name}: {value(draw)}\n",
        lambda: f"{value(draw)}: {value(draw)}\n",
        lambda: tidy[:cut] + value(draw) + tidy[cut:],
        lambda: tidy[:cut] + "\n" + tidy[cut:],
        lambda: tidy[:cut],
        lambda: tidy.encode()[:cut] + draw.randbytes(3) + tidy.encode()[cut + 3 :],
        lambda: tidy.encode("utf-16"),
        lambda: "x" * 300_000,
        lambda: "".join(f"K{n}: {n}\n" for n in range(40_000)),
        lambda: "- " * 100_000,
    ]
    made = draw.choice(kinds)()
    return made if isinstance(made, bytes) else made.encode(errors="surrogatepass")


def complaint(arguments: list[str], face: cli.Face) -> tuple[str, str]:
    """(how it ended, what is wrong with that, else "")."""
    start = time.process_time()
    try:
        cli.parse("a test", arguments, face)
        ended, message = "accepted", ""
    except InputError as error:
        ended, message = "refused", str(error)
    except SystemExit as error:
        ended, message = "help", "" if error.code == 0 and "--help" in arguments else "an exit"
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"[:300]
    seconds = time.process_time() - start
    if seconds > SECONDS:
        return ended, f"took {seconds:.1f} s"
    if ended == "refused" and (not message.isprintable() or not 0 < len(message) < CHARACTERS):
        return ended, f"is no line of text: {message[:200]!r}"
    return ended, "" if ended != "help" else message


def assert_none(complaints: list[tuple[list[str], str]]) -> None:
    shown = [f"{[word[:80] for word in words]}: {said}" for words, said in complaints]
    assert not shown, f"{len(shown)} inputs:\n" + "\n".join(shown[:40])


def test_wrong_command_lines_end_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw, ends, complaints = random.Random(5), Counter(), []
    for _ in range(LINES):
        face = draw.choice(list(FACES.values()))
        words = wrong_line(draw, face)
        ended, said = complaint(words, face)
        ends[ended] += 1
        if said:
            complaints.append((words, said))
    assert_none(complaints)
    assert ends["refused"] > 0.7 * LINES


def test_wrong_files_end_in_a_sentence(tmp_path):
    draw, ends, complaints = random.Random(6), Counter(), []
    config.write(config.defaults(), tmp_path / "tidy.yaml")
    tidy, path = (tmp_path / "tidy.yaml").read_text(), tmp_path / "options.yaml"
    for _ in range(FILES):
        path.write_bytes(wrong_file(draw, tidy))
        ended, said = complaint(["--cfg", str(path)], draw.choice(list(FACES.values())))
        ends[ended] += 1
        if said:
            complaints.append(([path.read_bytes()[:200].decode(errors="replace")], said))
    assert_none(complaints)
    assert ends["refused"] > 0.7 * FILES


# Real processes

LOOPS = "a0: &a0 {}\n" + "".join(
    f"a{n}: &a{n} {{{', '.join(f'{m}: *a{n - 1}' for m in range(10))}}}\n" for n in range(1, 13)
)
FILES_OF = {
    "bomb.yaml": LOOPS.encode(),
    "noise.yaml": random.Random(7).randbytes(500),
    "tags.yaml": b"TRAIN: !!python/object/apply:os.system ['touch ran']\n",
    "null.pth": b"",
}
COMMANDS = [
    ("main_cmd.py", ["--cfg", "bomb.yaml"]),
    ("main_cmd.py", ["TRAIN.EPOCHS", "9" * 5000]),
    ("main_cmd.py", ["--data_path", b"\xff\n\xfe", "--output_dir", "out", "--device", "cpu"]),
    ("main_cmd.py", ["--epoch", "\x1b[31m\nTraceback"]),
    ("eval_knn.py", ["--nb_knn", "[" * 3000]),
    ("eval_retrieval.py", ["--split", "\u202e\u2028é" * 2000]),
    ("eval_linear.py", ["--cfg", "tags.yaml"]),
    ("evaluate.py", ["--checkpoint", "null.pth", "--data_path", "x", "--output_dir", "out"]),
    ("main_cmd.py", []),
    ("main_cmd.py", ["--use_fp16", "true", "--precision", "fp32"]),
    ("eval_knn.py", ["--cfg", "noise.yaml"]),
    ("eval_knn.py", ["--pretrained_weights", "/dev/zero", "--data_path", b"\xff"]),
    ("eval_linear.py", ["--sweep", "nan", "1e400", "--sweep"]),
    ("eval_linear.py", ["LINEAR.C", "!!float abc", "--dump_features", "/proc/self/mem"]),
    ("evaluate.py", ["--seeds", "0x" + "f" * 5000, "--checkpoint"]),
    ("report.py", ["--output_dir", "out"]),
    ("visualize.py", ["--checkpoint", "null.pth", "--images", "x", "--output_dir", "out"]),
]


def ended_badly(script: str, words: list, folder: Path, environment: dict[str, str]) -> str:
    """What is wrong with how the process ended; "" for exit code 2 and one line of stderr."""
    words = [os.fsdecode(word) for word in words]
    done = run_python(ROOT / script, *words, environment=environment, folder=folder, code=None)
    lines = done.stderr.splitlines()
    # The words may quote a traceback; ours would stand at a line's beginning.
    one_line = len(lines) == 1 and lines[0].startswith("error: ")
    ends_well = done.returncode == 2 and one_line and len(done.stderr) < CHARACTERS
    return "" if ends_well else f"{script} {words}: {done.stderr[-600:]}"


def test_processes_that_are_given_nonsense_end_in_one_line(tmp_path, environment):
    for name, contents in FILES_OF.items():
        (tmp_path / name).write_bytes(contents)
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda command: ended_badly(*command, tmp_path, environment), COMMANDS)
        assert [end for end in ends if end] == []
    assert not (tmp_path / "ran").exists()


# What the sentences say


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TRAIN:\n  EPOCHS: 3\nTRAIN:\n  SEED: 4\n", "TRAIN is there twice"),
        ("TRAIN: {EPOCHS: 3, EPOCHS: 4}\n", "EPOCHS is there twice"),
        ("AUG:\n  LOCAL_CROPS_SIZE: &a [96]\n  LOCAL_CROPS_NUMBER: *a\n", "what *a stands for"),
        ("TRAIN: " + "[" * 2000, "nested too deeply"),
        ("SEED: !!int 3\n", "leave out the tag tag:yaml.org,2002:int"),
        ("SEED: !!python/name:os.system\n", "leave out the tag"),
        ("TRAIN: [1, 2]\n", "no option 'TRAIN'. It is a section; TRAIN.EPOCHS is one in it."),
        ("TRAIN: 3\n", "no option 'TRAIN'. It is a section; TRAIN.EPOCHS is one in it."),
        ("1: 3\n", "there is no option '1'"),
        ("[a]: 3\n", "a name should stand here"),
        ("TRAIN:\n  EPOCHS: {a: 1}\n", "TRAIN.EPOCHS must be a whole number, not {'a': 1}"),
        ("SEED: " + "9" * 19, "SEED must be at most 9223372036854775807"),
        ('DATA: {PATH: "a\\0b"}', "DATA.PATH must be text that can name a file"),
        ("SEED: 3\n" + "#" * 70_000, "it is larger than 65536 bytes"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(text, said, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        cli.parse("a test", ["--cfg", str(tmp_path / "a.yaml")])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["AUG.COLOR_JITTER", "[.nan, 0, 0, 0]"], "AUG.COLOR_JITTER must be a list of numbers"),
        (["TRAIN.BASE_LR", "9" * 400], "TRAIN.BASE_LR must be a finite number, not inf"),
        (["SEED", str(2**63)], "SEED must be at most 9223372036854775807"),
        (["--sweep", "0.1", "9" * 19], "LINEAR.SWEEP must be at most 92233"),
        (["TRAIN.BASE_LR", "1e400"], "TRAIN.BASE_LR must be a finite number, not inf"),
        (["KNN.KS", "!!bool x"], "KNN.KS must be a list of numbers, not '!!bool x'"),
        (["--cfg", "~nobody-of-this-name/x"], "there is no file ~nobody-of-this-name/x."),
        (["--cfg", "x" * 300], "cannot be read (File name too long)"),
        (["--cfg", "a\nb"], r"there is no file a\nb."),
    ],
)
def test_a_wrong_word_is_told_what_is_wrong(words, said):
    with pytest.raises(InputError) as caught:
        cli.parse("a test", words, cli.LINEAR if "--sweep" in words else cli.PRETRAIN)
    assert said in str(caught.value)


def test_a_long_message_keeps_both_ends_on_one_line():
    message = str(InputError("begins\n" + "x" * 10**6 + "\x1b ends."))
    assert len(message) < CHARACTERS
    assert message.isprintable()
    assert message.startswith(r"begins\nxxx")
    assert message.endswith(r"xxx\x1b ends.")


def test_plain_data_that_are_no_options_are_refused():
    for tree in (None, [1], "text", {"TRAIN": [1]}, {"TRAIN": {"EPOCHS": {}}}, {3: 4}):
        with pytest.raises(InputError, match=r"^old\.pth"):
            config.from_dict(tree, "old.pth")


def test_plain_data_are_a_copy():
    cfg = config.defaults()
    config.to_dict(cfg)["AUG"]["LOCAL_CROPS_NUMBER"].append(9)
    assert cfg.AUG.LOCAL_CROPS_NUMBER == [8]
