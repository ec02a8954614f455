"""Reads a trace of requests, in the form that the Mooncake project publishes. Pure: lines in, requests out.

One JSON object a line: `timestamp` in ms, `input_length` and `output_length` in tokens, and `hash_ids`, which name the
prompt's successive blocks of 512 tokens, equal where two prompts are equal so far; the last block may be partial.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt

from vllm_llmd.errors import ConfigError
from vllm_llmd.router.slo import NOTHING, Wish
from vllm_llmd.simulate.settings import Slo

HASHED_TOKENS: Final = 512
"""Tokens that one hash id stands for."""

IDS: Final = 1 << 31
"""Hash ids are less; token ids from here on are those of answers."""

Tokens = npt.NDArray[np.uint32]
"""Token ids, shape (n,)."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: when it comes, how long prompt and answer are, and what the prompt is.

    `most_tokens` is the bound that the client sets on the answer, `wish` what it says in headers; traces tell neither.
    To count as good it has to keep `slo`, None if it is what all have to.
    """

    at_ms: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: Sequence[int]
    most_tokens: int | None = None
    wish: Wish = NOTHING
    slo: Slo | None = None

    def prompt(self) -> Tokens:
        """Token ids that are equal where the hash ids are: the token ids of a block are its hash id.

        Chained block names of any size follow from them, as they do from a client's.
        """
        ids = np.asarray(self.hash_ids, np.uint32)
        return np.repeat(ids, HASHED_TOKENS)[: self.prompt_tokens]

    def answer(self, number: int) -> Tokens:
        """Token ids of the answer to the request of that number, unlike all others."""
        return np.full(self.output_tokens, IDS + number % IDS, np.uint32)


_Count = Annotated[int, msgspec.Meta(ge=1)]
_HashId = Annotated[int, msgspec.Meta(ge=0, lt=IDS)]


class _Line(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: _Count
    output_length: _Count
    hash_ids: list[_HashId]


_decoder = msgspec.json.Decoder(_Line)


def read_trace(lines: Iterable[bytes], name: str) -> list[TraceRequest]:
    """The requests in order of arrival; `name` says in errors where the lines are from. Raises ConfigError."""
    requests = [_request(line, f"{name}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise ConfigError(f"{name} has no requests: it must have one JSON object a line")
    return sorted(requests, key=lambda request: request.at_ms)


def _request(raw: bytes, where: str) -> TraceRequest:
    try:
        line = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f'{where}: {error}; write {{"timestamp": ms, "input_length": tokens, "output_length": tokens, '
            f'"hash_ids": [an id per {HASHED_TOKENS} tokens of the prompt]}}, or take the line out'
        ) from None
    blocks = -(-line.input_length // HASHED_TOKENS)
    if len(line.hash_ids) != blocks:
        raise ConfigError(
            f"{where}: input_length {line.input_length} needs {blocks} hash_ids, one per {HASHED_TOKENS} tokens; "
            f"got {len(line.hash_ids)}: correct either, or take the line out"
        )
    return TraceRequest(line.timestamp, line.input_length, line.output_length, line.hash_ids)


def as_line(request: TraceRequest) -> bytes:
    """The request as a line of a trace."""
    line = _Line(request.at_ms, request.prompt_tokens, request.output_tokens, list(request.hash_ids))
    return msgspec.json.encode(line)
