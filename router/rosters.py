"""Who could take a request for a model, kept for as long as the fleet stays the same. Pure."""

from collections.abc import Sequence

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Places, Roster
from vllm_llmd.router.health import Health
from vllm_llmd.router.membership import Membership
from vllm_llmd.router.prefix_index import PrefixIndex


class Rosters:
    """A roster per model, each with the engines' places in the index."""

    def __init__(self, membership: Membership, health: Health, index: PrefixIndex) -> None:
        self._membership = membership
        self._health = health
        self._index = index
        self._made: dict[str | None, tuple[Roster, Places]] = {}
        self._version = (0, 0)

    def of(self, model: str | None, tried: Sequence[EngineId] = ()) -> tuple[Roster, Places]:
        """Every engine that takes requests, serves the model and was not tried yet; and where the index has it."""
        version = self._membership.version, self._health.version
        if self._version != version:
            self._made.clear()
            self._version = version
        known = None if tried else self._made.get(model)
        if known is not None:
            return known
        accepting = self._membership.accepting()
        takers = [engine for engine in accepting if engine.info.id not in tried and engine.info.serves(model)]
        engines = self._health.admitted(takers)
        made = Roster.of(engines, model), self._index.places(engine.info.id for engine in engines)
        if engines and not tried:
            self._made[model] = made
        return made
