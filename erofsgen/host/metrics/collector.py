"""The table of metrics as prometheus_client wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final, cast

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from erofsgen.host.metrics.families import FAMILIES, Family
from erofsgen.host.metrics.gather import Facts

_KINDS: Final = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}


class TableCollector:
    """Collects what ``gather`` finds. Metrics that have nothing to say come without samples."""

    def __init__(self, gather: Callable[[], Facts]) -> None:
        self._gather = gather

    def collect(self) -> Iterator[Metric]:
        """All metrics of the table."""
        facts = self._gather()
        for family in FAMILIES:
            yield _metric(family, facts)


def _metric(family: Family, facts: Facts) -> Metric:
    metric: Any = _KINDS[family.kind](family.name, family.help, labels=family.labels)
    for labels, value in family.samples(facts):
        values = [_plain(label) for label in labels]
        if isinstance(value, Mapping):
            metric.add_metric(values, *_buckets(value))
        else:
            metric.add_metric(values, value)
    return cast(Metric, metric)


def _buckets(value: Mapping[str, Any]) -> tuple[list[tuple[str, float]], float]:
    """Buckets by their upper end, each with all that are below it; and the sum."""
    bounds = [*(str(bound) for bound in value["le"]), "+Inf"]
    return list(zip(bounds, map(float, accumulate(value["counts"])), strict=True)), value["sum"]


def _plain(label: str) -> str:
    """Text that UTF-8 can have."""
    return label.encode("utf-8", "replace").decode()
