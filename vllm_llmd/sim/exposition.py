"""`/metrics` of a simulated engine, in vLLM's names and Prometheus' text form. Pure."""

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from vllm_llmd.sim.scheduler import Scheduler


class OrderCounts(Protocol):
    """Since start; `fallbacks` by reason."""

    placed: int
    failed: int
    fallbacks: Counter[str]


def exposition(scheduler: Scheduler, orders: OrderCounts, model: str) -> str:
    """Gauges are of this instant, counters since start."""
    counts, limits = scheduler.counts, scheduler.limits
    labels = {"model_name": model, "engine": "0"}
    lines: list[str] = []
    gauges: dict[str, float] = {
        "vllm:num_requests_running": len(scheduler.running),
        "vllm:num_requests_waiting": len(scheduler.waiting) + len(scheduler.parked),
        "vllm:kv_cache_usage_perc": 1 - scheduler.pool.free / limits.blocks,
        "vllm:llmd_orders_outstanding": len(scheduler.parked),
    }
    counters: dict[str, float] = {
        "vllm:prefix_cache_queries": counts.queried,
        "vllm:prefix_cache_hits": counts.hit,
        "vllm:external_prefix_cache_hits": counts.supplied,
        "vllm:num_preemptions": counts.preemptions,
        "vllm:prompt_tokens": counts.prompt,
        "vllm:generation_tokens": counts.generated,
        "vllm:llmd_orders": orders.placed,
        "vllm:llmd_orders_failed": orders.failed,
    }
    for name, value in gauges.items():
        lines += [f"# TYPE {name} gauge", _sample(name, labels, value)]
    for name, value in counters.items():
        lines += [f"# TYPE {name}_total counter", _sample(f"{name}_total", labels, value)]
    lines += ["# TYPE vllm:request_success_total counter"]
    lines += [_sample("vllm:request_success_total", labels | {"finished_reason": "stop"}, counts.finished_requests)]
    lines += ["# TYPE vllm:llmd_fallbacks_total counter"]
    lines += [
        _sample("vllm:llmd_fallbacks_total", labels | {"reason": reason}, count)
        for reason, count in orders.fallbacks.items()
    ]
    config = {"block_size": limits.block_size, "num_gpu_blocks": limits.blocks, "enable_prefix_caching": True}
    lines += ["# TYPE vllm:cache_config_info gauge"]
    lines += [_sample("vllm:cache_config_info", {"engine": "0"} | {key: str(v) for key, v in config.items()}, 1)]
    return "\n".join(lines) + "\n"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    said = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{said}}} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
