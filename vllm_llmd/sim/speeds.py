"""How long an engine's steps and transfers take. Pure arithmetic; milliseconds out."""

from dataclasses import dataclass

from vllm_llmd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """The defaults follow from sizes: a model of 8 billion parameters in 16 bits on one H100. They are not measured.

    A step takes `step_ms`, and more for each prompt token computed (and each 1,000 tokens that it looks back at), for
    each sequence that decodes, and for each 1,000 tokens that those look back at. `request_ms` is what a request takes
    of the engine's processor beside its tokens, in the step that admits it: none where servers have cores of their own.
    """

    step_ms: float = 6.0
    prefill_us_per_token: float = 40.0
    prefill_us_per_token_per_1k_context: float = 1.2
    decode_us_per_sequence: float = 30.0
    decode_us_per_1k_context: float = 45.0
    request_ms: float = 0.0
    kv_bytes_per_token: int = 131_072
    transfer_gb_per_s: float = 25.0
    transfer_latency_ms: float = 1.0
    offload_gb_per_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("step_ms", "transfer_gb_per_s", "offload_gb_per_s", "kv_bytes_per_token"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0; got {getattr(self, name)}")

    def work_ms(self, work: "Work") -> float:
        """How long a step takes that does all of `work`."""
        return (
            self.step_ms
            + work.prefill_tokens * self.prefill_us_per_token / 1e3
            + work.prefill_token_contexts * self.prefill_us_per_token_per_1k_context / 1e6
            + work.decoding * self.decode_us_per_sequence / 1e3
            + work.decode_context * self.decode_us_per_1k_context / 1e6
            + work.requests * self.request_ms
        )

    def growth_ms(self, decoding: int) -> float:
        """By how much a step that only decodes is longer than the one before it."""
        return decoding * self.decode_us_per_1k_context / 1e6

    def transfer_ms(self, tokens: int) -> float:
        """From engine to engine."""
        return self.transfer_latency_ms + tokens * self.kv_bytes_per_token / self.transfer_gb_per_s / 1e6

    def reload_ms(self, tokens: int) -> float:
        """From the offload tier."""
        return tokens * self.kv_bytes_per_token / self.offload_gb_per_s / 1e6


@dataclass(slots=True)
class Work:
    """What one step computes. A prompt token's context are the tokens before it; `decode_context` is summed up.

    `requests` are those that it admits.
    """

    prefill_tokens: int = 0
    prefill_token_contexts: float = 0.0
    decoding: int = 0
    decode_context: int = 0
    requests: int = 0

    def prefill(self, computed: int, tokens: int) -> None:
        """So many prompt tokens, after `computed` ones."""
        self.prefill_tokens += tokens
        self.prefill_token_contexts += tokens * (computed + tokens / 2)

    def decode(self, computed: int) -> None:
        """One token of a sequence, after `computed` ones."""
        self.decoding += 1
        self.decode_context += computed
