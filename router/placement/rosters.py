"""Who of the fleet may take a request at all: by model, by labels, by length. Pure.

A roster is kept for as long as the fleet stays the same: where nothing but a model is asked for, nothing is filtered
for any one request.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Places, Roster
from vllm_llmd.router.index.prefixes import PrefixIndex
from vllm_llmd.router.members.health import Health
from vllm_llmd.router.members.membership import Engine, Membership
from vllm_llmd.router.members.selector import Selector
from vllm_llmd.router.request import Facts, RequestError

KEPT: Final = 256
"""Rosters kept: clients choose the selectors, so there may be any number of them."""

ANY_LENGTH: Final = 1 << 62

Bar = Literal["labels", "context", "filters"]
"""Why nobody takes a request that somebody else's request would be taken by."""


class Wanted(NamedTuple):
    """Engines of less than `context` tokens may not take it."""

    model: str | None
    selector: Selector | None = None
    context: int = 0


@dataclass(frozen=True)
class _Made:
    """`places` are those in the index; `lengths` the different lengths of context, shortest first."""

    roster: Roster
    places: Places
    lengths: Sequence[int]


class Rosters:
    """Those of one fleet."""

    def __init__(self, membership: Membership, health: Health, index: PrefixIndex) -> None:
        self._membership = membership
        self._health = health
        self._index = index
        self._made: OrderedDict[Wanted, _Made] = OrderedDict()
        self._version = (0, 0)

    def of(self, wanted: Wanted, tried: Sequence[EngineId] = ()) -> tuple[Roster, Places]:
        """The ready engines that may take it and were not tried yet, and their places in the index."""
        made = self._of(wanted, tried)
        return made.roster, made.places

    def wanted(self, facts: Facts) -> Wanted:
        """What the request wants of an engine.

        Engines too short for the prompt are left out if its tokens are known; those too short for prompt and answer,
        as far as they can be estimated, only if others are long enough.
        """
        anywhere = Wanted(facts.model, facts.selector)
        least, wished = context_tokens(facts)
        if not wished:
            return anywhere
        lengths = self._of(anywhere).lengths
        if not lengths or wished <= lengths[0]:
            return anywhere
        if wished <= lengths[-1]:
            return anywhere._replace(context=lengths[bisect_left(lengths, wished)])
        if least <= lengths[0]:
            return anywhere
        return anywhere._replace(context=lengths[at] if (at := bisect_left(lengths, least)) < len(lengths) else least)

    def check(self, facts: Facts) -> None:
        """Raises RequestError if the prompt fits no engine that serves its model, ready or not."""
        least, _ = context_tokens(facts)
        lengths = self._of(Wanted(facts.model)).lengths if least else ()
        if not least or (lengths and least <= lengths[0]):
            return
        longest = max((length_of(each) for each in self._membership.all() if each.info.serves(facts.model)), default=0)
        if 0 < longest < least:
            raise RequestError(
                f"This model's maximum context length is {longest} tokens. However, your prompt has {least} tokens. "
                "Please reduce the length of the prompt.",
                "prompt",
                "context_length_exceeded",
            )

    def bars(self, facts: Facts) -> Bar | None:
        """Why there is nobody; None if nobody is ready at all."""
        if not self._of(Wanted(facts.model)).lengths:
            return None
        if not self._of(Wanted(facts.model, facts.selector)).lengths:
            return "labels"
        return "filters" if self._of(self.wanted(facts)).lengths else "context"

    def _of(self, wanted: Wanted, tried: Sequence[EngineId] = ()) -> _Made:
        version = self._membership.version, self._health.version
        if self._version != version:
            self._made.clear()
            self._version = version
            self._index.evictions.sized(sum(max(each.info.num_blocks, 0) for each in self._membership.all()))
        known = None if tried else self._made.get(wanted)
        if known is not None:
            self._made.move_to_end(wanted)
            return known
        engines = self._health.admitted(
            [each for each in self._membership.accepting() if each.info.id not in tried and may_take(each, wanted)]
        )
        made = _Made(
            Roster.of(engines, wanted.model),
            self._index.places(each.info.id for each in engines),
            sorted(set(map(length_of, engines))),
        )
        if engines and not tried:
            self._made[wanted] = made
            if len(self._made) > KEPT:
                self._made.popitem(last=False)
        return made


def may_take(engine: Engine, wanted: Wanted) -> bool:
    """Whether it is one of those that are wanted."""
    if not engine.info.serves(wanted.model) or length_of(engine) < wanted.context:
        return False
    return wanted.selector is None or wanted.selector.matches(engine.info.labels)


def length_of(engine: Engine) -> int:
    """Its context in tokens; any, where it does not say."""
    return engine.info.max_model_len if engine.info.max_model_len > 0 else ANY_LENGTH


def context_tokens(facts: Facts) -> tuple[int, int]:
    """What a context must have for the prompt, 0 if that is not known exactly, and what it should have for all."""
    if facts.may_be_cut:
        return 0, 0
    is_exact = facts.tokens is not None and not facts.tokenized
    return facts.prompt_tokens if is_exact else 0, facts.prompt_tokens + (facts.output_tokens or 0)
