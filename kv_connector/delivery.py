"""Pure: everything that is to arrive for one request at this rank, and the one outcome that vLLM hears of it.

It comes by one order or several, for successive parts of the prompt, and each order along one strand per source rank
that holds some of this rank's heads.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NewType

from vllm_llmd.kv_connector.lifecycle import Drained, Outcome
from vllm_llmd.names import OrderId

SourceEndpoint = NewType("SourceEndpoint", str)
"""The ZeroMQ endpoint of a rank we read from."""


@dataclass(frozen=True)
class Strand:
    """What one order brings from one source rank."""

    order: OrderId
    endpoint: SourceEndpoint


class Delivery:
    """Ends when every strand has."""

    def __init__(self, strands: Mapping[Strand, int]) -> None:
        """`strands` say which part of the prompt each belongs to, counted from the front."""
        self._parts = dict(strands)
        self._outcomes: dict[Strand, Outcome] = {}
        self._drained: Counter[int] = Counter()

    @property
    def open(self) -> list[Strand]:
        return [strand for strand in self._parts if strand not in self._outcomes]

    def ended(self, strand: Strand, outcome: Outcome) -> Outcome | None:
        """A strand has ended; returns how the delivery has, if this was its last."""
        self._outcomes[strand] = outcome
        return None if self.open else self._outcome()

    def drained(self, drained: Drained) -> Drained | None:
        """A read that outlived its strand has ended. Returned if it has to be told of: the outcome has been."""
        if not self.open:
            return drained
        self._drained.update(drained.blocks)
        return None

    def doomed_with(self, strand: Strand) -> list[Strand]:
        """What is of no use once `strand` has failed: the same part's other strands, and all parts after it."""
        return [other for other in self.open if self._parts[other] >= self._parts[strand]]

    def _outcome(self) -> Outcome:
        outcomes = [self._outcomes[strand] for strand in self._parts]
        missing = {block for outcome in outcomes for block in outcome.missing}
        blocks = tuple(dict.fromkeys(block for outcome in outcomes for block in outcome.blocks))
        quarantined = Counter(block for outcome in outcomes for block in outcome.quarantined)
        ends = [outcome.prefill_ended_ms for outcome in outcomes]
        return replace(
            outcomes[0],
            reason=next((outcome.reason for outcome in outcomes if outcome.reason is not None), None),
            blocks=blocks,
            missing=tuple(block for block in blocks if block in missing),
            quarantined=tuple((quarantined - self._drained).elements()),
            arrivals=tuple(arrival for outcome in outcomes for arrival in outcome.arrivals),
            prefill_ended_ms=None if None in ends else max(end for end in ends if end is not None),
        )
