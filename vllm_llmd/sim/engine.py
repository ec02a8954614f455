"""One simulated engine: the model on a real clock, its link to routers, its orders and KV events. Event loop only.

Owns what the engine knows; the HTTP around it is in `server`.
"""

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import zmq

from vllm_llmd.kernels.hash_chain import Names, digest, salt_of
from vllm_llmd.kernels.hash_chain_cpu import UNSALTED, chain_names
from vllm_llmd.kv_connector.hints import read_hint
from vllm_llmd.kv_connector.link import EngineLink, LinkSettings
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.names import BlockName, EngineId, Epoch, Tier
from vllm_llmd.sim.asks import Ask, Room
from vllm_llmd.sim.bad_wire import BadWire
from vllm_llmd.sim.cache_change import CacheChange
from vllm_llmd.sim.failures import Failures
from vllm_llmd.sim.kv_events import Content, EventCodec, EventPublisher
from vllm_llmd.sim.load import load_of
from vllm_llmd.sim.order_book import OrderBook, Placed, Wish
from vllm_llmd.sim.requests import Report, SimRequest
from vllm_llmd.sim.scheduler import Scheduler
from vllm_llmd.sim.settings import SimSettings
from vllm_llmd.sim.text import Tokens
from vllm_llmd.sim.transfer import Transfer
from vllm_llmd.wire import EngineInfo, Geometry, GroupShape, Load

STEPS_PER_TURN: Final = 64
LOAD_EVERY_S: Final = 0.02
CONTENTS_KEPT: Final = 100_000
WHOLE_RUN: Final = 10_000
"""Steps taken together while nobody streams."""


@dataclass(eq=False)
class Stream:
    """One prompt on its way to its answer. `more` are tokens as they are made."""

    request: SimRequest
    ask: Ask
    prompt: Tokens
    asked_ms: float = 0.0
    made: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    async def more(self) -> int:
        """So many more tokens; at least one."""
        return await self.made.get()


