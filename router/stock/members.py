"""Stock engines as members of the fleet: what polls and events say of them, taken in. Pure; they have no link."""

import msgspec
import numpy as np

from vllm_llmd.clock import Clock
from vllm_llmd.kernels.kv_events_plain import Change
from vllm_llmd.names import EngineId
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import Stock
from vllm_llmd.wire import EngineInfo, Load


class StockMembers:
    """The stock engines of a fleet."""

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self._fleet = fleet
        self._clock = clock

    def join(self, info: EngineInfo, stock: Stock) -> bool:
        """What is known of a stock engine now. True if this is a new life, of which nothing is indexed yet.

        False for the id of an engine that has a link.
        """
        fleet = self._fleet
        if fleet.cursor(info.id) is not None or not fleet.membership.join(info, self._clock.now_ms(), stock):
            return False
        fleet.begin_life(info)
        return True

    def take_suspect(self, engine: EngineId) -> bool:
        """Whether its events are to be followed from an empty cache on, since predictions from them are wrong."""
        suspect = engine in self._fleet.stock_suspects
        self._fleet.stock_suspects.discard(engine)
        return suspect

    def heard(self, engine: EngineId, load: Load | None) -> bool:
        """It has answered, and takes requests: nothing says when its part of the index is exact. True if it was stale.

        `load` is None where it did not tell.
        """
        fleet = self._fleet
        if not fleet.is_stock(engine):
            return False
        was_stale = fleet.membership.heard(engine, self._clock.now_ms())
        fleet.membership.index_exact(engine)
        if load is not None:
            fleet.reported(engine, load, fleet.index.contents(engine, "gpu").blocks)
        return was_stale

    def changed(self, engine: EngineId, change: Change, block_size: int | None) -> None:
        """Its events say so. `block_size` is None until they have told it."""
        fleet = self._fleet
        known = fleet.membership.get(engine)
        if known is None or known.stock is None:
            return
        if block_size is not None and block_size != known.info.block_size:
            info = msgspec.structs.replace(known.info, block_size=block_size)
            fleet.membership.join(info, known.heard_ms, known.stock)
        if change.cleared:
            fleet.index.clear_engine(engine)
            fleet.truth.resynced(engine)
        fleet.index.apply(engine, change.removed, change.stored)
        for tier, offloaded in change.offloaded.items():
            removed, stored = (np.fromiter(names, np.uint64) for names in (offloaded.removed, offloaded.stored))
            fleet.index.apply(engine, removed, stored, tier)
