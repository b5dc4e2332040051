"""Waterfalls as a PNG, several above each other with one time axis. Needs Matplotlib, the extra ``plot``."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from erofsgen import text
from erofsgen.errors import UnsupportedError, UsageError
from erofsgen.files import replace_file
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.trace import Trace
from erofsgen.profile.waterfall import Row, Waterfall, arrivals, of_trace

ROWS: Final = 72
"""Rows of all pictures in a file together, and at least :data:`LEAST` in each."""
LEAST: Final = 16
MOST: Final = 64
"""Pictures in a file at most."""

# lengths in inches
_DPI: Final = 110
_WIDTH: Final = 15.0
_LEFT: Final = 4.1
_RIGHT: Final = 0.9
_ROW: Final = 0.135
_CURVES: Final = 0.9
_LANE: Final = 0.22
_LINE: Final = 0.17
_GAP: Final = 0.06
_AXIS: Final = 0.45

_NAME: Final = 64
_LEGEND: Final = 52
_SMALL: Final = 7.0
_BINS: Final = 300
_TICK: Final = 1.6
"""Pixels of what took no time."""
_INK: Final = "#1d2329"
_FAINT: Final = "#66707c"
_USED: Final = "#2e8b3d"
_UNUSED: Final = "#e0a458"


def draw_png(traces: Sequence[tuple[str, Trace, Chunks | None]], path: str | Path) -> None:
    """Draw runs above each other, each under its label, into the file ``path``.

    Raises UnsupportedError (no Matplotlib), UsageError (none, or more than :data:`MOST`), StorageError.
    """
    limit = max(LEAST, ROWS // max(len(traces), 1))
    write_png([of_trace(trace, chunks, title=label, limit=limit) for label, trace, chunks in traces], path)


def write_png(waterfalls: Sequence[Waterfall], path: str | Path) -> None:
    """Write :func:`png` into a file. Raises StorageError, too."""
    replace_file(Path(path), png(waterfalls))


def png(waterfalls: Sequence[Waterfall]) -> bytes:
    """The picture. Raises UnsupportedError (no Matplotlib), UsageError (none, or more than :data:`MOST`)."""
    if not 1 <= len(waterfalls) <= MOST:
        raise UsageError(f"{len(waterfalls)} pictures in a file, 1 to {MOST} are possible")
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("Matplotlib is not installed", hint="pip install 'erofsgen[plot]'") from None
    with mpl.rc_context():
        mpl.rcdefaults()  # not what a user prefers for other pictures
        height = sum(map(_height, waterfalls)) + _AXIS
        figure = Figure(figsize=(_WIDTH, height), dpi=_DPI)
        canvas: Any = FigureCanvasAgg(figure)
        end = 1.01 * max(waterfall.last for waterfall in waterfalls)
        top = height
        for number, waterfall in enumerate(waterfalls, 1):
            _Panel(figure, height, end, _safe()).draw(waterfall, top, last=number == len(waterfalls))
            top -= _height(waterfall)
        written = io.BytesIO()
        canvas.print_png(written)
    return written.getvalue()


def _height(waterfall: Waterfall) -> float:
    lanes = _CURVES + _GAP + (_LANE if len(waterfall.arrivals) else 0)
    return _LINE * (2.8 + len(waterfall.summary)) + lanes + _ROW * max(len(waterfall.rows), 1) + _GAP


class _Panel:
    """One of the pictures of a figure of ``height`` inches. ``safe`` makes a word drawable."""

    def __init__(self, figure: Any, height: float, end: float, safe: Callable[[str], str]) -> None:  # noqa: ANN401
        self._figure = figure
        self._height = height
        self._end = end
        self._safe = safe

    def draw(self, waterfall: Waterfall, top: float, *, last: bool) -> None:
        """Draw it from ``top`` downwards, the ``last`` one with a scale below."""
        title = _cut(self._safe(text.one_line(waterfall.title)), 120)
        top -= _LINE * 1.6
        self._text(0.15, top, title, fontsize=10, fontweight="bold", color=_INK)
        for line in waterfall.summary:
            top -= _LINE
            self._text(0.15, top, _cut(self._safe(line), 200), fontsize=8, color=_INK)
        top -= _LINE * 0.7
        if len(waterfall.arrivals):
            self._arrivals(waterfall, self._axes(top, _LANE))
            top -= _LANE
        self._curves(waterfall, self._axes(top, _CURVES))
        top -= _CURVES + _GAP
        height = _ROW * max(len(waterfall.rows), 1)
        self._rows(waterfall, self._axes(top, height), scale=last)

    def _axes(self, top: float, height: float) -> Any:  # noqa: ANN401
        place = (_LEFT / _WIDTH, (top - height) / self._height, 1 - (_LEFT + _RIGHT) / _WIDTH, height / self._height)
        axes = self._figure.add_axes(place)
        axes.set_xlim(0, self._end)
        axes.tick_params(labelsize=_SMALL, length=2, colors=_FAINT)
        axes.tick_params(labelbottom=False, bottom=False)
        axes.grid(axis="x", color="#e6eaee", linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set(color="#c9d0d7", linewidth=0.6)
        return axes

    def _text(self, left: float, bottom: float, words: str, **style: Any) -> None:  # noqa: ANN401
        self._figure.text(left / _WIDTH, bottom / self._height, words, parse_math=False, **style)

    def _arrivals(self, waterfall: Waterfall, axes: Any) -> None:  # noqa: ANN401
        used, unused, most = arrivals(waterfall, self._end, _BINS)
        width = self._end / _BINS
        edges = np.arange(_BINS + 1) * width
        for begin, top, colour in ((np.zeros(_BINS), used, _USED), (used, used + unused, _UNUSED)):
            low, high = (np.append(values, values[-1]) for values in (begin, top))
            axes.fill_between(edges, low, high, where=high > low, step="post", facecolor=colour, linewidth=0)
        axes.set_ylim(0, most)
        axes.set_yticks([])
        note = f"prefetched, and not used (orange); at most {text.size(most)} in {width:.3g} ms"
        axes.text(-0.005, 0.5, note, transform=axes.transAxes, ha="right", va="center", fontsize=_SMALL, color=_FAINT)

    def _curves(self, waterfall: Waterfall, axes: Any) -> None:  # noqa: ANN401
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        handles: list[Any] = []
        top = 1
        for curve, colour, word in ((waterfall.touched, _INK, "touched"), (waterfall.brought, _USED, "prefetched")):
            if len(curve.at):
                at = np.concatenate(([0], curve.at, [waterfall.last]))
                total = np.concatenate(([0], curve.total, curve.total[-1:]))
                shown = at <= waterfall.last
                axes.plot(at[shown], total[shown], drawstyle="steps-post", color=colour, linewidth=1.1)
                top = max(top, int(curve.total[-1]))
                label = f"bytes {word}, {text.size(int(curve.total[-1]))}"
                handles.append(Line2D([], [], color=colour, linewidth=1.1, label=label))
        axes.set_ylim(0, 1.06 * top)
        axes.axvline(waterfall.last, color=_FAINT, linewidth=0.8, linestyle=":")
        side = {"ha": "right", "x": -3} if waterfall.last > 0.9 * self._end else {"ha": "left", "x": 3}
        axes.annotate(
            f"{'last read' if waterfall.run else 'last'} {_time(waterfall.last)}", (waterfall.last, 0), fontsize=_SMALL,
            color=_FAINT, xytext=(side["x"], 3), textcoords="offset points", ha=side["ha"], va="bottom",
        )  # fmt: skip
        axes.set_yticks([])
        for kind in waterfall.kinds:
            label = _cut(self._safe(text.printable(kind.name)), _LEGEND)
            handles.append(Patch(facecolor=kind.colour, edgecolor=kind.light, linewidth=2, label=label))
        legend = axes.legend(
            handles=handles[:_LEGENDS], loc="center right", bbox_to_anchor=(-0.005, 0.5), frameon=False,
            fontsize=_SMALL, labelspacing=0.25, borderpad=0, handlelength=1.4,
        )  # fmt: skip
        for words in legend.get_texts():
            words.set_parse_math(False)

    def _rows(self, waterfall: Waterfall, axes: Any, *, scale: bool) -> None:  # noqa: ANN401
        from matplotlib.collections import PolyCollection

        rows = waterfall.rows
        axes.set_ylim(max(len(rows), 1), 0)
        axes.set_yticks([])
        tick = self._end * _TICK / ((_WIDTH - _LEFT - _RIGHT) * _DPI)
        for number, kind in enumerate(waterfall.kinds):
            for waited, colour in ((False, kind.light), (True, kind.colour)):
                boxes: Any = _boxes(rows, number, tick, waited=waited)
                drawn = PolyCollection(boxes, facecolors=colour, linewidths=0)
                axes.add_collection(drawn, autolim=False)
        side = axes.get_yaxis_transform()
        style = {"va": "center", "fontsize": 6.4, "family": "DejaVu Sans Mono", "transform": side, "parse_math": False}
        for place, row in enumerate(rows):
            axes.text(-0.005, place + 0.5, _cut(self._safe(_label(row)), _NAME), ha="right", color=_INK, **style)
            if row.waited:
                axes.text(1.004, place + 0.5, f"{row.waited:,.1f} ms", ha="left", color=_FAINT, **style)
        if scale:
            if waterfall.run:
                note = "dark: its reader waited; light: it was there"
                self._text(0.15, (_AXIS - _LINE) / 2, note, fontsize=_SMALL, color=_FAINT)
            axes.tick_params(labelbottom=True, bottom=True)
            seconds = self._end >= 2000
            axes.xaxis.set_major_formatter(lambda at, _: f"{at / 1000:g} s" if seconds else f"{at:g} ms")


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.0f} ms"


_LEGENDS: Final = 8
"""Lines of a legend that there is room for."""


def _boxes(rows: Sequence[Row], kind: int, tick: float, *, waited: bool) -> np.ndarray[Any, Any]:
    """The corners of each mark of a kind: (marks, 4, 2). What was waited for is as wide as that took."""
    found = []
    for place, row in enumerate(rows):
        marks = row.marks[(row.marks["kind"] == kind) & ((row.marks["waited"] > 0) == waited)]
        left, right = marks["at"], marks["at"] + np.maximum(marks["waited"], tick)
        top, bottom = np.full(len(marks), place + 0.12), np.full(len(marks), place + 0.88)
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        found.append(np.array(corners).transpose(2, 0, 1))
    return np.concatenate(found) if found else np.zeros((0, 4, 2))


def _label(row: Row) -> str:
    return f"{row.name} ({row.files:,} files)" if row.path.endswith(b"/") else row.name


def _cut(words: str, length: int) -> str:
    """The end of a word that is too long: of a path that tells most."""
    return words if len(words) <= length else "…" + words[1 - length :]


def _safe() -> Callable[[str], str]:
    """Writes characters that the font does not have as their numbers, so that names stay different."""
    import matplotlib as mpl
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(Path(mpl.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf")))
    return lambda words: "".join(c if font.get_char_index(ord(c)) else f"\\u{{{ord(c):x}}}" for c in words)
