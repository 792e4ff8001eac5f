"""docs/configuration.md, made from the declarations of the options.

python -m utils.config_docs > docs/configuration.md
"""

from utils import cli
from utils.options import OPTIONS, SECTIONS, SHAPES, WEIGHTS, Option

_HEAD = """\
# Options

Every option of a run, its default and its meaning. Set them in a YAML file (`--cfg`),
by flag, or as `KEY VALUE` pairs at the end of the line; a pair wins over a flag, a flag
over the file, the file over the default. An unknown or ill-typed option stops the run
before anything else. The options as resolved are written to the run's folder
(`config.yaml`). Lists are written `[1, 2]` in YAML and `'[1,2]'` on the command line.

Numbers are read alike in files and on the command line, and not as YAML 1.1 does: digits are
decimal whatever zeros lead (`010` is 10), and `0.5`, `.5`, `5.`, `1e-4` are what they look like.
Nothing else is a number: `0x10`, `0o10`, `1_000`, `1:30`, `1,5`, `inf` and `nan` are refused. Truth
values are `true`, `yes`, `on` and `1`, or `false`, `no`, `off` and `0`, in any case. In a file
`null`, `~` and nothing are no value, and tags and aliases are refused.

A run that resumes keeps the options that decide its weights; those marked *resume* may change,
and so may all that decide no weights and what its objective does not read (`--resume force` takes
others too).

This page is made by `python -m utils.config_docs`; its source is `utils/options.py`.
"""
_NO_MEANING = """
## Flags of EsViT without a meaning here

They are accepted, and a line says that they are ignored.
"""


def page() -> str:
    """The whole page, Markdown."""
    lines = [_HEAD]
    for section in SECTIONS.values():
        title = f"{section.name or 'General'}: {section.meaning}"
        if section.objectives:
            title += f" (LOSS.OBJECTIVE {' or '.join(section.objectives)})"
        lines += [f"## {title}", "", "| option | default | meaning | values | flags |"]
        lines += ["|---|---|---|---|---|"]
        for option in OPTIONS.values():
            if option.name.rpartition(".")[0] == section.name:
                lines.append(_row(option))
        lines.append("")
    lines[-1] = _NO_MEANING
    ignored = cli.PRETRAIN.no_meaning | cli.KNN.no_meaning
    lines += [f"- `{flag}`: {why}" for flag, why in ignored.items()]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    default = option.default
    text = str(default).lower() if isinstance(default, bool) else str(default)
    kept = option.decides in (SHAPES, WEIGHTS)
    meaning = option.meaning + (" (*resume*)" if kept and option.resume_may_change else "")
    names = [f"`{flag}`" for flag in option.flags]
    if option.yes_no:
        flag, yes, no = option.yes_no
        names.append(f"`{flag}` (true: {yes}, false: {no})")
    cells = [f"`{option.name}`", f"`{text}`" if text else "(empty)", meaning]
    return f"| {' | '.join([*cells, _values(option), ', '.join(names)])} |"


def _values(option: Option) -> str:
    """The values that are allowed, in words; empty where the type says all."""
    low, high = option.at_least, option.at_most
    words = [" ".join(filter(None, option.choices))]
    if option.length or option.filled or option.whole:
        count = f"{option.length} " if option.length else "one or more " if option.filled else ""
        words.append(f"{count}{'whole numbers' if option.whole else 'numbers'}")
    if low is not None and high is not None:
        words.append(f"{low} to {high}")
    elif low is not None:
        words.append(f"at least {low}")
    return ", ".join(word for word in words if word)


if __name__ == "__main__":
    print(page(), end="")
