"""All that the router knows of its engines, fed by their messages and asked by requests. Pure: it sends nothing.

Every call that may owe somebody a message returns what to send to whom.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, get_args

import numpy as np

from vllm_llmd import wire
from vllm_llmd.clock import Clock
from vllm_llmd.errors import MalformedMessageError
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.names import TIERS, EngineId
from vllm_llmd.router.autoscaling.replicas import Plan, Replicas
from vllm_llmd.router.autoscaling.traffic import Traffic
from vllm_llmd.router.candidates import Candidates, Counts, Loads, Places, RateColumns, Roster, Shape, adapter_of
from vllm_llmd.router.decide import Decision
from vllm_llmd.router.index import texts
from vllm_llmd.router.index.agreement import Agreement, prompt_names
from vllm_llmd.router.index.cursor import Cursor, Outcome
from vllm_llmd.router.index.prefixes import NO_NAMES, Difference, PrefixIndex, unpacked, unpacked_tiers
from vllm_llmd.router.index.sessions import Sessions
from vllm_llmd.router.index.texts import Chunks, TextIndex
from vllm_llmd.router.index.under_way import UnderWay
from vllm_llmd.router.learning.engine_model import Models
from vllm_llmd.router.learning.text_lengths import TextLengths
from vllm_llmd.router.learning.truth import By, Error, Prediction, Truth
from vllm_llmd.router.members.health import Health
from vllm_llmd.router.members.membership import Engine, Membership, Placed, State
from vllm_llmd.router.members.rates import packed
from vllm_llmd.router.placement.rosters import Rosters, Wanted
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.upstream.seen import Measured
from vllm_llmd.router.upstream.usage import Usage

Sender = bytes
"""The ZeroMQ routing id of a connection."""

FromEngine = wire.Hello | wire.Heartbeat | wire.BlocksChanged | wire.Snapshot | wire.RequestSeen | wire.Goodbye

_FROM_ENGINE = get_args(FromEngine)

TOLD_PER_MS: Final = 2000
"""Engines that others are told of, each time one is told of one: at 50 bytes each, a gigabit per second."""


@dataclass(frozen=True)
class Reply:
    to: Sender
    message: wire.Message


@dataclass(frozen=True)
class Verdict:
    """The index against what the engine says it holds, `blocks` of them as of `seq`."""

    seq: int
    blocks: int
    wrong: Difference


class Fleet:
    """Membership, the exact index and the text index, kept in step. `life` names this life of the router."""

    def __init__(self, settings: RouterSettings, clock: Clock, life: str) -> None:
        self._settings = settings
        self._clock = clock
        self._life = life
        self._senders: dict[EngineId, Sender] = {}
        self._cursors: dict[EngineId, Cursor] = {}
        self.repaired: Counter[EngineId] = Counter()
        """Blocks that the index was off by when a snapshot healed it, since start."""
        self._verdicts: dict[EngineId, Verdict] = {}
        self._unverified: set[EngineId] = set()
        self._publish_from_ms = 0.0
        self.membership = Membership(settings.stale_after_ms, settings.gone_after_ms)
        self.index = PrefixIndex(settings.index_blocks)
        self.health = Health()
        self.rosters = Rosters(self.membership, self.health, self.index)
        self.stock_suspects: set[EngineId] = set()
        """Stock engines whose events are to be followed from an empty cache on: predictions from them are wrong."""
        self.sessions = Sessions()
        self.under_way = UnderWay()
        self.lengths = TextLengths()
        self.texts = TextIndex(settings.text_chunks)
        self.truth = Truth()
        self.agreement = Agreement()
        self.models = Models()
        self.traffic = Traffic(settings, self.membership, clock.now_ms())
        self._replicas = Replicas(settings, self.membership, self.models, self.traffic)

    # --- messages -----------------------------------------------------------------------------------------------

    def on_message(self, sender: Sender, message: wire.LinkMessage) -> list[Reply]:
        """Takes one message in. Raises MalformedMessageError for one that no engine may send."""
        if not isinstance(message, _FROM_ENGINE):
            raise MalformedMessageError(f"{type(message).__name__} is for engines, not for routers")
        if isinstance(message, wire.Hello):
            return self._on_hello(sender, message)
        standing = self.membership.standing(message.engine, message.epoch)
        if standing == "former":
            return [Reply(sender, _refuse_former(message.engine))]
        if standing == "unknown":
            return [] if isinstance(message, wire.Goodbye) else [Reply(sender, wire.HelloWanted(self._life))]
        now_ms = self._clock.now_ms()
        woken = self._heard(message.engine, now_ms)
        replies = self._on_current(message, now_ms)
        return [*woken, *replies] if woken else replies

    def tick(self) -> list[Reply]:
        """Ages everyone; asks again for what does not come."""
        now_ms = self._clock.now_ms()
        for engine in self.membership.tick(now_ms):
            self._forget(engine)
        self.health.tick((engine.info.id for engine in self.membership.accepting()), now_ms)
        replies = []
        for engine, cursor in self._cursors.items():
            known = self.membership.get(engine)
            if known is not None and known.state is not State.STALE:
                replies += self._act(engine, cursor.tick(now_ms))
            if engine in self._unverified:
                replies += self._act(engine, cursor.verify())
        self._unverified.clear()
        return [*replies, *self._resync_suspects(now_ms)]

    def _resync_suspects(self, now_ms: float) -> list[Reply]:
        self.truth.tick(now_ms)
        suspects, self.truth.to_resync = self.truth.to_resync, set()
        self.stock_suspects |= {engine for engine in suspects if self.is_stock(engine)}
        replies = []
        for engine in suspects & self._cursors.keys():
            replies += self._act(engine, self._cursors[engine].lose("predictions wrong", now_ms))
        return replies

    def members_to_publish(self) -> list[Reply]:
        """The new list for every engine, if it changed since it was last asked for."""
        now_ms = self._clock.now_ms()
        if not self.membership.changed or now_ms < self._publish_from_ms:
            return []
        self.membership.changed = False
        self._publish_from_ms = now_ms + len(self.membership.all()) ** 2 // TOLD_PER_MS
        members = wire.Members(self.membership.infos())
        return [Reply(self._senders[engine.id], members) for engine in members.engines]

    def _on_hello(self, sender: Sender, hello: wire.Hello) -> list[Reply]:
        info, now_ms = hello.engine, self._clock.now_ms()
        if info.block_size < 1:
            return [Reply(sender, wire.Refused(f"block_size must be at least 1; got {info.block_size}"))]
        if self.membership.standing(info.id, info.epoch) == "former":
            return [Reply(sender, _refuse_former(info.id))]
        if self.is_stock(info.id):
            return [Reply(sender, wire.Refused(f"{info.id} is the id of a stock engine: give this one another"))]
        self._senders[info.id] = sender
        replies = [Reply(sender, wire.Welcome(self._life, self._settings.heartbeat_ms))]
        if self.membership.join(info, now_ms):
            self._cursors[info.id] = Cursor(self._settings.snapshot_retry_ms)
            self.begin_life(info)
            return [*replies, *self._act(info.id, self._cursors[info.id].lose("joined", now_ms))]
        return [*replies, Reply(sender, wire.Members(self.membership.infos())), *self._heard(info.id, now_ms)]

    def _heard(self, engine: EngineId, now_ms: float) -> list[Reply]:
        was_stale = self.membership.heard(engine, now_ms)
        return self._act(engine, self._cursors[engine].lose("was silent", now_ms)) if was_stale else []

    def _on_current(self, message: FromEngine, now_ms: float) -> list[Reply]:
        match message:
            case wire.Heartbeat():
                held = {tier: self.index.contents(message.engine, tier) for tier in TIERS}
                self.reported(message.engine, message.load, held["gpu"].blocks)
                self.membership.says_leaving(message.engine, message.draining)
                known = None if self.index.without_room(message.engine) else held
                return self._act(message.engine, self._cursors[message.engine].on_heartbeat(message, known, now_ms))
            case wire.BlocksChanged():
                wire.check_packed(message.removed)
                wire.check_packed(message.stored)
                return self._act(message.engine, self._cursors[message.engine].on_changed(message, now_ms))
            case wire.Snapshot():
                return self._act(message.engine, self._cursors[message.engine].on_snapshot(message, now_ms))
            case wire.RequestSeen():
                engine = self.membership.get(message.engine)
                if engine is not None:
                    wire.check_packed(message.names)
                    self._learn(engine, message.request, unpacked(message.names))
            case wire.Goodbye():
                self.membership.left(message.engine)
                self._forget(message.engine)
        return []

    def _act(self, engine: EngineId, outcome: Outcome) -> list[Reply]:
        if outcome.replace is not None:
            wrong = self.index.replace_engine(engine, unpacked_tiers(outcome.replace))
            self.truth.resynced(engine)
            if outcome.again:
                self.repaired[engine] += wrong.missing + wrong.extra
        if outcome.compare is not None:
            held = unpacked_tiers(outcome.compare)
            blocks = sum(map(len, held.values()))
            self._verdicts[engine] = Verdict(self._cursors[engine].seq, blocks, self.index.compare(engine, held))
        for changed in outcome.changes:
            if changed.cleared:
                self.index.clear_tier(engine, changed.tier)
            removed = unpacked(changed.removed) if changed.removed else NO_NAMES
            self.index.apply(engine, removed, unpacked(changed.stored), changed.tier)
        known = self.membership.get(engine)
        if outcome.snapshot_wanted is not None and known is not None:
            return [Reply(self._senders[engine], wire.SnapshotWanted(known.info.epoch, outcome.snapshot_wanted))]
        if self._cursors[engine].exact:
            self.membership.index_exact(engine)
        return []

    def reported(self, engine: EngineId, load: wire.Load, cached_blocks: int) -> None:
        """What a member says of its load."""
        self.membership.reported(engine, load, self._clock.now_ms(), cached_blocks)
        known = self.membership.get(engine)
        if known is not None:
            self.models.reported(engine, known.load)
            known.rated(packed(self.models.rates(engine)))
            self.traffic.reported(known, self._clock.now_ms())

    def _learn(self, engine: Engine, request: str, names: Names) -> None:
        chunks = self.texts.learn(request, engine.info.block_size, names)
        guess = None if chunks is None else chunks.guess
        if guess is not None:
            adapter = adapter_of(engine.info, guess.model)
            self.agreement.compare(guess, engine.info.block_size, adapter, names)

    def begin_life(self, info: wire.EngineInfo) -> None:
        """Whatever an earlier life held, failed at or taught counts no more."""
        self.index.clear_engine(info.id)
        self.health.forget(info.id)
        self.truth.joined(info.id, info.epoch)
        self.models.left(info.id)
        self.traffic.left(info.id)

    def _forget(self, engine: EngineId) -> None:
        self.index.forget_engine(engine)
        self.health.forget(engine)
        self.truth.left(engine)
        self.models.left(engine)
        self.traffic.left(engine)
        self.stock_suspects.discard(engine)
        self._verdicts.pop(engine, None)
        self._cursors.pop(engine, None)
        self._senders.pop(engine, None)

    def is_stock(self, engine: EngineId) -> bool:
        """Whether it is a member without a link."""
        known = self.membership.get(engine)
        return known is not None and known.stock is not None

    # --- requests -----------------------------------------------------------------------------------------------

    def serves(self, model: str) -> bool:
        """Whether any engine of the fleet, ready or not, has the model."""
        return any(engine.info.serves(model) for engine in self.membership.all())

    def cut(self, facts: Facts) -> Chunks:
        """The request's text as the text index knows it."""
        return texts.cut(facts, self._settings.text_chunk_bytes)

    def candidates(
        self, facts: Facts, chunks: Chunks, tried: Sequence[EngineId] = (), session: str | None = None
    ) -> Candidates:
        """Every ready engine that may take the request and was not tried yet, with what it has cached of the prompt."""
        roster, places = self.rosters.of(self.rosters.wanted(facts), tried)
        prefix_blocks, on_gpu = self._held(facts, chunks, roster, places)
        believed = self.truth.believed((engine.info.id for engine in roster.engines), prefix_blocks)
        offloaded = np.zeros_like(on_gpu) if believed is on_gpu else np.maximum(believed - on_gpu, 0)
        if session is not None:
            believed = self.sessions.supposed(session, roster, facts.prompt_tokens, believed)
        coming = roster.coming(under_way := self.under_way.coming(facts, chunks), believed)
        loads, rates = self.membership.ledger.read(roster.entries)
        return Candidates(
            roster,
            believed if coming is None else believed + coming,
            offloaded,
            prefix_blocks,
            Loads.packed(loads),
            RateColumns.packed(rates),
            self.models.output_tokens,
            self.index.evictions.wanted_again(self.models.hit_share),
            coming,
            self.models.doubt,
            self.models.step_doubt,
            under_way,
        )

    def place(self, request: str, decision: Decision, facts: Facts, chunks: Chunks) -> None:
        """Counts a decision until the request has ended, and waits for the prompt's blocks to learn from."""
        self.texts.forwarded(request, chunks)
        self.under_way.began(request, facts, chunks, tuple(decision.prefill_tokens), decision.supply)
        now_ms = self._clock.now_ms()
        for engine_id, prefill_tokens in decision.prefill_tokens.items():
            engine = self.membership.get(engine_id)
            if engine is not None:
                supplies = engine_id == decision.source
                engine.place(request, Placed(now_ms, prefill_tokens, decision.new_tokens(engine_id), supplies))
        self.traffic.placed(request, decision, now_ms)
        self.health.asked(decision.destination, request)

    def foretold(self, facts: Facts, decision: Decision) -> Prediction | None:
        """What the index claims of the decision's destination. None if what the engine finds says nothing of that."""
        engine = self.membership.get(decision.destination)
        cursor, standing = self._cursors.get(decision.destination), self.truth.standing(decision.destination)
        if engine is None or standing is None or (cursor is not None and not cursor.exact):
            return None
        if decision.source is not None or facts.prompts != 1:  # a source's KV counts as cached
            return None
        info = engine.info
        by: By = "tokens" if facts.tokens is not None else "text"
        return Prediction(info.id, info.epoch, info.block_size, decision.claimed_blocks, by, standing.resyncs)

    def observed(self, prediction: Prediction, kind: str, usage: Usage) -> Error | None:
        """Takes in what the engine has found; `kind` names the kind of answer that says so."""
        return self.truth.compare(prediction, kind, usage, self._clock.now_ms())

    def answering(self, request: str, decision: Decision) -> None:
        """The answer has begun: the prompt is computed."""
        self.traffic.answering(request, self._clock.now_ms())
        for engine in self._parties(decision):
            computed = engine.ended if engine.info.id == decision.source else engine.answering
            computed(request)

    def answered(self, request: str, decision: Decision, measured: Measured) -> None:
        """The answer has come: how long it took teaches how fast the engines are. To be told before `done`."""
        self.traffic.answered(request, measured.usage)
        if self.membership.get(decision.destination) is not None:
            parties = self._parties(decision)
            self.models.answered(decision, measured, [each.info.id for each in parties if each.info.priorities])
            for engine in parties:
                engine.rated(packed(self.models.rates(engine.info.id)))

    def done(self, request: str, decision: Decision) -> None:
        """The request has ended, well or not."""
        self.traffic.done(request)
        self.withdrawn(request, decision)

    def withdrawn(self, request: str, decision: Decision) -> None:
        """The engines have it no more; it has ended, or will be placed again."""
        self.under_way.ended(request)
        self.health.ended(decision.destination, request)
        for engine in self._parties(decision):
            engine.ended(request)

    def _parties(self, decision: Decision) -> list[Engine]:
        ids = (each for each in (decision.destination, decision.source) if each is not None)
        return [engine for engine in map(self.membership.get, ids) if engine is not None]

    def plans(self) -> list[Plan]:
        """How many engines each pool should have, and why."""
        return self._replicas.plans(self._clock.now_ms())

    @property
    def version(self) -> tuple[int, int]:
        """Another after every change of who may take requests."""
        return self.membership.version, self.health.version

    def roster(self, wanted: Wanted) -> Roster:
        """Every ready engine that may take what is wanted."""
        return self.rosters.of(wanted)[0]

    def verify(self, engine: EngineId) -> None:
        """Asks the engine, with the next tick, what it holds, to compare the index with; the answer is its verdict."""
        self._verdicts.pop(engine, None)
        self._unverified.add(engine)

    def verdict(self, engine: EngineId) -> Verdict | None:
        """What came of `verify`, once something has."""
        return self._verdicts.get(engine)

    def cursor(self, engine: EngineId) -> Cursor | None:
        return self._cursors.get(engine)

    def _held(self, facts: Facts, chunks: Chunks, roster: Roster, places: Places) -> tuple[Counts, Counts]:
        """How many blocks from the start each engine holds in any tier, and on its GPU: one array if that is all."""
        if len(roster.shapes) == 1:
            return self._match(facts, chunks, roster.shapes[0][0], places)
        held, on_gpu = np.zeros((2, len(places)), np.int64)
        for shape, among in roster.shapes:
            held[among], on_gpu[among] = self._match(facts, chunks, shape, places[among])
        return held, on_gpu

    def _match(self, facts: Facts, chunks: Chunks, shape: Shape, places: Places) -> tuple[Counts, Counts]:
        depths = self.index.match(self._chain(facts, chunks, *shape))
        on_gpu = depths.at(places)
        return depths.with_offloaded_at(places) if depths.offloaded else on_gpu, on_gpu

    def _chain(self, facts: Facts, chunks: Chunks, block_size: int, adapter: str | None) -> Names:
        if facts.tokens is not None:
            return prompt_names(facts.tokens, block_size, adapter, facts.salt)
        return self.texts.predict(block_size, chunks)


def _refuse_former(engine: EngineId) -> wire.Refused:
    return wire.Refused(f"a later life of engine {engine} has joined: stop this one, or give it an id of its own")
