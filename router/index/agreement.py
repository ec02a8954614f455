"""Whether the token ids that this router computes are those that engines see: names compared, request by request. Pure.

A model of which too many prompts came out otherwise is no longer tokenized, until the router is started again.
"""

import logging
from array import array
from collections import Counter, deque
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from vllm_llmd.kernels.hash_chain import Names, digest, salt_of
from vllm_llmd.kernels.hash_chain_cpu import UNSALTED, chain_names

log = logging.getLogger(__name__)

LOOKED_BACK: Final = 20
"""Comparisons that a model is judged by."""

TOO_MANY: Final = 5
"""Disagreements among them after which it is not tokenized any more."""

Result = Literal["agree", "disagree"]


def prompt_names(tokens: "array[int]", block_size: int, adapter: str | None, salt: str | None) -> Names:
    """The block names of a prompt. The adapter is part of every name, the cache salt of the first block's alone."""
    digests = UNSALTED
    if adapter is not None or salt is not None:
        everywhere = [] if adapter is None else [adapter]
        digests = np.full(len(tokens) // block_size, digest(salt_of(everywhere)), np.uint64)
        digests[:1] = digest(salt_of([*everywhere, *([] if salt is None else [salt])]))
    return chain_names(np.frombuffer(tokens, np.uint32), block_size, digests=digests)


@dataclass(frozen=True)
class Guess:
    """The token ids that an engine should make of a request."""

    model: str | None
    tokens: "array[int]"
    salt: str | None


class Agreement:
    """What came of every guess. `counts` are since start."""

    def __init__(self) -> None:
        self.counts: Counter[Result] = Counter({"agree": 0, "disagree": 0})
        self._latest: dict[str | None, deque[Result]] = {}
        self._given_up: set[str | None] = set()

    def trusted(self, model: str | None) -> bool:
        """Whether it is worth while to tokenize for this model."""
        return model not in self._given_up

    def compare(self, guess: Guess, block_size: int, adapter: str | None, names: Names) -> None:
        """An engine's names for a prompt whose tokens were guessed, and the adapter that it was for."""
        alike = np.array_equal(prompt_names(guess.tokens, block_size, adapter, guess.salt), names)
        result: Result = "agree" if alike else "disagree"
        self.counts[result] += 1
        latest = self._latest.setdefault(guess.model, deque(maxlen=LOOKED_BACK))
        latest.append(result)
        if latest.count("disagree") >= TOO_MANY and self.trusted(guess.model):
            self._given_up.add(guess.model)
            log.warning(
                "model %s: %d of the latest %d prompts have other tokens at the engine than here: from now on its texts"
                " are matched as learned; see --tokenizer",
                guess.model,
                TOO_MANY,
                len(latest),
            )
