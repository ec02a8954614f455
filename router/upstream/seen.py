"""What a request found when it was placed, and what came of it: what engine models learn from. Values only."""

from dataclasses import dataclass

from vllm_llmd.router.upstream.usage import Usage


@dataclass(frozen=True)
class Seen:
    """At its destination: `batch` requests that ran, `waiting` ones, `tokens` to prefill. Its own prompt has
    `prompt_tokens`, of which `cached_tokens` were expected to be there, `offloaded_tokens` of them not on the GPU.
    """

    batch: float
    waiting: float
    tokens: float
    prompt_tokens: float
    cached_tokens: float
    offloaded_tokens: float = 0.0


@dataclass(frozen=True)
class Measured:
    """Since it was sent to the engine: when its first byte came, and its last. `usage` is what the engine counted.

    Of an answer that is no stream the first byte comes when all is done.
    """

    first_byte_ms: float
    last_byte_ms: float
    is_stream: bool
    usage: Usage | None

    @property
    def tpot_ms(self) -> float | None:
        """Per token after the first; None where that is not known, or there is none."""
        tokens = None if self.usage is None else self.usage.completion_tokens
        return (self.last_byte_ms - self.first_byte_ms) / (tokens - 1) if tokens is not None and tokens > 1 else None
