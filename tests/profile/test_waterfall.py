"""Whatever a run was, there is a picture of it: what it shows adds up, and names in it are never more than names."""

from __future__ import annotations

import builtins
import json
import shutil
import stat
import struct
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import sampletree
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from erofsgen.erofs.reader import Index
from erofsgen.erofs.tree import CHUNK_DTYPE, Device, Inode
from erofsgen.erofs.writer import write_index
from erofsgen.errors import StorageError, UnsupportedError, UsageError
from erofsgen.profile import html, png
from erofsgen.profile.chunks import BLOCK, Chunks
from erofsgen.profile.listing import chunk_lines, file_lines
from erofsgen.profile.profile import RECORDED, ROW, Profile, ordered
from erofsgen.profile.rows import fold
from erofsgen.profile.touches import parts, prefetched, totals
from erofsgen.profile.trace import BROUGHT, HERE, TOUCH, UNKNOWN, Trace, decode
from erofsgen.profile.waterfall import Waterfall, of_profile, of_trace

EVIL = b"</script><script>alert(1)</script><b onload='x'>&amp;\"$x^2$"
STORE, TIER = "s3://bucket/store", "http://tier:8080/</title><i>"
PACKS = [f"{number:064x}" for number in (1, 2)]


@pytest.fixture(scope="module")
def chunks() -> Chunks:
    """Two packs: a large file of eight chunks, three small ones in a block's distance, names of all kinds."""
    disks = sampletree.Disks(64, 64, chunk_size=4 * BLOCK)
    root = sampletree.directory(
        {
            b"large": disks.file(32 * BLOCK, *((1, 4 * number) for number in range(8))),
            b"usr": sampletree.directory(
                {
                    EVIL.replace(b"/", b"|"): disks.file(100, (2, 0)),
                    b"\xff\x1b[2J\n": disks.file(BLOCK, (2, 1)),
                    "漢字 é".encode(): disks.file(4 * BLOCK, (2, 2)),
                }
            ),
        }
    )
    return Chunks(Index(disks.write(root)))


def trace_of(touches: list[tuple], brought: list[tuple] = [], **fields) -> Trace:  # noqa: B006  (only read)
    given = {
        "image": "sha256:" + "0" * 64, "command": "serve", "plane": "fanotify", "started": 1.8e9, "complete": True,
        "packs": PACKS, "processes": [(1, "python")], "sources": [HERE, UNKNOWN, STORE, TIER],
        "reasons": ["recorded", "loader"],
    }  # fmt: skip
    return Trace(**given | fields, touches=np.array(touches, TOUCH), brought=np.array(brought, BROUGHT))


@pytest.fixture
def run() -> Trace:
    """Waits for the large file's begin, and for a range of all that is small; what else it touches was prefetched."""
    return trace_of(
        [
            (5, 20_000, 0, 0, 8 * BLOCK, 0, 2),
            (30, 3_000, 1, 0, 6 * BLOCK, 0, 3),
            (40, 0, 0, 8 * BLOCK, BLOCK, 0, 2),
            (50, 0, 0, 16 * BLOCK, 10, 0, 0),
            (60, 500, 0, 24 * BLOCK, BLOCK, 0, 2),
            (70, 0, 0, 60 * BLOCK, BLOCK, 0, 0),
        ],
        [
            (20, 0, 1, 8 * BLOCK, 4 * BLOCK, 2, 0, True, True),
            (60, 0, 3, 24 * BLOCK, 4 * BLOCK, 2, 1, True, True),
            (90, 1, 0, 6 * BLOCK, 9 * BLOCK, 2, 1, False, True),
        ],
    )


def kinds(waterfall: Waterfall) -> list[str]:
    return [kind.name for kind in waterfall.kinds]


