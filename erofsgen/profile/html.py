"""A waterfall as one HTML file: inline SVG, and a little script to zoom, filter and ask for details.

The file needs nothing from elsewhere, and its Content-Security-Policy forbids it. Every word in it may come from an
image or a remote host: words are made printable and escaped, and the script gets numbers and the names of kinds only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Final

import numpy as np
import numpy.typing as npt

from erofsgen import text
from erofsgen.profile.waterfall import Curve, Row, Table, Waterfall, arrivals

LIMIT: Final = 2000
"""Rows that a browser draws at ease."""

_ROW: Final = 15
"""Pixels of a row, as in ``page.css``."""
_BINS: Final = 400
_CURVE: Final = 90
_LANE: Final = 30


def page(waterfall: Waterfall) -> str:
    """The file."""
    script, style = _resource("page.js"), _resource("page.css") + _colours(waterfall)
    title = escape(text.one_line(waterfall.title))
    trusted = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{trusted}'"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>\n{style}</style></head><body>",
            f"<h1>{title}</h1>",
            '<div class="about">',
            _facts(waterfall.facts),
            *map(_table, waterfall.tables),
            "</div>",
            _TOOLS,
            _legend(waterfall),
            *_picture(waterfall),
            '<div id="tip" hidden></div>',
            f'<script type="application/json" id="marks">{_data(waterfall)}</script>',
            f"<script>{script}</script>",
            "</body></html>",
            "",
        ]
    )


def _resource(name: str) -> str:
    return resources.files("erofsgen.profile").joinpath(name).read_text("utf-8")


def _colours(waterfall: Waterfall) -> str:
    return "".join(
        f".k{number} {{ stroke: {kind.colour}; }} .k{number}.there {{ stroke: {kind.light}; }}\n"
        for number, kind in enumerate(waterfall.kinds)
    )


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(word)}</dt><dd>{escape(value)}</dd>" for word, value in facts) + "</dl>"


def _table(table: Table) -> str:
    rows = [("th", table.headings), *(("td", row) for row in table.rows)]
    return "<table>" + "".join(f"<tr>{_cells(tag, cells)}</tr>" for tag, cells in rows) + "</table>"


def _cells(tag: str, cells: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)


def _legend(waterfall: Waterfall) -> str:
    items = []
    for kind in waterfall.kinds:
        colours = [kind.colour, kind.light] if waterfall.run else [kind.colour]
        swatches = "".join(f'<i style="background:{colour}"></i>' for colour in colours)
        items.append(f"<li>{swatches}{escape(text.printable(kind.name))}</li>")
    if waterfall.run:
        items.append("<li>dark: its reader waited; light: it was there</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _picture(waterfall: Waterfall) -> list[str]:
    end, rows = waterfall.end, waterfall.rows
    axis = "".join(f'<span style="left:{100 * at / end:.3f}%">{escape(label)}</span>' for at, label in _ticks(end))
    headings = ("path", "file"), ("number", "waited" if waterfall.run else ""), ("number", "bytes")
    columns = "".join(f'<span class="{name}">{word}</span>' for name, word in headings)
    return [
        f'<div class="strip head"><div class="columns">{columns}</div>',
        f'<div class="plot axis" id="axis">{axis}</div></div>',
        *_lanes(waterfall),
        f'<div class="strip"><div class="names">{"".join(map(_name, rows))}</div>',
        f'<div class="plot">{_svg("rows", end, max(len(rows), 1) * _ROW, "".join(_bars(rows)))}</div></div>',
    ]


def _svg(name: str, end: float, height: int, content: str) -> str:
    return (
        f'<svg id="{name}" class="timed" viewBox="0 0 {_number(end)} {height}" preserveAspectRatio="none" '
        f'data-height="{height}" style="height:{height}px">{content}</svg>'
    )


def _lanes(waterfall: Waterfall) -> list[str]:
    """The strips above the rows: what prefetch brought when, and the curves."""
    strips = []
    end = waterfall.end
    if len(waterfall.arrivals):
        used, unused, most = arrivals(waterfall, end, _BINS)
        width = end / _BINS
        content = "".join(
            f'<path class="{name}" d="{_blocks(width, begin * _LANE / most, height * _LANE / most)}"/>'
            for name, begin, height in (("used", np.zeros(_BINS), used), ("unused", used, unused))
        )
        note = (
            f'<b style="background:#2e8b3d"></b>prefetched <b style="background:#e0a458"></b>and not used; '
            f"at most {text.size(most)} in {escape(_time(width))}"
        )
        strips.append(_strip(note, _svg("arrivals", end, _LANE, content)))
    top = max(*(int(curve.total[-1]) for curve in (waterfall.touched, waterfall.brought) if len(curve.total)), 1, 1)
    curves = [
        ("touched", "#1d2329", "touched", waterfall.touched),
        ("brought", "#2e8b3d", "prefetched", waterfall.brought),
    ]
    drawn = [curve for curve in curves if len(curve[3].at)]
    note = "<br>".join(
        f'<b style="background:{colour}"></b>bytes {word}, {text.size(int(curve.total[-1]))} in the end'
        for _, colour, word, curve in drawn
    )
    content = "".join(f'<path class="{name}" d="{_steps(curve, end, top)}"/>' for name, _, _, curve in drawn)
    strips.append(_strip(note, _svg("curves", end, _CURVE, content)))
    return strips


def _strip(note: str, content: str) -> str:
    return f'<div class="strip"><div class="note">{note}</div><div class="plot">{content}</div></div>'


def _blocks(width: float, begin: npt.NDArray[np.float64], height: npt.NDArray[np.float64]) -> str:
    step = _number(width)
    return "".join(
        f"M{_number(number * width)} {_number(_LANE - begin[number])}v-{_number(height[number])}h{step}"
        f"v{_number(height[number])}z"
        for number in np.flatnonzero(height).tolist()
    )


def _steps(curve: Curve, end: float, top: int) -> str:
    """A line that goes up where bytes came, in no more steps than can be told apart without zooming far in."""
    place = (curve.at * (8 * _BINS / end)).astype(np.int64)
    last = np.concatenate((place[1:] != place[:-1], [True]))
    points = [
        f"H{_number(at)}V{_number(_CURVE - 2 - (_CURVE - 4) * total / top)}"
        for at, total in zip(curve.at[last].tolist(), curve.total[last].tolist(), strict=True)
    ]
    return f"M0 {_CURVE - 2}{''.join(points)}H{_number(end)}"


def _name(row: Row) -> str:
    directory, slash, base = row.name.rstrip("/").rpartition("/")
    tail = base + ("/" if row.path.endswith(b"/") else "")
    more = f" ({row.files:,} files)" if row.path.endswith(b"/") else ""
    waited = f"{row.waited:,.1f} ms" if row.waited else ""
    return (
        f'<div class="name"><span class="path" title="{escape(row.name + more)}">'
        f'<span class="dir">{escape(directory + slash)}</span><span class="base">{escape(tail + more)}</span></span>'
        f'<span class="number">{waited}</span><span class="number">{text.size(row.size)}</span></div>'
    )


def _bars(rows: Sequence[Row]) -> Iterable[str]:
    """For each row a group: for each kind a path of ticks, and one of bars for what was waited for."""
    for place, row in enumerate(rows):
        paths = []
        for kind in np.unique(row.marks["kind"]).tolist():
            marks = row.marks[row.marks["kind"] == kind]
            waited = marks[marks["waited"] > 0]
            for name, some in ((" there", marks[marks["waited"] == 0]), ("", waited)):
                if len(some):
                    line = "".join(f"M{_number(at)} 3v9" for at in np.unique(some["at"]).tolist())
                    paths.append(f'<path class="k{kind}{name} tick" d="{line}"/>')
            if len(waited):
                pairs = zip(waited["at"].tolist(), waited["waited"].tolist(), strict=True)
                line = "".join(f"M{_number(at)} 7.5h{_number(long)}" for at, long in pairs)
                paths.append(f'<path class="k{kind} waited" d="{line}"/>')
        yield f'<g transform="translate(0 {place * _ROW})">{"".join(paths)}</g>'


def _data(waterfall: Waterfall) -> str:
    """What the script knows: numbers, and what the kinds are called."""
    marks = [
        [
            [float(_number(at)), float(_number(waited)), length, kind]
            for at, waited, length, kind in row.marks[["at", "waited", "length", "kind"]].tolist()
        ]
        for row in waterfall.rows
    ]
    data = {
        "end": waterfall.end,
        "row": _ROW,
        "kinds": [text.printable(kind.name) for kind in waterfall.kinds],
        "waited": [round(row.waited, 3) for row in waterfall.rows],
        "bytes": [row.size for row in waterfall.rows],
        "marks": marks,
        "there": "was there" if waterfall.run else "",
    }
    encoded = json.dumps(data, separators=(",", ":"))
    # within a script nothing is unescaped: what could end it is written as JSON's own escapes
    return encoded.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _ticks(end: float) -> list[tuple[float, str]]:
    rough = end / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [(number * step, _time(number * step)) for number in range(math.ceil(end / step))]


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1000:g} s" if milliseconds >= 1000 else f"{milliseconds:g} ms"


def _number(value: float) -> str:
    """Short, and to the microsecond."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


_TOOLS: Final = """<div class="tools" id="tools" hidden>
<input type="search" id="find" placeholder="part of a path" aria-label="Show paths with">
<label>order <select id="order"><option value="first">first touch</option><option value="waited">waited</option>
<option value="bytes">bytes</option></select></label>
<label><input type="checkbox" id="waited"> waited for only</label>
<button type="button" id="all">all of the time</button>
<span id="shown"></span><span>drag to zoom in, double-click to zoom out, Ctrl and wheel for both</span>
</div>"""
