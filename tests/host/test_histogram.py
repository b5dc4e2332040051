"""Durations by how long they are."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erofsgen.host.fill.histogram import BOUNDS, Histogram


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(st.floats(0, 100), st.sampled_from(BOUNDS)), max_size=40))
def test_every_duration_is_counted_where_it_belongs(durations: list[float]):
    histogram = Histogram()
    for seconds in durations:
        histogram.add(seconds)
    found = histogram.counts()
    ends = [*found["le"], math.inf]
    starts = [-math.inf, *found["le"]]
    assert found["counts"] == [
        sum(start < seconds <= end for seconds in durations) for start, end in zip(starts, ends, strict=True)
    ]
    assert math.isclose(found["sum"], sum(durations), abs_tol=1e-9)
