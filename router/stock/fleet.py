"""Stock engines as members of the fleet: joins them to what polls and events say of them. In the event loop.

Every rank is a member of its own, in role `both`, without workers and with a fingerprint of its own: nobody reads KV
from it, and it reads from nobody.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Final

from vllm_llmd.clock import Clock
from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import Stock
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.stock.events import Outbox, Posted, StockEvents
from vllm_llmd.router.stock.members import StockMembers
from vllm_llmd.router.stock.poll import Pace, Report, StockPoll
from vllm_llmd.router.stock.report import Models, Scrape
from vllm_llmd.router.stock.settings import Rank, StockEngine, ranks
from vllm_llmd.router.stock.stream import Stream
from vllm_llmd.wire import EngineInfo

log = logging.getLogger(__name__)

NAMES_PER_TURN: Final = 8192
"""Applied to the index between two looks at everything else: about a millisecond."""
SUPPOSED_BLOCK_SIZE: Final = 16
"""Until something tells it."""


class StockFleet:
    """`run` until cancelled, then `close`."""

    def __init__(self, settings: RouterSettings, fleet: Fleet, clock: Clock) -> None:
        self._engines: Sequence[StockEngine] = settings.stock_engine or ()
        self._fleet = fleet
        self._members = StockMembers(fleet, clock)
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._outbox = Outbox(self._wake)
        self._events = StockEvents(self._outbox, clock)
        self._models: dict[str, Models] = {}
        self._started_s: dict[EngineId, float] = {}
        self._lives: Counter[EngineId] = Counter()
        self._block_sizes: dict[EngineId, int] = {}
        self.polls_failed: Counter[tuple[str, str]] = Counter()
        """By engine's address and by what was asked."""
        pace = Pace(settings.heartbeat_ms / 1000, settings.stale_after_ms / 3000)
        self._poll = StockPoll(pace, settings.api_key, self.heard, self._failed)

    async def run(self) -> None:
        await self._poll.run(self._engines)

    def close(self) -> None:
        self._events.close()

    @property
    def streams(self) -> Sequence[tuple[EngineId, Stream]]:
        return list(self._events.streams.items())

    # --- polls ------------------------------------------------------------------------------------------------------

    def heard(self, engine: StockEngine, report: Report) -> None:
        """The engine has answered."""
        if report.models is not None:
            self._models[engine.http] = report.models
        models = self._models.get(engine.http)
        if models is None:
            return
        for rank in ranks(engine):
            if self._is_another_life(rank.id, report.scrape) or self._fleet.membership.get(rank.id) is None:
                self._lives[rank.id] += 1
            info = self._info(rank, models, report.scrape)
            if self._members.join(info, Stock(rank.number)):
                log.info("stock engine %s: joined, serving %s", rank.id, ", ".join(models.names))
                self._events.follow(rank, info.num_blocks)
            load = None if report.scrape is None else report.scrape.load(rank.number)
            was_stale = self._members.heard(rank.id, load)
            may_be_another_life = was_stale and rank.id not in self._started_s
            if self._members.take_suspect(rank.id) or may_be_another_life:
                self._events.follow(rank, info.num_blocks)

    def _failed(self, engine: StockEngine, what: str) -> None:
        self.polls_failed[engine.http, what] += 1

    def _is_another_life(self, engine: EngineId, scrape: Scrape | None) -> bool:
        started_s = None if scrape is None else scrape.started_s
        if started_s is None:
            return False
        before = self._started_s.get(engine)
        self._started_s[engine] = started_s
        return before is not None and before != started_s

    def _info(self, rank: Rank, models: Models, scrape: Scrape | None) -> EngineInfo:
        known = self._fleet.membership.get(rank.id)
        told = self._block_sizes.get(rank.id) or rank.block_size or (scrape and scrape.block_size(rank.number))
        blocks = None if scrape is None else scrape.num_blocks(rank.number)
        return EngineInfo(
            id=rank.id,
            epoch=Epoch(self._lives[rank.id]),
            role="both",
            http=rank.http,
            models=list(models.names),
            adapters=list(models.adapters),
            block_size=told or (known.info.block_size if known else SUPPOSED_BLOCK_SIZE),
            num_blocks=blocks or (known.info.num_blocks if known else 0),
            max_model_len=models.max_model_len,
            fingerprint=f"stock engine {rank.id}",
            workers=[],
            labels=dict(rank.labels),
        )

    # --- events -----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """From the events thread."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._apply_some)

    def _apply_some(self) -> None:
        """Applies what lies in the outbox, and lets everything else have its turn in between."""
        self._scheduled = False
        left = NAMES_PER_TURN
        while left > 0:
            posted = self._outbox.take()
            if posted is None:
                return
            left -= posted.names
            self._apply(posted)
        self._wake()

    def _apply(self, posted: Posted) -> None:
        if posted.block_size is not None:
            self._block_sizes[posted.engine] = posted.block_size
        self._members.changed(posted.engine, posted.change, posted.block_size)
