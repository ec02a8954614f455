"""Compares what the index predicted with what engines found in their caches, and decides how far each is believed.

Pure. Only too much predicted counts against an engine: too little is what text that nobody knows yet looks like, or
blocks that another request was just computing. Why the numbers are what they are: docs/decisions/0013-truth-meter.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.upstream.usage import Usage

Blocks = npt.NDArray[np.int64]
"""A number of blocks per engine, shape (engines,)."""

By = Literal["tokens", "text"]
"""What a prediction was made from: token ids, whose blocks have exact names, or text."""

WRONG_BELOW: Final = 0.5
"""Kept share of what was predicted below which predictions are wrong."""

HOLDS_ABOVE: Final = 0.8
WEIGHT: Final = 1 / 16
PROBATION: Final = 8
"""Answers by which an engine is judged once its index is fresh."""

UNSEEN_MS: Final = 60_000.0


class Trust(Enum):
    TRUSTED = "trusted"
    SUSPECT = "suspect"
    OBSERVED = "observed"


class Sign(Enum):
    WRONG = "predictions are wrong"
    HOLD = "predictions hold"
    UNSEEN = "nothing to judge by for long"


TRANSITIONS: Final[dict[tuple[Trust, Sign], Trust]] = {
    (Trust.TRUSTED, Sign.WRONG): Trust.SUSPECT,
    (Trust.SUSPECT, Sign.HOLD): Trust.TRUSTED,
    (Trust.SUSPECT, Sign.WRONG): Trust.OBSERVED,
    (Trust.OBSERVED, Sign.HOLD): Trust.TRUSTED,
    (Trust.OBSERVED, Sign.UNSEEN): Trust.SUSPECT,  # its claims, cut down, may bring it nothing to be judged by
}
"""Every change of state; a sign that is not listed for a state changes nothing. Who becomes suspect is resynced."""


@dataclass(frozen=True)
class Prediction:
    """The index claimed the first `blocks` of a prompt for an engine, after `resyncs` snapshots of this life."""

    engine: EngineId
    epoch: Epoch
    block_size: int
    blocks: int
    by: By
    resyncs: int


@dataclass(frozen=True)
class Error:
    """`tokens` predicted in excess of what was cached; negative for too few."""

    engine: EngineId
    by: By
    tokens: int


@dataclass
class Standing:
    """One life of one engine. `kept` is the share of predicted tokens that were there, lately.

    `answers` were compared; `untold` did not say how much was cached. `tells` are the kinds of answers that do.
    """

    epoch: Epoch
    state: Trust = Trust.TRUSTED
    kept: float = 1.0
    resyncs: int = 0
    suspect_until_resync: int = 0
    probation: list[float] = field(default_factory=list)
    judged_ms: float = 0.0
    answers: int = 0
    untold: int = 0
    tells: set[str] = field(default_factory=set)


class Truth:
    """One standing per engine. Engines that have become suspect wait in `to_resync`."""

    def __init__(self) -> None:
        self._standings: dict[EngineId, Standing] = {}
        self._observed: set[EngineId] = set()
        self.to_resync: set[EngineId] = set()

    def joined(self, engine: EngineId, epoch: Epoch) -> None:
        """A new life: nothing is held against it."""
        self.left(engine)
        self._standings[engine] = Standing(epoch)

    def left(self, engine: EngineId) -> None:
        self._standings.pop(engine, None)
        self._observed.discard(engine)
        self.to_resync.discard(engine)

    def resynced(self, engine: EngineId) -> None:
        """The index has just become what the engine says it holds."""
        self._standings[engine].resyncs += 1

    def standing(self, engine: EngineId) -> Standing | None:
        return self._standings.get(engine)

    def believed(self, engines: Iterable[EngineId], blocks: Blocks) -> Blocks:
        """How many of the blocks that the index claims, for each engine, are to be counted on."""
        if not self._observed:
            return blocks
        shares = np.ones(len(blocks))
        for place, engine in enumerate(engines):
            if engine in self._observed:
                shares[place] = self._standings[engine].kept
        believed: Blocks = np.rint(blocks * shares).astype(np.int64)
        return believed

    def compare(self, prediction: Prediction, kind: str, usage: Usage, now_ms: float) -> Error | None:
        """Takes in what an answer of some kind says of its prompt. None if that cannot be compared."""
        standing = self._standings.get(prediction.engine)
        if standing is None or standing.epoch != prediction.epoch:
            return None
        if usage.cached_tokens is not None:
            standing.tells.add(kind)
        elif kind not in standing.tells:
            standing.untold += 1
            return None
        cached_tokens = usage.cached_tokens or 0  # older releases of vLLM leave a zero out
        standing.answers += 1
        expected_tokens = expected(prediction, usage.prompt_tokens)
        if expected_tokens and prediction.resyncs == standing.resyncs:
            standing.judged_ms = now_ms
            self._judge(prediction.engine, standing, kept_share(expected_tokens, cached_tokens, prediction.block_size))
        return Error(prediction.engine, prediction.by, expected_tokens - cached_tokens)

    def tick(self, now_ms: float) -> None:
        """Gives engines another chance that had none for long."""
        for engine, standing in self._standings.items():
            if now_ms - standing.judged_ms > UNSEEN_MS:
                self._on(engine, standing, Sign.UNSEEN)

    def _judge(self, engine: EngineId, standing: Standing, share: float) -> None:
        if standing.state is Trust.SUSPECT:
            self._try(engine, standing, share)
            return
        standing.kept += WEIGHT * (share - standing.kept)
        if standing.kept < WRONG_BELOW:
            self._on(engine, standing, Sign.WRONG)
        elif standing.kept > HOLDS_ABOVE:
            self._on(engine, standing, Sign.HOLD)

    def _try(self, engine: EngineId, standing: Standing, share: float) -> None:
        if standing.resyncs < standing.suspect_until_resync:
            return
        standing.probation.append(share)
        if len(standing.probation) == PROBATION:
            standing.kept = sum(standing.probation) / PROBATION
            self._on(engine, standing, Sign.WRONG if standing.kept < WRONG_BELOW else Sign.HOLD)

    def _on(self, engine: EngineId, standing: Standing, sign: Sign) -> None:
        state = TRANSITIONS.get((standing.state, sign))
        if state is None:
            return
        standing.state = state
        self._observed.discard(engine)
        if state is Trust.SUSPECT:
            standing.suspect_until_resync = standing.resyncs + 1
            standing.probation = []
            self.to_resync.add(engine)
        elif state is Trust.OBSERVED:
            self._observed.add(engine)
        else:
            standing.kept = 1.0


def expected(prediction: Prediction, prompt_tokens: int) -> int:
    """Tokens that the engine finds if the prediction is right: it always computes the last one, so never all blocks."""
    usable_blocks = max(prompt_tokens - 1, 0) // prediction.block_size
    return min(prediction.blocks, usable_blocks) * prediction.block_size


def kept_share(expected_tokens: int, cached_tokens: int, block_size: int) -> float:
    """The share of what was expected that was there. A block too few is no fault: some drafting models drop one."""
    if expected_tokens - cached_tokens <= block_size:
        return 1.0
    return cached_tokens / expected_tokens
