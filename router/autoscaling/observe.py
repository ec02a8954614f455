"""The metrics by which a fleet is scaled: what is wanted, why, and what is asked for. Computed when scraped."""

from collections.abc import Iterator
from typing import Final, get_args

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from vllm_llmd.router.autoscaling.scaling import Bound
from vllm_llmd.router.fleet import Fleet

LABELS: Final = ("model", "role")

OBJECTIVES: Final = ("ttft", "tpot", "memory")


class ReplicasCollector(Collector):
    """One series for each pool of engines."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[GaugeMetricFamily]:
        of_pool = [
            _family("vllm_llmd_desired_replicas", "Engines that it takes to keep the objectives"),
            _family("vllm_llmd_pool_engines", "Engines that are ready, or about to be, and not draining"),
            _family("vllm_llmd_demand_requests_per_second", "Requests that the pool is asked for"),
            _family("vllm_llmd_demand_prefill_tokens_per_second", "Prompt tokens that it has to compute"),
            _family("vllm_llmd_demand_output_tokens_per_second", "Tokens of answers that it is asked for"),
            _family("vllm_llmd_demand_sequences", "Answers under way at a time with the desired replicas"),
            _family("vllm_llmd_demand_prefill_load", "Engines that computing prompts alone keeps busy"),
        ]
        bounds = _family("vllm_llmd_desired_replicas_bound", "1 for what decides the desired replicas", "bound")
        misses = _family(
            "vllm_llmd_expected_slo_misses", "Share of requests that the desired replicas let miss it", "objective"
        )
        for plan in self._fleet.plans():
            pool = [plan.model, plan.role]
            figures = (
                plan.desired.replicas,
                plan.engines,
                plan.requests_per_s,
                plan.prefill_tokens_per_s,
                plan.output_tokens_per_s,
                plan.desired.sequences,
                plan.demand.prefill_load,
            )
            for family, figure in zip(of_pool, figures, strict=True):
                family.add_metric(pool, figure)
            for bound in get_args(Bound):
                bounds.add_metric([*pool, bound], float(plan.desired.bound == bound))
            for objective in OBJECTIVES:
                misses.add_metric([*pool, objective], getattr(plan.desired.misses, objective))
        yield from (*of_pool, bounds, misses)


def _family(name: str, text: str, *more: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=(*LABELS, *more))
