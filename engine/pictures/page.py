"""One self-contained HTML page: text, tables and pictures in a file that any browser opens."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from engine.pictures.drawing import Picture, save
from utils.files import write_text

_CELL_ON_PHONES = 85  # pixels; a narrow screen scrolls a picture rather than shrinking it further

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 1.5em auto; padding: 0 1em;
  color: #1b1b1b; background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.5em; line-height: 1.25 } h2 { font-size: 1.2em; margin: 2em 0 .4em }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .6em 0 }
td, th { border: 1px solid #bbb; padding: .3em .7em; text-align: left; vertical-align: top;
  overflow-wrap: normal }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
figure { margin: 0 0 1.5em } figcaption { max-width: 75ch; margin: 0 0 .5em }
img { display: block; max-width: 100%; height: auto } code { font-size: .9em }
"""


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def command(words: str) -> str:
    return f"<p>Command: <code>{html.escape(words)}</code></p>"


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Rows of cells; numbers that are float get two decimals and stand at the right."""
    first = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = [f"<tr>{first}</tr>"] if header else []
    lines += [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"<td class='n'>{value:.2f}</td>"
    # Paths may be broken at their slashes.
    return f"<td>{html.escape(str(value)).replace('/', '/<wbr>')}</td>"


def pictures(folder: Path, pictures: Mapping[str, Picture]) -> list[str]:
    """Each picture with its title and caption; it is also written as PNG, of that name in `folder`.

    InputError where one cannot be written.
    """
    parts = []
    for name, picture in pictures.items():
        save(picture.figure, folder / name)
        data = base64.b64encode((folder / name).read_bytes()).decode()
        caption = f"<figcaption>{html.escape(picture.caption)}</figcaption>"
        image = (
            f"<img alt='{html.escape(picture.title)}' src='data:image/png;base64,{data}' "
            f"style='min-width:{picture.columns * _CELL_ON_PHONES}px'>"
        )
        parts.append(heading(picture.title))
        parts.append(f"<figure>{caption}<div class='wide'>{image}</div></figure>")
    return parts


def write(path: Path, title: str, parts: Iterable[str]) -> None:
    """The page, whole; parts: what the functions above made. InputError if it cannot be written."""
    head = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
    )
    write_text(path, "\n".join([head, *parts, "</html>"]) + "\n", "page")
