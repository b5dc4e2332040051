"""Profiles and traces as bytes: what goes in comes out, and what is damaged is said to be; how profiles are merged."""

from __future__ import annotations

import math
import random

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from profilekit import PACKS, facts, profile_of, profiles

from erofsgen.errors import FormatError
from erofsgen.profile import profile as formats
from erofsgen.profile import trace as traces
from erofsgen.profile.profile import RECORDED, ROW, RUNS, Profile, decode, merge
from erofsgen.profile.trace import BROUGHT, TOUCH, Trace

quick = settings(max_examples=40, deadline=None)


@quick
@given(profiles(least=0, reasons=3))
def test_a_profile_comes_back(profile: Profile):
    data = profile.encode()
    again = decode(data, "it")
    assert (again.command, again.runs, list(again.packs), list(again.reasons)) == (
        profile.command, profile.runs, list(profile.packs), list(profile.reasons)
    )  # fmt: skip
    assert again.rows.tobytes() == profile.rows.tobytes()
    assert again.encode() == data
    assert again.size == sum(int(row["length"]) for row in profile.rows)
    assert again.recorded == (profile.runs > 0)


def rows_of(dtype: np.dtype, limits: dict[str, int]) -> st.SearchStrategy[np.ndarray]:
    """Any rows whose numbers are below the limits."""

    def rows(seed: int, count: int) -> np.ndarray:
        raw = random.Random(seed).randbytes(count * dtype.itemsize)
        table = np.frombuffer(raw, dtype).copy()
        for name, limit in limits.items():
            table[name] %= limit
        if "used" in (dtype.names or ()):
            table["used"] = table["judged"] = table["at"] % 2
        return table

    return st.builds(rows, st.integers(0, 1 << 32), st.integers(0, 30))


a_trace = st.builds(
    Trace,
    image=st.just("sha256:" + "7" * 64),
    command=st.text(max_size=50),
    plane=st.sampled_from(["fanotify", "fuse"]),
    started=st.floats(0, 4e9),
    complete=st.booleans(),
    packs=st.just(PACKS[:3]),
    processes=st.just([(1, "python3"), (77, "größe")]),
    sources=st.just(["host cache", "unknown", "s3://b"]),
    touches=rows_of(TOUCH, {"pack": 3, "process": 2, "source": 3}),
    reasons=st.just(["recorded", "imports"]),
    brought=rows_of(BROUGHT, {"pack": 3, "source": 3, "reason": 2}),
)


@quick
@given(a_trace)
def test_a_trace_comes_back(trace: Trace):
    again = traces.decode(trace.encode(), "it")
    for name in Trace.__dataclass_fields__:
        one, other = getattr(trace, name), getattr(again, name)
        assert one.tobytes() == other.tobytes() if isinstance(one, np.ndarray) else one == other, name


# --- what is hostile -------------------------------------------------------------------------------------------------


def packed(magic: bytes, content: object) -> bytes:
    return magic + zstandard.ZstdCompressor().compress(msgspec.msgpack.encode(content))


def a_row(**values: object) -> bytes:
    row = np.zeros(1, ROW)
    row["length"] = 1
    for name, value in values.items():
        row[name] = value
    return row.tobytes()


