"""Options: where they come from, which wins, and what the user reads when one is wrong."""

from pathlib import Path

import pytest
import yaml

from utils import cli, config, config_docs
from utils.errors import InputError
from utils.options import FIGURES, NOTHING, OPTIONS, SHAPES, WEIGHTS


def parse(*words: str) -> cli.CommandLine:
    return cli.parse("a test", words)


def value(option: str, *words: str, face: cli.Face = cli.PRETRAIN):
    return config.get(cli.parse("a test", words, face).cfg, option)


def refusal(*words: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(*words)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "options.yaml"
        path.write_text(text)
        return str(path)

    return write


# Precedence


def test_a_flag_that_was_not_typed_overrides_nothing(yaml_file):
    tree = config.to_dict(config.defaults())
    tree["TRAIN"] |= {"EPOCHS": 33, "BASE_LR": 0.125, "PRECISION": "bf16", "WARMUP_EPOCHS": 3}
    tree["LOSS"]["OBJECTIVE"] = "esvit"
    tree["HEAD"]["NORM_LAST_LAYER"] = False
    tree["AUG"]["LOCAL_CROPS_NUMBER"] = [3]
    command = parse("--cfg", yaml_file(yaml.safe_dump(tree)))
    assert config.to_dict(command.cfg) == tree
    assert command.notes == []


@pytest.mark.parametrize(
    "words",
    [
        ["--epochs", "70", "SEED", "5"],
        ["--epochs=70", "SEED", "5"],
        ["--local-rank=0", "TRAIN.EPOCHS", "70", "SEED", "5"],
        ["--local_crops_scale", "0.05", "0.4", "TRAIN.EPOCHS", "70", "SEED", "5"],
        ["--resplit", "TRAIN.EPOCHS", "70", "SEED", "5"],
    ],
)
def test_pairs_are_found_after_every_kind_of_flag(words):
    cfg = parse(*words).cfg
    assert (cfg.TRAIN.EPOCHS, cfg.SEED) == (70, 5)


def test_a_flags_upper_case_value_is_no_pair():
    assert value("OUTPUT_DIR", "--output_dir", "OUT", "SEED", "1") == "OUT"


def test_a_file_is_no_pair(tmp_path, monkeypatch):
    """A section's name may begin that of a file of weights, or of any file that is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HEAD.PTH").touch()
    (tmp_path / "data.tar").touch()
    names = ["a.pth", "cmd.pth", "moco.pth", "model.safetensors", "HEAD.PTH", "data.tar"]
    rest, pairs = cli.split_pairs(["--checkpoint", *names, "SEED", "1"], ())
    assert rest == ["--checkpoint", *names]
    assert pairs == [("SEED", "1")]
    with pytest.raises(InputError, match=r"no option 'train\.epochs'\. Did you mean TRAIN\.EPOCHS"):
        parse("--mixup", "0", "train.epochs", "5")
    with pytest.raises(InputError, match=r"unknown argument '--epoch'\. Did you mean --epochs"):
        parse("--epoch", "5")


def test_a_path_keeps_its_dots_digits_and_signs():
    assert value("DATA.PATH", "DATA.PATH", "123") == "123"
    assert value("DATA.PATH", "--data_path", "a=b/1e-4") == "a=b/1e-4"


# Values


def ways(flag: str, option: str, text: str, yaml_file) -> list[list[str]]:
    """A value by flag, as KEY VALUE and in a file."""
    section, _, key = option.rpartition(".")
    written = f"{section}:\n  {key}: {text}\n" if section else f"{key}: {text}\n"
    return [[flag, text], [option, text], ["--cfg", yaml_file(written)]]


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+.0001", "00.0001", "1.e-4"])
def test_a_small_number_in_any_spelling(text, yaml_file):
    for words in ways("--lr", "TRAIN.BASE_LR", text, yaml_file):
        assert value("TRAIN.BASE_LR", *words) == 1e-4


@pytest.mark.parametrize(
    ("text", "meant"), [("010", 10), ("08", 8), ("0", 0), ("00", 0), ("+7", 7), ("0019", 19)]
)
def test_digits_are_decimal_whatever_zeros_lead(text, meant, yaml_file):
    for words in ways("--seed", "SEED", text, yaml_file):
        assert value("SEED", *words) == meant
    for words in ways("", "LINEAR.SWEEP", f"[{text}, 0.5]", yaml_file)[1:]:
        assert value("LINEAR.SWEEP", *words, face=cli.LINEAR) == [meant, 0.5]


@pytest.mark.parametrize(
    "text",
    [
        *("1:30", "1:30:00", "0x10", "0o10", "0b11", "1_000", "1,000", "1 000", "10.0", "1e3"),
        *("null", "~", "yes", "true", "١٢", "10k", "1e", "--5", "2001-01-01"),
    ],
)
def test_what_is_not_plainly_a_whole_number_is_refused(text, yaml_file):
    for words in ways("--epochs", "TRAIN.EPOCHS", text, yaml_file)[1:]:
        assert "TRAIN.EPOCHS must be a whole number" in refusal(*words)


@pytest.mark.parametrize("text", ["nan", ".nan", "inf", "-.inf", "1:30.5", "0x1p3", "1_0.5", "1,5"])
def test_what_is_not_plainly_a_number_is_refused(text, yaml_file):
    for words in ways("--lr", "TRAIN.BASE_LR", text, yaml_file)[1:]:
        assert "TRAIN.BASE_LR must be a number" in refusal(*words)


@pytest.mark.parametrize(
    "text", ["08", "010", "123", "1e-4", "1:30", "on", "true", "~", "null", "1_0", "0x1"]
)
def test_a_text_that_looks_like_a_number_is_written_so_that_all_read_a_text(text, tmp_path):
    cfg = config.defaults()
    cfg.INIT.CHECKPOINT_KEY = text
    config.write(cfg, tmp_path / "config.yaml")
    assert value("INIT.CHECKPOINT_KEY", "--cfg", str(tmp_path / "config.yaml")) == text
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert tree["INIT"]["CHECKPOINT_KEY"] == text
    file = tmp_path / "typed.yaml"
    file.write_text("DATA:\n  PATH: 08\n")
    assert "DATA.PATH must be a text, in quotes, not 8" in refusal("--cfg", str(file))


def test_capitals_mean_nothing_in_a_name():
    cfg = parse("--dataset", "CUB", "--objective", "EsViT", "DATA.CROPS", "Device").cfg
    assert (cfg.DATA.DATASET, cfg.LOSS.OBJECTIVE, cfg.DATA.CROPS) == ("cub", "esvit", "device")


def test_lists_from_flags_pairs_and_single_values():
    sizes = ["AUG.LOCAL_CROPS_SIZE", "[96, 64]"]
    assert value("AUG.LOCAL_CROPS_NUMBER", "AUG.LOCAL_CROPS_NUMBER", "[4, 6]", *sizes) == [4, 6]
    assert value("AUG.LOCAL_CROPS_NUMBER", "AUG.LOCAL_CROPS_NUMBER", "4") == [4]
    flags = ["--local_crops_number", "4", "6", "--local_crops_size", "96", "64"]
    assert value("AUG.LOCAL_CROPS_NUMBER", *flags) == [4, 6]
    assert value("AUG.GLOBAL_CROPS_SCALE", "--global_crops_scale", "0.25", "1.") == [0.25, 1.0]
    assert value("MODEL.DEPTHS", "MODEL.DEPTHS", "[2, 2]", "MODEL.NUM_HEADS", "[1, 2]") == [2, 2]


@pytest.mark.parametrize("text", ["true", "True", "on", "yes", "1"])
def test_truth_in_any_spelling(text):
    assert value("HEAD.USE_BN", "--use_bn_in_head", text) is True
    assert value("TRAIN.PRECISION", "--use_fp16", text) == "fp16"


@pytest.mark.parametrize("text", ["0", "false", "off", "No"])
def test_falsehood_in_every_spelling_that_esvit_takes(text):
    assert value("HEAD.NORM_LAST_LAYER", "--norm_last_layer", text) is False
    assert value("TRAIN.PRECISION", "--use_fp16", text) == "fp32"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--epochs", "many"], "TRAIN.EPOCHS must be a whole number, not 'many'"),
        (["--epochs", "1.5"], "TRAIN.EPOCHS must be a whole number"),
        (["--lr", "fast"], "TRAIN.BASE_LR must be a number, not 'fast'"),
        (["HEAD.USE_BN", "perhaps"], "HEAD.USE_BN must be true or false, not 'perhaps'"),
        (["--use_fp16", "perhaps"], "--use_fp16 must be true or false, not 'perhaps'"),
        (["MODEL.DEPTHS", "[a]"], "MODEL.DEPTHS must be a list of numbers"),
        (["SEED", "true"], "SEED must be a whole number"),
        (["TRAIN.EPOCHS", "[1"], "TRAIN.EPOCHS must be a whole number"),
    ],
)
def test_an_ill_typed_value_is_one_sentence_with_its_source(words, reason):
    message = refusal(*words)
    assert reason in message
    assert message.startswith(words[0] if words[0].startswith("--") else "command line")


# Unknown names


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--batch_size_per_cpu", "3"], "--batch_size_per_gpu"),
        (["TRAIN.EPOCH", "3"], "TRAIN.EPOCHS"),
        (["LOSS.LAMBDA1", "3"], "CMD.LAMBDA1"),
        (["--objective", "cmdd"], "cmd"),
        (["TRAIN.OPTIMIZER", "adam"], "adamw"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(words, near):
    message = refusal(*words)
    assert words[0].lstrip("-") in message or words[1] in message
    assert f"Did you mean {near}?" in message


def test_an_unknown_key_in_yaml_names_file_and_nearest(yaml_file):
    path = yaml_file("TRAIN:\n  EPOCS: 3\n")
    message = refusal("--cfg", path)
    assert message == f"{path}: there is no option 'TRAIN.EPOCS'. Did you mean TRAIN.EPOCHS?"


def test_pairs_without_a_last_value_are_refused():
    message = refusal("SEED", "1", "TRAIN.EPOCHS")
    assert "TRAIN.EPOCHS" in message
    assert "a value" in message


def test_a_flag_without_its_value_is_refused():
    assert "--epochs" in refusal("--epochs")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("TRAIN: [1", "is not a YAML file"), ("- 1\n- 2\n", "SECTION: KEY: value"), (None, "no file")],
)
def test_a_bad_yaml_file_is_refused(text, reason, yaml_file, tmp_path):
    path = str(tmp_path / "none.yaml") if text is None else yaml_file(text)
    message = refusal("--cfg", path)
    assert reason in message
    assert path in message


# EsViT's command line

ESVIT = {
    "--arch deit_small": {"MODEL.ARCH": "deit_small"},
    "--patch_size 8": {"MODEL.PATCH_SIZE": 8},
    "--out_dim 1024": {"HEAD.OUT_DIM": 1024},
    "--norm_last_layer false": {"HEAD.NORM_LAST_LAYER": False},
    "--momentum_teacher 0.99": {"TRAIN.MOMENTUM_TEACHER": 0.99},
    "--use_bn_in_head true": {"HEAD.USE_BN": True},
    "--use_dense_prediction true": {"LOSS.OBJECTIVE": "cmd"},
    "--warmup_teacher_temp 0.03": {"LOSS.WARMUP_TEACHER_TEMP": 0.03},
    "--teacher_temp 0.07": {"LOSS.TEACHER_TEMP": 0.07},
    "--warmup_teacher_temp_epochs 30": {"LOSS.WARMUP_TEACHER_TEMP_EPOCHS": 30},
    "--use_fp16 true": {"TRAIN.PRECISION": "fp16"},
    "--weight_decay 0.05": {"TRAIN.WEIGHT_DECAY": 0.05},
    "--weight_decay_end 0.5": {"TRAIN.WEIGHT_DECAY_END": 0.5},
    "--clip_grad 0.3": {"TRAIN.CLIP_GRAD": 0.3},
    "--batch_size_per_gpu 32": {"TRAIN.BATCH_SIZE_PER_GPU": 32},
    "--epochs 300": {"TRAIN.EPOCHS": 300},
    "--freeze_last_layer 2": {"TRAIN.FREEZE_LAST_LAYER": 2},
    "--lr 0.001": {"TRAIN.BASE_LR": 0.001},
    "--warmup_epochs 5": {"TRAIN.WARMUP_EPOCHS": 5},
    "--min_lr 1e-5": {"TRAIN.MIN_LR": 1e-5},
    "--optimizer sgd": {"TRAIN.OPTIMIZER": "sgd"},
    "--global_crops_scale 0.25 1.0": {"AUG.GLOBAL_CROPS_SCALE": [0.25, 1.0]},
    "--local_crops_number 6": {"AUG.LOCAL_CROPS_NUMBER": [6]},
    "--local_crops_scale 0.05 0.25": {"AUG.LOCAL_CROPS_SCALE": [0.05, 0.25]},
    "--local_crops_size 64": {"AUG.LOCAL_CROPS_SIZE": [64]},
    "--dataset imagenet1k": {"DATA.DATASET": "imagenet1k"},
    "--data_path pictures": {"DATA.PATH": "pictures"},
    "--pretrained_weights_ckpt start.pth": {"INIT.WEIGHTS": "start.pth"},
    "--output_dir out": {"OUTPUT_DIR": "out"},
    "--saveckp_freq 5": {"CKPT.KEEP_EVERY": 5},
    "--seed 7": {"SEED": 7},
    "--num_workers 4": {"DATA.WORKERS": 4},
    "--local_rank 0": {},
    "--local-rank 0": {},
}
IGNORED = [
    "--aug-opt dino_aug",
    "--color-jitter 0.4",
    "--aa rand-m9-mstd0.5-inc1",
    "--train-interpolation bicubic",
    "--reprob 0.25",
    "--remode pixel",
    "--recount 1",
    "--resplit",
    "--use_mixup false",
    "--num_mixup_views 10",
    "--mixup 0.8",
    "--cutmix 1.0",
    "--cutmix-minmax 0.2 0.8",
    "--mixup-prob 1.0",
    "--mixup-switch-prob 0.5",
    "--mixup-mode batch",
    "--smoothing 0.0",
    "--zip_mode true",
    "--tsv_mode false",
    "--sampler distributed",
    "--dist_url env://",
]


def test_each_flag_of_esvit_sets_its_option_and_no_other():
    for flag, wanted in ESVIT.items():
        command = parse(*flag.split(), "MODEL.NUM_CLASSES", "0")
        assert {name: config.get(command.cfg, name) for name in wanted} == wanted
        changed = config.differing(command.cfg, config.defaults())
        assert changed == [key for key, new in wanted.items() if new != OPTIONS[key].default]
        assert command.notes == []


def test_a_flag_without_meaning_says_so_in_a_line_and_changes_nothing():
    for flag in IGNORED:
        command = parse(*flag.split(), "SEED", "5", "MODEL.NUM_CLASSES", "0")
        (note,) = command.notes
        assert note.startswith(f"{flag.split()[0]} has no meaning here and is ignored: ")
        assert "\n" not in note
        assert config.differing(command.cfg, config.defaults()) == ["SEED"]


def test_a_whole_command_of_esvit_parses(yaml_file):
    words = " ".join([*ESVIT, *IGNORED]).split()
    cfg = ["--cfg", yaml_file("MODEL:\n  WINDOW_SIZE: 14\n")]
    command = parse(*cfg, *words, "MODEL.NUM_CLASSES", "0")
    for wanted in ESVIT.values():
        for key, new in wanted.items():
            assert config.get(command.cfg, key) == new
    assert command.cfg.MODEL.WINDOW_SIZE == 14
    assert len(command.notes) == len(IGNORED)


@pytest.mark.parametrize(
    ("words", "objective"),
    [
        (["--use_dense_prediction", "true"], "cmd"),
        (["--use_dense_prediction", "false"], "dino"),
        (["--use_dense_prediction", "true", "--objective", "esvit"], "esvit"),
        (["--use_dense_prediction", "false", "LOSS.OBJECTIVE", "dino"], "dino"),
        (["--objective", "dino", "--use_dense_prediction", "true", "LOSS.OBJECTIVE", "cmd"], "cmd"),
    ],
)
def test_dense_prediction_names_an_objective_or_agrees_with_it(words, objective):
    assert value("LOSS.OBJECTIVE", *words) == objective


@pytest.mark.parametrize(
    ("dense", "told"),
    [
        ("true", ["LOSS.OBJECTIVE", "dino"]),
        ("false", ["LOSS.OBJECTIVE", "cmd"]),
        ("false", ["--objective", "esvit"]),
    ],
)
def test_dense_prediction_that_contradicts_the_objective_is_refused(dense, told):
    flag = ["--use_dense_prediction", dense]
    words = [*flag, *told] if not told[0].startswith("--") else [*told, *flag]
    assert f"--use_dense_prediction {dense} contradicts {' '.join(told)}" in refusal(*words)


# Ranges

BAD = {
    "SEED": -1,
    "PRINT_FREQ": 0,
    "DEVICE": "tpu",
    "RESUME": "never",
    "MODEL.EMBED_DIM": -1,
    "MODEL.DEPTHS": [0],
    "MODEL.NUM_HEADS": [10**12],
    "MODEL.WINDOW_SIZE": 0,
    "MODEL.PATCH_SIZE": -4,
    "MODEL.IMG_SIZE": 0,
    "MODEL.DROP_PATH": 1,
    "MODEL.NUM_CLASSES": 10,
    "HEAD.OUT_DIM": 10**12,
    "HEAD.HIDDEN_DIM": 0,
    "HEAD.BOTTLENECK_DIM": 0,
    "HEAD.LAYERS": 0,
    "HEAD.POOL_HIDDEN": 0,
    "LOSS.OBJECTIVE": "simclr",
    "LOSS.STUDENT_TEMP": 0,
    "LOSS.WARMUP_TEACHER_TEMP": 0,
    "LOSS.TEACHER_TEMP": -0.04,
    "LOSS.WARMUP_TEACHER_TEMP_EPOCHS": -1,
    "LOSS.CENTER_MOMENTUM": 1.1,
    "LOSS.CHUNK_MIB": -1,
    "CMD.LAMBDA1": -1,
    "CMD.ATTENTION_RATE": -1,
    "DATA.WORKERS": -1,
    "MOCO.QUEUE": 0,
    "MOCO.BN_IMAGES": 1,
    "LCR.CHANNELS": 0,
    "LCR.WEIGHT": -0.01,
    "TRAIN.MOMENTUM_TEACHER_END": 1.1,
    "DATA.MAX_BAD": 1.5,
    "DATA.CACHE": "disk",
    "DATA.CACHE_SIZE": -1,
    "DATA.CROPS": "cpu",
    "AUG.GLOBAL_CROPS_SIZE": 0,
    "AUG.GLOBAL_CROPS_SCALE": [1.0, 0.4],
    "AUG.LOCAL_CROPS_NUMBER": [-1],
    "AUG.LOCAL_CROPS_SIZE": [32.5],
    "AUG.LOCAL_CROPS_SCALE": [0.0, 0.4],
    "AUG.COLOR_JITTER": [0.4, 0.4, 0.2, 0.7],
    "AUG.GRAY_PROB": -0.1,
    "AUG.BLUR_PROB": [1.0, 0.1, 1.5],
    "AUG.SOLARIZE_PROB": 1.5,
    "TRAIN.EPOCHS": 10**12,
    "TRAIN.BATCH_SIZE_PER_GPU": 0,
    "TRAIN.ACCUM_STEPS": 0,
    "TRAIN.OPTIMIZER": "lars",
    "TRAIN.BASE_LR": -0.1,
    "TRAIN.MIN_LR": -1e-6,
    "TRAIN.WARMUP_EPOCHS": 101,
    "TRAIN.WEIGHT_DECAY": -1,
    "TRAIN.WEIGHT_DECAY_END": -1,
    "TRAIN.MOMENTUM_TEACHER": 1.5,
    "TRAIN.CLIP_GRAD": -1,
    "TRAIN.FREEZE_LAST_LAYER": -1,
    "TRAIN.PRECISION": "fp8",
    "TRAIN.TIMEOUT_MINUTES": 0,
    "CKPT.EVERY_MINUTES": -1,
    "DATA.MEAN": [0.5, 0.5],
    "DATA.STD": [0, 1, 1],
    "TRAIN.MAX_BAD_STEPS": 0,
    "CKPT.KEEP_EVERY": -1,
    "CKPT.KEEP": "all",
    "EVAL.KNN_EVERY": -2,
    "EVAL.KNN_K": 0,
    "INIT.HEADS_EPOCHS": -2,
    "INIT.FROZEN": 1.1,
    "INIT.LAYER_DECAY": 1.1,
    "INIT.BATCH_NORM": "running",
    "EVAL.SIZE": -1,
    "EVAL.RESIZE": -1,
    "EVAL.POOLING": "max",
    "EVAL.BATCH_SIZE_PER_GPU": 0,
    "EVAL.PRECISION": "fp8",
    "EVAL.SEEDS": 0,
    "KNN.KS": [10, 0],
    "KNN.TEMPERATURE": 0,
    "RETRIEVAL.SPLIT": "random",
    "LINEAR.CLASSIFIER": "svm",
    "LINEAR.FEATURES": "stored",
    "LINEAR.N_LAST_BLOCKS": 0,
    "LINEAR.EPOCHS": 0,
    "LINEAR.BASE_LR": -1,
    "LINEAR.SWEEP": [0.1, -1],
    "LINEAR.C": [],
    "LINEAR.HOLD_OUT": 1,
    "LINEAR.VAL_FREQ": 0,
    "LINEAR.LABEL_SHARES": [0.1, 1.1],
    "LINEAR.NUM_LABELS": -1,
}
# The other end of ranges with two.
BAD_TOO = {
    "MODEL.DEPTHS": [1001],
    "MODEL.DROP_PATH": -0.1,
    "HEAD.OUT_DIM": 1,
    "LOSS.CENTER_MOMENTUM": -0.1,
    "DATA.MAX_BAD": -0.1,
    "AUG.GLOBAL_CROPS_SCALE": [0.4, 1.1],
    "AUG.LOCAL_CROPS_NUMBER": [101],
    "AUG.COLOR_JITTER": [-0.1, 0.4, 0.2, 0.1],
    "AUG.GRAY_PROB": 1.1,
    "AUG.BLUR_PROB": [-0.1, 0.1, 0.5],
    "AUG.SOLARIZE_PROB": -0.1,
    "TRAIN.EPOCHS": 0,
    "TRAIN.MOMENTUM_TEACHER": -0.1,
    "TRAIN.MOMENTUM_TEACHER_END": -0.1,
    "TRAIN.TIMEOUT_MINUTES": 10**6,
    "LINEAR.EPOCHS": 10**12,
    "LINEAR.HOLD_OUT": 0,
    "LINEAR.LABEL_SHARES": [0],
}
# Truth values; paths and names, checked where they are opened; the architecture's figures.
UNBOUNDED = {
    *("CMD.LS", "CMD.LT", "HEAD.USE_BN", "HEAD.NORM_LAST_LAYER"),
    *("OUTPUT_DIR", "DATA.PATH", "DATA.DATASET", "INIT.WEIGHTS", "INIT.CHECKPOINT_KEY"),
    *("EVAL.KNN_TRAIN", "EVAL.KNN_VAL", "MODEL.ARCH"),
    *("EVAL.DUMP_FEATURES", "EVAL.LOAD_FEATURES", "EVAL.PICTURES"),
    *("DATA.PARTIAL", "DATA.DOWNLOAD", "LINEAR.AVGPOOL_PATCHTOKENS"),
    *("TRAIN.COMPILE", "TRAIN.CHECKPOINTING", "TRAIN.DETERMINISTIC"),
}


def test_a_bad_value_of_any_option_is_one_sentence_that_names_it():
    assert set(BAD) | UNBOUNDED == set(OPTIONS)
    for key, bad in (*BAD.items(), *BAD_TOO.items()):
        message = refusal(key, str(bad))
        assert key in message
        assert message.endswith((".", "?"))


def test_the_ends_of_a_range_are_allowed_and_nan_is_not():
    for key, option in OPTIONS.items():
        for end in (option.at_least, option.at_most):
            cfg = config.defaults()
            cfg.TRAIN.WARMUP_EPOCHS, cfg.AUG.LOCAL_CROPS_NUMBER = 0, []
            if end is not None and not option.length:
                config.put(cfg, key, end, "test")
                config.check(cfg)
        if isinstance(option.default, float):
            assert f"{key} must be a finite number" in refusal(key, "1e999")


# What an option decides


def test_a_resumed_run_may_change_what_decides_no_weights_and_few_others():
    free = {name for name, option in OPTIONS.items() if option.resume_may_change}
    others = free - set(config.deciding(FIGURES, NOTHING))
    assert set(config.deciding(FIGURES, NOTHING)) < free
    assert others == {
        *("TRAIN.EPOCHS", "TRAIN.BATCH_SIZE_PER_GPU", "TRAIN.ACCUM_STEPS"),
        *("TRAIN.MAX_BAD_STEPS", "TRAIN.DETERMINISTIC", "DATA.MAX_BAD", "DATA.PARTIAL"),
        *("INIT.WEIGHTS", "INIT.CHECKPOINT_KEY"),
    }


def test_every_option_of_a_section_decides_what_it_should():
    def sections(*what: str) -> set[str]:
        return {name.rpartition(".")[0] for name in config.deciding(*what)}

    assert sections(SHAPES) == {"MODEL", "HEAD", "LOSS", "MOCO", "LCR"}
    assert sections(FIGURES) == {"EVAL", "KNN", "RETRIEVAL", "LINEAR"}
    assert set(config.deciding(NOTHING)) == {
        *("OUTPUT_DIR", "DEVICE", "PRINT_FREQ", "RESUME"),
        *("DATA.PATH", "DATA.WORKERS", "DATA.DOWNLOAD"),
        *("LOSS.CHUNK_MIB", "TRAIN.CHECKPOINTING", "TRAIN.TIMEOUT_MINUTES"),
        *(name for name in OPTIONS if name.startswith(("CKPT.", "EVAL.KNN"))),
        *("EVAL.DUMP_FEATURES", "EVAL.LOAD_FEATURES", "EVAL.PICTURES"),
    }
    assert {"SEED", "MODEL.DROP_PATH"} < set(config.deciding(WEIGHTS))


def test_what_differs_from_the_defaults_is_shown_where_it_decides_anything():
    cfg = config.defaults()
    assert config.changed(cfg) == "none"
    cfg.OUTPUT_DIR, cfg.KNN.KS, cfg.SEED = "out", [5], 3
    cfg.CMD.LT, cfg.MOCO.QUEUE = False, 99
    assert config.changed(cfg) == "SEED 3, CMD.LT False, KNN.KS [5]"
    cfg.LOSS.OBJECTIVE = "lcr"
    assert config.changed(cfg) == "SEED 3, LOSS.OBJECTIVE lcr, MOCO.QUEUE 99, KNN.KS [5]"


def test_what_no_objective_at_hand_reads_is_unread():
    cfg, other = config.defaults(), config.defaults()
    other.LOSS.OBJECTIVE = "released"
    cmd = {name for name in OPTIONS if name.startswith("CMD.")} | {"HEAD.POOL_HIDDEN"}
    contrast = {name for name in OPTIONS if name.startswith(("MOCO.", "LCR."))}
    assert config.unread(cfg) == config.unread(cfg, other) == contrast
    assert config.unread(other) == contrast | cmd - {"CMD.LAMBDA1"}
    other.LOSS.OBJECTIVE = "moco_v2"
    lcr = {name for name in OPTIONS if name.startswith("LCR.")}
    heads = {"HEAD.OUT_DIM", "HEAD.NORM_LAST_LAYER", "TRAIN.FREEZE_LAST_LAYER"}
    others = {name for name in OPTIONS if name.startswith("LOSS.") and "TEMP" in name}
    assert config.unread(other) == cmd | lcr | heads | others | {"LOSS.CENTER_MOMENTUM"}


# What contradicts


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--epochs", "5"], "TRAIN.WARMUP_EPOCHS 10 is longer than the run of 5 epochs"),
        (["LOSS.WARMUP_TEACHER_TEMP_EPOCHS", "101"], "longer than the run of 100 epochs"),
        (["AUG.LOCAL_CROPS_NUMBER", "[2, 2]"], "must be equally long"),
        (["AUG.BLUR_PROB", "[1, 0]"], "AUG.BLUR_PROB must have 3 values"),
        (["--cfg", "experiments/lcr.yaml", "TRAIN.BATCH_SIZE_PER_GPU", "1"], "must be at least 2"),
        (["DATA.MEAN", "[0.5,0.5,0.5]"], "DATA.MEAN and DATA.STD belong together"),
        (["EVAL.KNN_EVERY", "1", "EVAL.KNN_VAL", "folder"], "EVAL.KNN_VAL is given alone"),
        (["--keep", "best", "EVAL.KNN_EVERY", "0"], "goes by the figures of EVAL.KNN_EVERY"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words, reason):
    assert reason in refusal(*words)


def test_no_local_crops_may_be_asked_for():
    for words in (["AUG.LOCAL_CROPS_NUMBER", "[]"], ["--local_crops_number", "0"]):
        assert config.local_crops(parse(*words).cfg) == []


# Files


def test_plain_data_makes_the_same_options_and_lost_ones_are_ignored_in_a_line(caplog):
    cfg = config.defaults()
    cfg.TRAIN.EPOCHS = 3
    tree = config.to_dict(cfg)
    assert type(tree["TRAIN"]) is dict
    assert config.differing(config.from_dict(tree), cfg) == []
    assert not caplog.records
    tree["TRAIN"]["WARP"] = tree["SPEED"] = 9
    tree["CMD"]["LT"] = "residual"  # the name of a form, once
    assert config.differing(config.from_dict(tree, "old.pth"), cfg) == []
    (line,) = caplog.messages
    gone = "CMD.LT residual, TRAIN.WARP, SPEED"
    assert line == f"old.pth holds options that exist no more: {gone} are ignored."


def test_defaults_are_fresh_copies():
    config.defaults().AUG.LOCAL_CROPS_NUMBER.append(9)
    assert config.defaults().AUG.LOCAL_CROPS_NUMBER == [8]


def test_help_names_each_flag_with_its_option(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag, option in cli.PRETRAIN.flags.items():
        assert f"{flag} VALUE" in text
        assert f"{option.meaning} [{option.name}]" in text


def test_an_empty_section_of_a_file_changes_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("TRAIN:\n  # EPOCHS: 3\nSEED: 4\n")
    cfg = cli.parse("", ["--cfg", str(tmp_path / "a.yaml")]).cfg
    assert config.differing(cfg, config.defaults()) == ["SEED"]


def test_dense_prediction_may_not_contradict_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("LOSS:\n  OBJECTIVE: esvit\n")
    words = ["--cfg", str(tmp_path / "a.yaml"), "--use_dense_prediction"]
    assert cli.parse("", [*words, "true"]).cfg.LOSS.OBJECTIVE == "esvit"
    with pytest.raises(InputError, match=r"contradicts LOSS\.OBJECTIVE esvit in"):
        cli.parse("", [*words, "false"])


def test_a_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert cli.parse("", ["--output_dir", "~/run"]).cfg.OUTPUT_DIR == "/home/someone/run"


def test_the_page_of_options_is_current_and_explains_each():
    """Run `python -m utils.config_docs > docs/configuration.md` after a change of options."""
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == config_docs.page()
    assert [name for name, option in OPTIONS.items() if not option.meaning] == []
