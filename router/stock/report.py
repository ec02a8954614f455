"""What a stock engine says of itself over HTTP: its models, its load, the size of its cache. Pure.

Of `/metrics` only a few lines are read, whichever of vLLM's or SGLang's are there.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vllm_llmd.wire import Load

_WANTED: Final = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:cache_config_info",
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "sglang:token_usage",
    "process_start_time_seconds",
)
_LINE: Final = re.compile("^(" + "|".join(map(re.escape, _WANTED)) + r")(?:\{([^}\n]*)\})? (\S+)", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Sample:
    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Scrape:
    """What one look at `/metrics` found."""

    samples: tuple[Sample, ...]

    @property
    def started_s(self) -> float | None:
        """When the engine's process began, if it says so: another time is another life."""
        return next((sample.value for sample in self.samples if sample.name == "process_start_time_seconds"), None)

    def num_blocks(self, rank: int | None) -> int | None:
        return self._config("num_gpu_blocks", rank)

    def block_size(self, rank: int | None) -> int | None:
        return self._config("block_size", rank)

    def load(self, rank: int | None) -> Load:
        """Of one data-parallel rank, or of all there is."""
        used = self._all(("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"), rank)
        free = (1 - max(used, default=0.0)) * (self.num_blocks(rank) or 0)
        return Load(
            running=int(sum(self._all(("vllm:num_requests_running", "sglang:num_running_reqs"), rank))),
            waiting=int(sum(self._all(("vllm:num_requests_waiting", "sglang:num_queue_reqs"), rank))),
            free_blocks=max(int(free), 0),
        )

    def _all(self, names: Iterable[str], rank: int | None) -> list[float]:
        return [sample.value for sample in self._of(rank) if sample.name in names]

    def _config(self, label: str, rank: int | None) -> int | None:
        told = (sample.labels.get(label, "") for sample in self._of(rank) if sample.name == "vllm:cache_config_info")
        return next((int(text) for text in told if text.isascii() and text.isdigit()), None)

    def _of(self, rank: int | None) -> Iterable[Sample]:
        return (
            sample for sample in self.samples if rank is None or sample.labels.get("engine", str(rank)) == str(rank)
        )


@dataclass(frozen=True)
class Models:
    """Names of the base model, and adapters of it."""

    names: tuple[str, ...]
    adapters: tuple[str, ...]
    max_model_len: int


def read_metrics(text: str) -> Scrape:
    """Lines that make no sense are passed over."""
    samples = []
    for name, labels, value in _LINE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        if abs(number) < float("inf"):
            samples.append(Sample(name, dict(_LABEL.findall(labels)), number))
    return Scrape(tuple(samples))


def read_models(body: Any) -> Models | None:
    """What `/v1/models` says; None if that is no list of models."""
    listed = body.get("data") if isinstance(body, dict) else None
    models = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    named = [each for each in models if isinstance(each.get("id"), str)]
    if not named:
        return None
    lengths = [each["max_model_len"] for each in named if isinstance(each.get("max_model_len"), int)]
    base, adapters = (
        tuple(each["id"] for each in named if (each.get("parent") is not None) == is_adapter)
        for is_adapter in (False, True)
    )
    return Models(base, adapters, max(lengths, default=0))