P = formats.MAGIC
BAD_PROFILES = [
    b"",
    P,
    b"EGPROF2\0" + bytes(50),
    P + zstandard.ZstdCompressor(write_content_size=False).compress(b"x"),
    P + zstandard.ZstdCompressor().compress(bytes(formats.LIMIT + 1)),
    P + b"\x28\xb5\x2f\xfd" + b"\xff" * 20,
    packed(P, None),
    packed(P, ["c", 1, [], []]),
    packed(P, ["c", 1, [], [], "text"]),
    packed(P, ["c" * 201, 1, [], [], b""]),
    packed(P, ["c", -1, [], [], b""]),
    packed(P, ["c", RUNS + 1, [], [], b""]),
    packed(P, ["c", 1 << 63, [], [], b""]),
    packed(P, ["c", 1, ["../../etc/passwd"], [], b""]),
    packed(P, ["c", 1, PACKS[:1] * 2, [], b""]),
    packed(P, ["c", 1, [f"{number:064x}" for number in range(1 << 16)], [], b""]),
    packed(P, ["c", 1, [], ["r"] * 300, b""]),
    packed(P, ["c", 1, PACKS, [RECORDED], b"12345"]),
    packed(P, ["c", 1, PACKS, [RECORDED], a_row(pack=5)]),
    packed(P, ["c", 1, PACKS, [RECORDED], a_row(reason=1)]),
    packed(P, ["c", 1, PACKS, [], a_row()]),
    packed(P, ["c", 1, PACKS, [RECORDED], a_row(length=0)]),
    packed(P, ["c", 1, PACKS, [RECORDED], a_row(seen=math.nan)]),
    packed(P, ["c", 1, PACKS, [RECORDED], a_row(seen=math.inf)]),
    packed(P, ["c", 1, PACKS, [RECORDED], a_row(seen=-1)]),
    packed(P, ["c", 1, PACKS, [RECORDED], a_row(seen=3e38)]),
]


@pytest.mark.parametrize("data", BAD_PROFILES, ids=range(len(BAD_PROFILES)))
def test_a_damaged_profile_is_refused(data: bytes):
    with pytest.raises(FormatError, match=r"^it: ") as caught:
        decode(data, "it")
    assert "\n" not in str(caught.value)


GOOD = [profile_of([(0, 3, 100, b"12345678", 5, 1.0), (2, 9, 4096, bytes(8), 7, 0.5)]).encode()]
GOOD_TRACE = Trace("sha256:" + "0" * 64, "c", "fuse", 1.0, True, PACKS, [(1, "x")], ["s"], np.zeros(3, TOUCH)).encode()


@quick
@given(st.sampled_from([*GOOD, GOOD_TRACE]), st.data())
@example(b"", None)
def test_whatever_happens_to_bytes_is_a_format_error(data: bytes, choose):
    """Damage of the packed bytes, and of what is packed."""
    if choose is not None and choose.draw(st.booleans()):
        inner = bytearray(zstandard.ZstdDecompressor().decompress(data[8:]))
        for _ in range(choose.draw(st.integers(1, 4))):
            inner[choose.draw(st.integers(0, len(inner) - 1))] = choose.draw(st.integers(0, 255))
        data = data[:8] + zstandard.ZstdCompressor().compress(bytes(inner[: choose.draw(st.integers(1, len(inner)))]))
    elif choose is not None:
        broken = bytearray(data)
        broken[choose.draw(st.integers(0, len(data) - 1))] ^= choose.draw(st.integers(1, 255))
        data = bytes(broken[: choose.draw(st.integers(0, len(broken)))])
    for read in (decode, traces.decode):
        try:
            found = read(data, "it")
        except FormatError:
            continue
        if isinstance(found, Profile):  # what is taken can be used
            assert (found.confidence() <= 1).all()
            decode(found.merged(found).encode(), "again")


@quick
@given(st.binary(max_size=200))
def test_bytes_of_others_are_no_profile(data: bytes):
    for magic, read in ((b"", decode), (P, decode), (traces._MAGIC, traces.decode)):
        with pytest.raises(FormatError):
            read(magic + data, "it")


BAD_TRACES = [
    ["image", "c", "fuse", 1.0, True, [], [], [], [], b"", b""],
    ["sha256:" + "0" * 64, "c", "fuse", 1.0, True, [], [], ["s"], [], np.zeros(1, TOUCH).tobytes(), b""],
    ["sha256:" + "0" * 64, "c", "fuse", 1.0, True, PACKS, [(1, "x")], [], [], np.zeros(1, TOUCH).tobytes(), b""],
    ["sha256:" + "0" * 64, "c", "fuse", 1.0, True, PACKS, [], ["s"], [], np.zeros(1, TOUCH).tobytes(), b""],
    ["sha256:" + "0" * 64, "c", "fuse", 1.0, True, PACKS, [], ["s"], [], b"", np.zeros(1, BROUGHT).tobytes()],
    ["sha256:" + "0" * 64, "c", "fuse", 1.0, True, PACKS, [], [""] * 300, [], b"", b""],
]