def test_what_a_run_was(run, chunks):
    sums = totals(run)
    assert (sums.touches, sums.misses, sums.waited) == (6, 3, 0.0235)
    assert (sums.prefetched_touches, sums.prefetched, sums.unused) == (2, 17 * BLOCK, 9 * BLOCK)
    assert [(one.name, one.touches, one.misses) for one in sums.sources] == [(HERE, 2, 0), (STORE, 3, 2), (TIER, 1, 1)]
    assert [(one.name, one.bytes, one.used_bytes) for one in sums.reasons] == [
        ("recorded", 4 * BLOCK, 4 * BLOCK),
        ("loader", 13 * BLOCK, 4 * BLOCK),
    ]
    assert prefetched(run).tolist() == [False, False, True, False, True, False]

    picture = of_trace(run, chunks, title="serve", limit=10)
    large, first, second, third, pack = picture.rows
    assert (large.path, large.first, large.waited, large.size) == (b"large", 5, 20.5, 10 * BLOCK + 10)
    # one touch of three files: the one that most of it belongs to waited
    assert [row.waited for row in (first, second, third)] == [0, 3, 0]
    assert [row.size for row in (first, second, third)] == [100, 4 * BLOCK, BLOCK]
    assert (pack.path, pack.size) == (b"pack 000000000000", BLOCK)
    assert [kinds(picture)[kind] for kind in large.marks["kind"]] == [
        STORE, f"prefetched from {STORE}", HERE, f"prefetched from {STORE}",
    ]  # fmt: skip
    assert picture.touched.total.tolist()[-1] == 17 * BLOCK + 10
    assert (picture.last, picture.end) == (70, 90)
    assert [row.path for row in of_trace(run, None, title="", limit=9).rows] == [b"pack 000000000000"] * 2


def test_two_files_stand_for_themselves_and_the_others_for_their_directory(run, chunks):
    rows = of_trace(run, chunks, title="", limit=3).rows
    assert [(row.name, row.files) for row in rows] == [("large", 1), ("usr/", 3), ("pack 000000000000", 1)]
    assert len(rows[1].marks) == 3
    everything = of_trace(run, chunks, title="", limit=1).rows
    assert [(row.name, row.files) for row in everything] == [("/", 5)]


