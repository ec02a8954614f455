"""What bounds a step of a simulated engine. Values."""

from dataclasses import dataclass
from typing import Literal

from vllm_llmd.errors import ConfigError

EnginePolicy = Literal["fcfs", "priority"]
"""Who goes first: whoever came first, or whose `priority` is least."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds a step. A run is of at most `run_steps`; 1 makes every step one of its own.

    Sources are asked only for at least `min_order_tokens`.
    """

    block_size: int = 16
    blocks: int = 8192
    offload_blocks: int = 0
    max_sequences: int = 256
    token_budget: int = 8192
    policy: EnginePolicy = "fcfs"
    run_steps: int = 1
    min_order_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("block_size", "blocks", "max_sequences", "token_budget", "run_steps", "min_order_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.offload_blocks < 0:
            raise ConfigError(f"offload_blocks must be at least 0; got {self.offload_blocks}")

    @property
    def max_tokens(self) -> int:
        """More than that, prompt and answer together, can never be computed."""
        return self.blocks * self.block_size

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