@pytest.mark.parametrize("content", BAD_TRACES, ids=range(len(BAD_TRACES)))
def test_a_damaged_trace_is_refused(content: list):
    with pytest.raises(FormatError, match=r"^it: "):
        traces.decode(packed(traces._MAGIC, content), "it")


# --- merging ---------------------------------------------------------------------------------------------------------


@quick
@given(profiles(), profiles())
def test_the_order_of_two_does_not_matter(one: Profile, other: Profile):
    here, there = one.merged(other), other.merged(one)
    assert here.runs == there.runs
    assert facts(here).keys() == facts(there).keys()
    for place, found in facts(here).items():
        again = facts(there)[place]
        assert found[0] == again[0]
        assert abs(found[1] - again[1]) <= 1
        assert found[2] == pytest.approx(again[2], abs=1e-5)
        assert found[3] == again[3]


@quick
@given(st.lists(profiles(), min_size=1, max_size=8))
def test_runs_are_bounded_and_rows_in_order(several: list[Profile]):
    merged = merge(several)
    assert merged is not None
    assert merged.runs == min(RUNS, sum(profile.runs for profile in several))
    assert (merged.confidence() >= 0).all()
    assert (merged.confidence() <= 1).all()
    assert (merged.rows["seen"] <= merged.runs).all()
    assert (np.diff(merged.rows["first"].astype(np.int64)) >= 0).all()
    assert len(facts(merged)) == len(merged.rows), "each place once"
    assert facts(merged).keys() <= {place for profile in several for place in facts(profile)}
    assert decode(merged.encode(), "it").encode() == merged.encode()


@quick
@given(profiles(8), profiles(8))
def test_what_few_runs_touch_is_less_sure(one: Profile, other: Profile):
    merged = one.merged(other)
    for place, (_, first, seen, _) in facts(merged).items():
        both = [found[place] for found in (facts(one), facts(other)) if place in found]
        assert seen == pytest.approx(min(sum(known[2] for known in both), merged.runs), rel=1e-5, abs=1e-5)
        assert min(known[1] for known in both) - 1 <= first <= max(known[1] for known in both) + 1
        assert any(known[3] == facts(merged)[place][3] for known in both)


def test_a_known_digest_stays():
    without, with_digest = (profile_of([(0, 1, 10, digest, 0, 1)]) for digest in (bytes(8), b"12345678"))
    for merged in (without.merged(with_digest), with_digest.merged(without)):
        assert merged.rows["digest"][0].tobytes() == b"12345678"


def test_old_runs_fade():
    """A chunk that no run touches any more is forgotten; one that all touch stays sure."""
    profile = profile_of([(0, 1, 10, bytes(8), 0, 1), (0, 2, 10, bytes(8), 0, 1)])
    lasting = profile_of([(0, 1, 10, bytes(8), 0, 1)])
    for _ in range(30):
        profile = profile.merged(lasting)
    assert profile.confidence().tolist() == pytest.approx([1.0, 0.03], abs=0.01)
    for _ in range(50):
        profile = profile.merged(lasting)
    assert len(profile.rows) == 1


def test_profiles_of_too_many_packs_do_not_merge():
    one, other = (
        Profile("app", 1, [f"{first + number:064x}" for number in range(40_000)], [RECORDED], np.zeros(0, ROW))
        for first in (0, 40_000)
    )
    with pytest.raises(FormatError, match="80000 packs"):
        one.merged(other)
    assert merge([]) is None
