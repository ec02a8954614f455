"""What a destination orders of a source, and when the KV has come. Pure arithmetic, on a clock and in simulation."""

from dataclasses import dataclass

from vllm_llmd.sim.speeds import Speeds


@dataclass(frozen=True, slots=True)
class Transfer:
    """`tokens` ordered at `asked_ms`, which the source computes in chunks of at most `chunk_tokens`."""

    asked_ms: float
    tokens: int
    chunk_tokens: int

    def here_ms(self, computed_ms: float, speeds: Speeds) -> float:
        """When all of it has come, if the source has computed it by `computed_ms`.

        The last chunk travels after that, and all of it no faster than the wire.
        """
        last_chunk_ms = speeds.transfer_ms(min(self.tokens, self.chunk_tokens))
        return max(computed_ms + last_chunk_ms, self.asked_ms + speeds.transfer_ms(self.tokens))


def order_tokens(end_token: int, block_size: int) -> int:
    """How long a prompt the source is sent for the KV of the first `end_token` tokens.

    A source that has whole blocks of it cached still computes its last token: one more makes that one nobody wants.
    """
    return end_token + (end_token % block_size == 0)