paths = st.lists(
    st.lists(st.sampled_from([b"a", b"b", b"lib", b"x.py"]), min_size=1, max_size=5).map(b"/".join),
    unique=True,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(paths, st.integers(1, 30), st.data())
def test_folding(paths, limit, data):
    weights = data.draw(st.lists(st.integers(1, 1 << 40), min_size=len(paths), max_size=len(paths)))
    groups, of = fold(paths, weights, limit)
    assert len(groups) == min(limit, len(paths))
    assert [group.files for group in groups] == np.bincount(of, minlength=len(groups)).tolist()
    for path, number in zip(paths, of.tolist(), strict=True):
        group = groups[number]
        inside = group.path == b"/" or path.startswith(group.path)
        assert inside if group.path.endswith(b"/") else group == (path, 1)
    if len(paths) > limit > 1:
        # what weighs more than a share of it all is never hidden
        for path, weight in zip(paths, weights, strict=True):
            if weight * 2 > sum(weights) and path.count(b"/") < limit - 1:
                assert (path, 1) in groups


def numbers(limit: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(0, min(limit, 300)), st.integers(0, limit))


words = st.one_of(
    st.sampled_from([HERE, UNKNOWN, STORE, EVIL.decode(), "\x1b\x00\n"]),
    st.text(st.characters(codec="utf-8"), max_size=8),
)
u4 = numbers(0xFFFFFFFF)
offsets = st.one_of(st.integers(0, 70 * BLOCK), st.integers(0, (1 << 64) - 1))


@st.composite
def traces(draw) -> Trace:
    packs = draw(st.lists(st.sampled_from([*PACKS, "f" * 64]), unique=True, min_size=1))
    sources, reasons = (draw(st.lists(words, unique=True, min_size=1, max_size=4)) for _ in range(2))
    pack, source = st.integers(0, len(packs) - 1), st.integers(0, len(sources) - 1)
    reason = st.integers(0, len(reasons) - 1)
    touches = draw(st.lists(st.tuples(u4, u4, pack, offsets, u4, st.just(0), source), max_size=30))
    brought = draw(
        st.lists(st.tuples(u4, pack, u4, offsets, u4, source, reason, st.booleans(), st.booleans()), max_size=30)
    )
    return trace_of(
        touches, brought, packs=packs, sources=sources, reasons=reasons, command=draw(words), plane=draw(words),
        started=draw(st.floats()), complete=draw(st.booleans()),
    )  # fmt: skip


class Page(HTMLParser):
    """A page's tags, and its text by the tag it is in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]


OURS = {
    "html", "head", "meta", "title", "style", "body", "h1", "div", "dl", "dt", "dd", "table", "tr", "th", "td", "input",
    "label", "select", "option", "button", "span", "ul", "li", "i", "b", "br", "svg", "g", "path", "script",
}  # fmt: skip


def checked(text: str, rows: int) -> Page:
    """A page that is whole, and of nothing but our tags."""
    text.encode()
    page = Page(text)
    assert set(page.tags) <= OURS
    assert page.tags.count("script") == 2
    assert page.tags.count("g") == rows
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    data = json.loads(page.of("script")[0])
    assert len(data["marks"]) == len(data["waited"]) == len(data["bytes"]) == rows
    assert all(kind < len(data["kinds"]) for marks in data["marks"] for _, _, _, kind in marks)
    return page


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(traces(), st.booleans(), st.integers(1, 8), words)
@example(trace_of([]), True, 5, "")
def test_any_run_has_a_page(chunks, trace, with_chunks, limit, title):
    picture = of_trace(trace, chunks if with_chunks else None, title=title, limit=limit)
    assert len(picture.rows) <= limit
    assert sum(row.waited for row in picture.rows) == pytest.approx(trace.touches["waited"].sum(dtype=float) / 1000)
    assert [row.first for row in picture.rows] == sorted(row.first for row in picture.rows)
    assert picture.end >= picture.last >= max(trace.touches["at"], default=0)
    assert set(parts(trace, chunks)["touch"].tolist()) == set(range(len(trace.touches)))
    checked(html.page(picture), len(picture.rows))


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(traces(), st.booleans())
@example(trace_of([]), True)
def test_any_run_is_drawn(chunks, tmp_path_factory, trace, with_chunks):
    path = tmp_path_factory.mktemp("png") / "any.png"
    png.draw_png([("one", trace, chunks if with_chunks else None)], path)
    size_of(path)


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB\x60\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_names_are_text(run, chunks):
    page = checked(html.page(of_trace(run, chunks, title=EVIL.decode(), limit=9)), 5)
    assert page.of("h1") == page.of("title") == [EVIL.decode()]
    shown = ["".join(pair) for pair in zip(page.of("span")[:-1], page.of("span")[1:], strict=True)]
    for name in (EVIL.decode().replace("/", "|"), "\\xff\\x1b[2J\\x0a", "漢字 é"):
        assert f"usr/{name}" in shown
    assert TIER in page.of("td")
    assert any("script-src 'sha256-" in (value or "") for name, value in page.attributes if name == "content")


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_script_is_well_formed():
    script = resources.files("erofsgen.profile").joinpath("page.js")
    checked = subprocess.run(["node", "--check", str(script)], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_several_runs_share_an_axis(run, chunks, tmp_path):
    one, three = tmp_path / "one.png", tmp_path / "three.png"
    later = trace_of([(900, 0, 0, 0, 10, 0, 0)])
    png.draw_png([(EVIL.decode(), run, chunks)], one)
    png.draw_png([("none", later, None), ("漢", run, chunks), ("", run, chunks)], three)
    (width, low), (same, high) = size_of(one), size_of(three)
    assert width == same
    assert 2 * low < high < 3.2 * low
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "three.png"]
    with pytest.raises(UsageError):
        png.draw_png([], one)
    with pytest.raises(StorageError):
        png.draw_png([("", run, chunks)], tmp_path / "missing" / "x.png")


def test_without_matplotlib(run, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def refuse(name, *arguments):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UnsupportedError, match="Matplotlib is not installed") as caught:
        png.draw_png([("", run, None)], tmp_path / "x.png")
    assert caught.value.hint == "pip install 'erofsgen[plot]'"
    assert not list(tmp_path.iterdir())


def test_ten_thousand_touches(tmp_path):
    """A large start: every touch is in the page, the rows are folded, and it takes a moment only."""
    files = {b"d%d" % number: sampletree.directory({}) for number in range(50)}
    for number in range(4000):
        three = (3 * number + 1, 3 * number + 2, 3 * number + 3)
        file = Inode(stat.S_IFREG | 0o644, size=3 * BLOCK, chunks=three)
        files[b"d%d" % (number % 50)].children[b"f%d" % number] = file
    table = np.zeros(12_001, CHUNK_DTYPE)
    table["device"][1:], table["block"][1:] = 1, np.arange(12_000)
    root = sampletree.directory(files)
    chunks = Chunks(Index(bytes(write_index(root, table, [Device(PACKS[0], 12_000)], chunk_size=BLOCK))))
    generator = np.random.default_rng(1)
    rows = [(n // 4, int(w), 0, n * BLOCK, BLOCK, 0, 2) for n, w in enumerate(generator.integers(0, 900, 12_000))]
    picture = of_trace(decode(trace_of(rows, packs=PACKS[:1]).encode(), "it"), chunks, title="x", limit=html.LIMIT)
    assert len(picture.rows) == html.LIMIT
    assert sum(row.files for row in picture.rows) == 4000
    page = checked(html.page(picture), html.LIMIT)
    assert sum(len(marks) for marks in json.loads(page.of("script")[0])["marks"]) == 12_000


def profile_of(runs: int = 4) -> Profile:
    rows = [
        (0, 0, 4 * BLOCK, b"\1" * 8, 7, 4, 0),
        (0, 4, 4 * BLOCK, b"\2" * 8, 3, 1, 0),
        (1, 1, BLOCK, b"\0" * 8, 9, 0, 1),
        (1, 50, BLOCK, b"\0" * 8, 12, 0, 1),
    ]
    return Profile("serve", runs, PACKS, [RECORDED, "loader <b>"], ordered(np.array(rows, ROW)))


@pytest.mark.parametrize("runs", [0, 4])
def test_a_profile_without_a_run(chunks, tmp_path, runs):
    picture = of_profile(profile_of(runs), chunks, title="x", limit=9)
    assert [row.name for row in picture.rows] == ["large", "usr/\\xff\\x1b[2J\\x0a", "pack 000000000000"]
    assert [row.first for row in picture.rows] == [3, 9, 12]
    assert len(set(kinds(picture))) == (3 if runs else 2)
    page = checked(html.page(picture), 3)
    assert not any("waited" in text for text in page.of("span"))
    png.write_png([picture, of_profile(profile_of(), None, title="no index", limit=9)], tmp_path / "x.png")
    size_of(tmp_path / "x.png")
    nothing = Profile("", 0, [], [], np.zeros(0, ROW))
    checked(html.page(of_profile(nothing, chunks, title="", limit=9)), 0)
    assert file_lines(nothing, chunks, None) == chunk_lines(nothing, chunks, None) == []


def test_lists(chunks, run):
    lines = chunk_lines(profile_of(), chunks, run)
    assert [(line.order, line.first, line.path, line.offset, line.confidence) for line in lines] == [
        (1, 3, b"large", 4 * BLOCK, 0.25),
        (2, 7, b"large", 0, 1.0),
        (3, 9, b"usr/\xff\x1b[2J\n", 0, 0.0),
        (4, 12, b"pack 000000000000", None, 0.0),
    ]
    assert [line.last and (line.last.waited, line.last.sources) for line in lines] == [
        (0, [STORE]), (0.02, [STORE]), (0, [TIER]), None,
    ]  # fmt: skip
    files = file_lines(profile_of(), chunks, run)
    assert [(line.path, line.first, line.size, line.chunks, line.bytes) for line in files] == [
        (b"large", 3, 32 * BLOCK, 2, 8 * BLOCK),
        (b"usr/\xff\x1b[2J\n", 9, BLOCK, 1, BLOCK),
        (b"pack 000000000000", 12, None, 1, BLOCK),
    ]
    assert [line.confidence for line in files] == [0.625, 0, 0]
    assert [line.last and line.last.waited for line in files] == [0.02, 0, None]
    assert [line.last for line in file_lines(profile_of(), chunks, None)] == [None] * 3
    assert [line.path[:4] for line in chunk_lines(profile_of(), None, run)] == [b"pack"] * 4
