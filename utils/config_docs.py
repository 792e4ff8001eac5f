"""docs/configuration.md, made from the defaults and the remarks beside them.

python -m utils.config_docs > docs/configuration.md
"""

import re
from pathlib import Path

from utils import config, flags, options


def remarks() -> dict[str, str]:
    """Each option's remark in utils/options.py; a remark may go on in a line of its own."""
    found: dict[str, str] = {}
    last = ""
    for line in Path(options.__file__).read_text().splitlines():
        if match := re.match(r"_\.([A-Z0-9_.]+) = .*?(?:  # (.*))?$", line):
            last = match[1]
            found[last] = match[2] or ""
        elif last and (match := re.match(r"# (.*)$", line)):
            found[last] += f" {match[1]}"
        else:
            last = ""
    return found


def page() -> str:
    """The whole page, Markdown."""
    known, cfg = remarks(), config.defaults()
    names: dict[str, list[str]] = {}
    for face in (flags.PRETRAIN, flags.KNN, flags.RETRIEVAL, flags.LINEAR, flags.TABLE):
        for flag, (option, _, _) in face.flags.items():
            if f"`{flag}`" not in names.setdefault(option, []):
                names[option].append(f"`{flag}`")
    names["LOSS.OBJECTIVE"].append("`--use_dense_prediction` (true: cmd, false: dino)")
    names["TRAIN.PRECISION"].append("`--use_fp16` (true: fp16, false: fp32)")
    lines = [
        "# Options",
        "",
        "Every option of a run, its default and its meaning. Set them in a YAML file (`--cfg`),",
        "by flag, or as `KEY VALUE` pairs at the end of the line; a pair wins over a flag, a flag",
        "over the file, the file over the default. An unknown or ill-typed option stops the run",
        "before anything else. The options as resolved are written to the run's folder",
        "(`config.yaml`). Lists are written `[1, 2]` in YAML and `'[1,2]'` on the command line.",
        "",
        "This page is made by `python -m utils.config_docs`; its source is `utils/options.py`.",
    ]
    section = None
    for name in config.option_names():
        own = name.split(".")[0] if "." in name else "General"
        if own != section:
            section = own
            title = f"{own}: {known[own]}" if known.get(own) else own
            lines += [
                "",
                f"## {title}",
                "",
                "| option | default | meaning | flag |",
                "|---|---|---|---|",
            ]
        default = config.get(cfg, name)
        shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
        if default == "":
            shown = "(empty)"
        meaning = known.get(name, "").replace(" | ", ", ")
        lines.append(f"| `{name}` | {shown} | {meaning} | {', '.join(names.get(name, []))} |")
    lines += ["", "## Flags of EsViT without a meaning here", ""]
    lines += ["They are accepted, and a line says that they are ignored.", ""]
    lines += [
        f"- `{flag}`: {why}"
        for flag, why in (flags.PRETRAIN.no_meaning | flags.KNN.no_meaning).items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
