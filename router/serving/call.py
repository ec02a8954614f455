"""One client request on its way through the router, and what of it an engine is sent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Candidates
from vllm_llmd.router.decide import Decision
from vllm_llmd.router.index.texts import Chunks
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.placement.prospects import Prospect
from vllm_llmd.router.request import Facts
from vllm_llmd.router.slo import Wish
from vllm_llmd.router.upstream import rewrite, turns
from vllm_llmd.router.upstream.attempt import Attempt
from vllm_llmd.router.upstream.begun import Begun
from vllm_llmd.router.upstream.failover import Way
from vllm_llmd.router.waiting.bodies import Hold
from vllm_llmd.router.waiting.flow import Arrival


@dataclass(frozen=True)
class Planned:
    """A prospect, and what it was made of: the facts and the fleet as of `version`. Making it took `took_ms`.

    `saturated` are places of candidates, told only if it is to be recorded.
    """

    version: tuple[int, int]
    facts: Facts
    candidates: Candidates
    prospect: Prospect | None
    took_ms: float
    saturated: tuple[int, ...] = ()


@dataclass
class Call:
    """One client request; `body` is what there is in `raw` besides the prompt, and `facts` what is known of that.

    `asks_usage` says that the usage of its stream can be asked for, and that the client does not ask for it itself.
    It came at `came_unix_ms`, in milliseconds since 1970; `band` is its priority, None for what we cannot read.
    `way` is how its stream is continued if it breaks, None where it cannot be. Once its answer has begun, `begun` is
    what the client gets.
    """

    id: str
    http: web.Request
    raw: bytes
    body: dict[str, Any]
    facts: Facts
    chunks: Chunks
    began_ms: float
    asks_usage: bool
    wish: Wish
    came_unix_ms: float
    band: int | None
    way: Way | None
    arrival: Arrival
    hold: Hold
    """Room for its body."""
    explain: bool = False
    """Whether the client wants to know why."""
    session: str | None = None
    waited_ms: float = 0.0
    """In the queue."""
    planned: Planned | None = None
    """Where it would go, until it does."""
    decisions: int = 0
    """Made for it so far."""
    explained: Mapping[str, str] = field(default_factory=dict)
    """Headers that tell the client of the latest."""
    given_up: int = 0
    """How often an engine had it and was told to leave it, for the sake of others."""
    begun: Begun | None = None
    broken: str | None = None
    """Why its answer is not whole."""
    tried: list[EngineId] = field(default_factory=list)

    @property
    def breaks(self) -> int:
        """How many engines have failed midway and left it to others to go on."""
        return self.begun.told.breaks if self.begun is not None and self.begun.told is not None else 0

    def forget_body(self) -> None:
        """No other engine will be asked: what is known of the request is enough."""
        self.raw, self.body = b"", {}
        self.facts = self.facts.without_prompt()
        self.hold.let_go()


def asks_usage_of(engine: Engine, call: Call) -> bool:
    """Whether the engine is asked for a usage that the client does not want."""
    return call.asks_usage and engine.takes_stream_options


def attempt_at(engine: Engine, call: Call, decision: Decision) -> Attempt:
    """What an engine is sent. One without our plugin gets no hint: it would not understand it."""
    asking = rewrite.asking_for_usage(call.raw, call.body) if asks_usage_of(engine, call) else None
    raw, body = asking or (call.raw, call.body)
    turn = _turn(engine, call, decision)
    if turn is not None:
        raw, body = rewrite.with_priority(raw, body, turn)
    traced = call.way is not None and engine.stock is None
    if traced:
        raw = rewrite.asking_for_token_ids(raw, body)
    if call.begun is not None and call.begun.told is not None:
        raw = call.begun.told.rest(raw)
    if engine.stock is None:
        sent = rewrite.with_hint(raw, body, {"llmd": _hint(call, decision)})
    else:
        sent = rewrite.without_hint(raw, body)
    headers = rewrite.request_headers(call.http.headers.items(), call.id)
    if asking is not None or traced:
        headers = rewrite.uncompressed(headers)
    if engine.stock is not None and engine.stock.rank is not None:
        headers = rewrite.for_rank(headers, engine.stock.rank)
    return Attempt(engine.info.http.rstrip("/") + call.http.path, headers, sent)


def _turn(engine: Engine, call: Call, decision: Decision) -> int | None:
    """The priority that an engine is told; None if there is nothing to tell it, or it would not understand."""
    if not engine.info.priorities or call.band is None:
        return None
    return _priority(call, call.band, decision, engine.info.id)


def _priority(call: Call, band: int, decision: Decision, engine: EngineId) -> int | None:
    """None if it would say nothing."""
    work_ms, gives = decision.work_ms.get(engine), decision.gives(engine)
    return turns.priority(band, call.came_unix_ms, work_ms, call.wish.ttft_ms, gives) or None


def _hint(call: Call, decision: Decision) -> dict[str, Any]:
    hint: dict[str, Any] = {"request": call.id}
    if decision.source is None:
        return hint
    priority = None if call.band is None else _priority(call, call.band, decision, decision.source)
    source = {
        "engine": decision.source,
        "until": decision.source_until,
        "priority": priority,
        "least": decision.source_least,
    }
    said = {name: value for name, value in source.items() if value is not None}
    return {**hint, "source": decision.source} if len(said) == 1 else {**hint, "sources": [said]}
