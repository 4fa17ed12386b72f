"""Pages: a single HTML file that needs no network and no script, light and dark, on paper and on a phone."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from trtkern.output import style
from trtkern.output.text import printable

_LIGHT = f"color-scheme: light; {style.css(style.LIGHT)}"
_DARK = f"color-scheme: dark; {style.css(style.NIGHT)}"

STYLE = f"""
:root {{ {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
:root:has(#light:checked) {{ {_LIGHT} }}
:root:has(#dark:checked) {{ {_DARK} }}
@media print {{ :root, :root:has(#dark:checked) {{ {_LIGHT} }} }}
* {{ box-sizing: border-box; }}
html {{ background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; scroll-padding-top: 3.2rem;
  -webkit-text-size-adjust: 100%; }}
body {{ margin: 0 auto; max-width: 64rem; padding: 1rem; overflow-wrap: break-word; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: .2rem 0 .6rem; }}
h2 {{ font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }}
h3 {{ font-size: 1rem; margin: 1.3rem 0 .3rem; }} p, ul {{ max-width: 46rem; }}
a {{ color: var(--link); }}
h2 a {{ color: inherit; text-decoration: none; }} h2 a:hover {{ text-decoration: underline; }}
header {{ position: relative; }}
.theme {{ border: 0; margin: 0 0 .4rem; padding: 0; font-size: .8rem; color: var(--soft); }}
.theme label {{ margin-right: .7rem; cursor: pointer; }} .theme input {{ margin: 0 .25rem 0 0; vertical-align: -.1em; }}
.theme legend {{ float: left; margin-right: .6rem; padding: 0; }}
nav {{ position: sticky; top: 0; z-index: 2; margin: 0 -1rem; padding: .4rem 1rem; background: var(--page);
  border-bottom: 1px solid var(--line); font-size: .85rem; }}
nav ul {{ display: flex; gap: .2rem 1.1rem; margin: 0; padding: 0; max-width: none; list-style: none; overflow-x: auto;
  white-space: nowrap; }}
nav a {{ display: block; padding: .15rem 0; }}
.row {{ display: grid; gap: 1rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }}
.row > * {{ min-width: 0; }}
figure {{ margin: 0 0 .8rem; min-width: 0; }} .row > .broad {{ grid-column: 1 / -1; }}
figcaption {{ color: var(--soft); font-size: .85rem; max-width: 46rem; }}
.picture {{ overflow: auto hidden; }}
.picture svg {{ display: block; width: 100%; height: auto; color: var(--ink); overflow: visible; }}
.wide {{ overflow-x: auto; margin: .3rem 0 .8rem; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: 600; padding: .3rem 0; }}
th, td {{ text-align: left; padding: .15rem .55rem .15rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }}
th {{ font-weight: 600; }} td.n, th.n {{ text-align: right; }} td.n {{ white-space: nowrap; }}
th.over {{ text-align: center; }}
thead th {{ vertical-align: bottom; }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: var(--page); max-width: 60vw; }}
.run {{ display: inline-block; white-space: nowrap; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 0 1rem; }}
.run::before {{ content: ""; display: inline-block; width: .75em; height: .75em; margin-right: .4em;
  border-radius: 50%; background: var(--of); }}
.problem {{ border-left: 4px solid var(--alarm); padding-left: .6rem; }}
pre {{ white-space: pre-wrap; font-size: .85rem; background: var(--band); padding: .5rem .7rem; }}
summary {{ cursor: pointer; color: var(--soft); font-size: .85rem; }}
@media (min-width: 82rem) {{
  body {{ display: grid; grid-template-columns: 12rem minmax(0, 64rem); column-gap: 2.5rem; max-width: 80rem; }}
  body:has(nav) > :not(nav) {{ grid-column: 2; }} body:not(:has(nav)) {{ display: block; max-width: 64rem; }}
  nav {{ grid-column: 1; grid-row: 1 / span 9; align-self: start; top: 1rem; margin: 0; padding: .4rem 0; border: 0; }}
  nav ul {{ display: block; white-space: normal; }} html {{ scroll-padding-top: 1rem; }}
}}
@media print {{
  html, body {{ font-size: 12px; }} body {{ display: block; max-width: none; padding: 0; }}
  nav, .theme {{ display: none; }}
  figure, tr, caption, thead {{ break-inside: avoid; }} h2, h3, caption {{ break-after: avoid; }}
  .row {{ display: block; }} .row > figure {{ display: inline-block; vertical-align: top; width: 46%;
    margin: 0 1rem 1rem 0; }} .row > .broad {{ width: 100%; }}
  .wide, .picture {{ overflow: visible; }} .picture svg {{ min-width: 0 !important; }}
}}
"""

_BROAD = 560
"""From so many pixels on a picture takes the whole row."""


class Html(str):
    """Text that is HTML already."""


class Section(NamedTuple):
    """A part of a page, which its contents list."""

    heading: str
    body: str
    """HTML."""
    short: str = ""
    """The heading in the contents, where it is another."""


def document(title: str, sections: Sequence[Section], intro: str = "", legend: str = "") -> bytes:
    """The whole page.

    Args:
        title: of it.
        sections: in order; two or more have a list of contents that stays in sight.
        intro: HTML below the title.
        legend: HTML below the contents.
    """
    anchors: dict[str, Section] = {}
    for section in sections:
        base = anchor = re.sub(r"[^a-z0-9]+", "-", (section.short or section.heading).lower()).strip("-") or "part"
        number = 1
        while anchor in anchors or anchor in ("auto", "light", "dark"):
            anchor = f"{base}-{(number := number + 1)}"
        anchors[anchor] = section
    parts = [
        f'<section id="{anchor}"><h2><a href="#{anchor}">{escaped(section.heading)}</a></h2>\n{section.body}</section>'
        for anchor, section in anchors.items()
    ]
    links = "".join(f'<li><a href="#{a}">{escaped(s.short or s.heading)}</a></li>' for a, s in anchors.items())
    contents = f'<nav aria-label="Contents"><ul>{links}</ul>{legend}</nav>\n' if len(parts) > 1 else ""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>\n"
    )
    choice = "".join(
        f'<label><input type="radio" name="theme" id="{name}"{" checked" if name == "auto" else ""}>{name}</label>'
        for name in ("auto", "light", "dark")
    )
    theme = f'<fieldset class="theme"><legend>Colours:</legend>{choice}</fieldset>'
    header = f"<header>{theme}<h1>{escaped(title)}</h1>{intro}</header>\n"
    return f"{head}<body>{header}{contents}<main>\n{chr(10).join(parts)}\n</main></body></html>\n".encode()


def escaped(value: object) -> str:
    """For people and for HTML."""
    return escape(printable(value))


def html_table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    caption: str = "",
    words: int = 1,
    over: Sequence[tuple[str, int]] = (),
) -> str:
    """A table whose first ``words`` columns are words, the others numbers.

    Args:
        head: of the columns; all empty shows none.
        rows: cells; what is ``Html`` stands as it is, everything else is escaped.
        caption: above it.
        words: columns.
        over: a line above the head: (words, over so many columns).
    """
    kinds = ["" if i < words else ' class="n"' for i in range(len(head))]
    top = "".join(f'<th{kind} scope="col">{_cell(name)}</th>' for kind, name in zip(kinds, head, strict=True))
    lines = (
        "<tr>" + "".join(f"<td{kind}>{_cell(value)}</td>" for kind, value in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    shown = f"<caption>{escaped(caption)}</caption>" if caption else ""
    first = "".join(f'<th class="over" colspan="{count}">{_cell(name)}</th>' for name, count in over)
    top = f"<thead>{f'<tr>{first}</tr>' if first else ''}<tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{shown}{top}<tbody>{"".join(lines)}</tbody></table></div>'


def _cell(value: object) -> str:
    return value if isinstance(value, Html) else escaped(value)


def figure(svg: str, caption: str) -> str:
    """A picture, as SVG, with its caption. Its text stays legible: where it does not fit it scrolls."""
    found = re.search(r' width="([\d.]+)pt"', svg)
    width = style.PX * float(found[1]) if found else 0.0
    limits = f"min-width:{style.LEAST * width:.0f}px;max-width:{style.MOST * width:.0f}px"
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escaped(caption)}" style="{limits}" ', 1)
    kind = ' class="broad"' if width > _BROAD else ""
    return f'<figure{kind}><div class="picture">{svg}</div><figcaption>{escaped(caption)}</figcaption></figure>'


def origin(
    settings: Mapping[str, Any], versions: Mapping[str, str], memory: str | None, command: Sequence[str] | None
) -> Section:
    """Settings by their names, versions, memory, command."""
    parts = []
    if command:
        parts.append(f"<p>Command:</p><pre>{escaped(shlex.join(map(str, command)))}</pre>")
    if memory:
        parts.append(f"<p>Memory:</p><pre>{escaped(memory)}</pre>")
    said = [(name, v if isinstance(v, str) else json.dumps(v, default=str)) for name, v in settings.items()]
    tables = html_table(["", ""], said, "Settings", words=2) + html_table(
        ["", ""], versions.items(), "Versions", words=2
    )
    return Section("Where it comes from", "".join([*parts, f'<div class="row">{tables}</div>']), "Origin")