class SimEngine:
    """Between `start` and `stop` it takes requests."""

    def __init__(self, settings: SimSettings, engine_id: EngineId, sockets: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.settings = settings
        self.id = engine_id
        self.model = Scheduler(settings.limits(), settings.speeds())
        self.room = Room(
            settings.model, min(settings.max_model_len, self.model.limits.max_tokens), settings.answer_tokens
        )
        self._rng = random.Random(f"{settings.seed} {engine_id}")
        self.wire = BadWire(sockets, self._rng)
        self.events: EventPublisher | None = None
        self.failures = Failures()
        self._codec = EventCodec(settings.kv_events_form, settings.kv_events_hashes, settings.block_size)
        self._contents: dict[BlockName, Content] = {}
        self._secrets: set[BlockName] = set()
        self._streams: dict[str, Stream] = {}
        self._count = 0
        self.draining = False
        self._load = Load(free_blocks=settings.blocks)
        self._load_due_s = 0.0
        self._timer: asyncio.Handle | None = None

    def start(self, http: str, events: EventPublisher | None) -> None:
        """Joins the routers. `http` is where the engine's API listens."""
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()
        self.events = events
        settings = self.settings
        self.info = EngineInfo(
            id=self.id,
            epoch=Epoch(secrets.randbits(63)),
            role=settings.role,
            http=http,
            models=list(settings.model[:1]),
            adapters=list(settings.model[1:]),
            block_size=settings.block_size,
            num_blocks=settings.blocks,
            max_model_len=self.room.max_model_len,
            fingerprint=f"sim {settings.model[0]} {settings.kv_bytes}",
            workers=[],
            labels={"simulated": "yes"},
            geometry=Geometry(groups=[GroupShape(settings.block_size, 1)]),
            priorities=settings.policy == "priority",
            max_sequences=settings.max_sequences,
        )
        link = LinkSettings(self.info, settings.router, lambda: self._load)
        self._link = EngineLink(link, sockets=self.wire)
        self.orders = OrderBook(self.info, Seal(settings.secret), self.members, self._ordered)
        self.fail(settings.first_failures())
        self._link.start()

    @property
    def busy(self) -> bool:
        """Whether anybody waits for an answer."""
        return bool(self._streams)

    def drain(self) -> None:
        """Tells the routers that it is about to leave, and takes no more requests."""
        self.draining = True
        self._link.drain()

    async def stop(self) -> None:
        """Leaves in good order."""
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.to_thread(self._link.close)
        await asyncio.to_thread(self.orders.close)

    def fail(self, failures: Failures) -> None:
        """From now on."""
        self.failures = failures
        self.model.slowdown = failures.slow
        self.wire.faults = failures.wire
        if not failures.lies and self._secrets:
            self._link.publish(False, list(self._secrets), ())
            self._secrets.clear()

    def members(self) -> Mapping[EngineId, EngineInfo]:
        """Every engine that the routers have told of."""
        return self._link.members()

    # --- requests -----------------------------------------------------------------------------------------------

    def submit(self, ask: Ask) -> list[Stream]:
        """One stream per prompt. Whoever takes them must `leave` them in the end."""
        streams = [self._stream(ask, index) for index in range(len(ask.prompts))]
        for stream in streams:
            self._streams[stream.request.id] = stream
            self.model.submit(stream.request, self._now_ms())
        self._arm()
        return streams

    def leave(self, streams: Sequence[Stream]) -> None:
        """Nobody listens to these any more: those that are not over end here."""
        for stream in streams:
            if self._streams.pop(stream.request.id, None) is not None:
                self.orders.cancel(stream.request.id)
                self.model.abort(stream.request.id, self._now_ms())
        self._arm()

    def forget_cache(self) -> None:
        """Clears the prefix cache, in every tier."""
        self.model.pool.clear()
        if self.model.offload is not None:
            self.model.offload.clear()
        self._tell_changes()

    def _stream(self, ask: Ask, index: int) -> Stream:
        prompt, answer = ask.prompts[index], ask.answers[index]
        tokens = np.concatenate((prompt, answer))
        names: list[BlockName] = self._names(tokens, ask).tolist()
        hinted = read_hint(ask.kv_transfer_params).sources
        self._count += 1
        request = SimRequest(
            id=f"{self.id}-{self._count}",
            prompt_tokens=len(prompt),
            output_tokens=len(answer),
            names=names,
            priority=ask.priority,
            source=hinted[0].engine if hinted else None,
            source_until=hinted[0].until if hinted else None,
            source_least=hinted[0].least if hinted else None,
        )
        if self.events is not None:
            self._remember_contents(tokens, names, ask)
        return Stream(request, ask, prompt)

    def _names(self, tokens: Tokens, ask: Ask) -> Names:
        """As an engine names its blocks: the adapter is part of every name, the cache salt of the first one."""
        size, adapter = self.settings.block_size, [ask.adapter] if ask.adapter else []
        digests = UNSALTED
        if adapter or ask.cache_salt:
            digests = np.full(len(tokens) // size, digest(salt_of(adapter)), np.uint64)
            digests[:1] = digest(salt_of([*adapter, *([ask.cache_salt] if ask.cache_salt else [])]))
        return chain_names(tokens, size, digests=digests)

    def _remember_contents(self, tokens: Tokens, names: list[BlockName], ask: Ask) -> None:
        """Events tell what is in a block when it is stored, which may be long after."""
        size, adapter = self.settings.block_size, [ask.adapter] if ask.adapter else []
        ids = tokens.tolist()
        for at, name in enumerate(names):
            keys = [*adapter, *([ask.cache_salt] if ask.cache_salt and not at else [])]
            parent = names[at - 1] if at else None
            self._contents[name] = Content(parent, ids[at * size : (at + 1) * size], ask.adapter, keys or None)

    # --- time ---------------------------------------------------------------------------------------------------

    def _now_ms(self) -> float:
        return (self._loop.time() - self._began_s) * 1000 * self.settings.speed_up

    def _arm(self) -> None:
        """Sees to it that the model's next step is taken when it is due."""
        if self._timer is not None:
            self._timer.cancel()
        due_ms = self.model.next_ms
        now_s = self._loop.time()
        if due_ms is None or now_s >= self._load_due_s:
            self._load_due_s = now_s + LOAD_EVERY_S
            self._load = self._current_load()
        if due_ms is None:
            self._timer = None
        else:
            self._timer = self._loop.call_at(self._began_s + due_ms / 1000 / self.settings.speed_up, self._turn)

    def _turn(self) -> None:
        now_ms = self._now_ms()
        streamed = any(stream.ask.stream for stream in self._streams.values())
        self.model.run_steps = self.settings.chunk_tokens if streamed else WHOLE_RUN
        for _ in range(STEPS_PER_TURN):
            due_ms = self.model.next_ms
            if due_ms is None or due_ms > now_ms:
                break
            self._deliver(self.model.step(due_ms))
        self._tell_changes()
        self._arm()

    def _deliver(self, report: Report) -> None:
        for request in report.admitted:
            self._tell_seen(request)
        for request in report.wanted:
            self._order(request)
        for request, tokens in report.made:
            stream = self._streams.get(request.id)
            if stream is not None:
                stream.made.put_nowait(tokens)
        for request in report.finished:
            self._streams.pop(request.id, None)

    def _current_load(self) -> Load:
        return load_of(self.model, self.orders.placed, self.orders.served)

    # --- orders -------------------------------------------------------------------------------------------------

    def _order(self, request: SimRequest) -> None:
        stream = self._streams.get(request.id)
        if stream is None:
            return
        body: dict[str, Any] = {"model": stream.ask.model}
        if stream.ask.cache_salt is not None:
            body["cache_salt"] = stream.ask.cache_salt
        wish = Wish(request.id, stream.prompt, request.computed, stream.ask.kv_transfer_params, body, request.priority)
        stream.asked_ms = self._now_ms()
        if self.orders.place(wish) is not None:
            self._supplied(request.id, 0)

    def _ordered(self, placed: Placed, error: str | None) -> None:
        stream = self._streams.get(placed.request)
        if stream is None:
            return
        if error is not None:
            self._supplied(placed.request, 0)
            return
        transfer = Transfer(stream.asked_ms, placed.end_token - placed.first_token, self.settings.token_budget)
        here_ms = transfer.here_ms(self._now_ms(), self.model.speeds)
        wait_s = (here_ms - self._now_ms()) / 1000 / self.settings.speed_up
        self._loop.call_later(wait_s, self._supplied, placed.request, placed.end_token)

    def _supplied(self, request: str, end_token: int) -> None:
        self.model.supplied(request, end_token, self._now_ms())
        self._tell_changes()
        self._arm()

    # --- what others hear ---------------------------------------------------------------------------------------

    def _tell_seen(self, request: SimRequest) -> None:
        stream = self._streams.get(request.id)
        if stream is None or len(stream.ask.prompts) > 1:
            return
        hint = read_hint(stream.ask.kv_transfer_params)
        if hint.request is not None:
            full = request.prompt_tokens // self.settings.block_size
            self._link.seen(hint.request, full * self.settings.block_size, request.names[:full])

    def _tell_changes(self) -> None:
        change = self.model.pool.changes.drain()
        if change is not None:
            told = self._with_lies(change)
            self._link.publish(told.cleared, told.removed, told.stored)
            self._tell_events(change, "gpu")
        below = None if self.model.offload is None else self.model.offload.changes.drain()
        if below is not None:
            self._link.publish(below.cleared, below.removed, below.stored, "cpu")
            self._tell_events(below, "cpu")

    def _with_lies(self, change: CacheChange) -> CacheChange:
        self._secrets.difference_update(change.stored)
        if change.cleared:
            self._secrets.clear()
        lies = self.failures.lies
        if not lies:
            return change
        kept = {name for name in change.removed if self._rng.random() < lies}
        self._secrets |= kept
        return CacheChange(change.cleared, [name for name in change.removed if name not in kept], change.stored)

    def _tell_events(self, change: CacheChange, tier: Tier) -> None:
        if self.events is None:
            return
        self.events.publish(self._codec.batch(time.time(), change, self._contents, tier))
        if len(self._contents) > CONTENTS_KEPT + 4 * (self.settings.blocks + self.settings.cpu_blocks):
            offload = () if self.model.offload is None else self.model.offload.names
            named = (stream.request.names for stream in self._streams.values())
            kept = {*self.model.pool.names, *offload, *itertools.chain.from_iterable(named)}
            self._contents = {name: content for name, content in self._contents.items() if name in kept}
