"""The metrics of stock engines. Reads what the events thread and the polls have counted, when scraped."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from vllm_llmd.router.stock.fleet import StockFleet


class StockCollector(Collector):
    """Counters since the router's start."""

    def __init__(self, stock: StockFleet) -> None:
        self._stock = stock

    def collect(self) -> Iterator[CounterMetricFamily]:
        taken = CounterMetricFamily("vllm_llmd_stock_messages", "Messages of events taken in", labels=["engine"])
        resets = CounterMetricFamily(
            "vllm_llmd_stock_gaps", "Gaps in the events, and new lives, by how they ended", labels=["engine", "end"]
        )
        unused = CounterMetricFamily(
            "vllm_llmd_stock_unused", "What came and could not be used", labels=["engine", "what"]
        )
        for engine, stream in self._stock.streams:
            counts, tally = stream.counts, stream.follower.tally
            taken.add_metric([engine], counts.messages)
            for end, count in (
                ("closed", counts.gaps_closed),
                ("cleared", counts.gaps_cleared),
                ("restart", counts.restarts),
            ):
                resets.add_metric([engine, end], count)
            for what, count in (
                ("malformed message", counts.misshapen + tally.malformed),
                ("unknown event", tally.unknown),
                ("event of an unknown tier", tally.other_tier),
                ("event of another cache group", tally.other_group),
                ("event of another block size", tally.other_size),
                ("block without a known parent", tally.unnamed),
            ):
                unused.add_metric([engine, what], count)
        yield from (taken, resets, unused)
        failed = CounterMetricFamily(
            "vllm_llmd_stock_polls_failed", "Questions that got no good answer in time", labels=["http", "what"]
        )
        for (http, what), count in self._stock.polls_failed.items():
            failed.add_metric([http, what], count)
        yield failed
