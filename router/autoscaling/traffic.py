"""Follows every request through the router, and every load report, to know what is asked of which engines. Pure state.

Engines that serve the same base model in the same role are one pool: a deployment that is scaled as a whole.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from vllm_llmd.names import EngineId, Role
from vllm_llmd.router.autoscaling.demand import Computed, Pool, Prompt, Told, Window
from vllm_llmd.router.decide import Decision
from vllm_llmd.router.members.membership import Engine, Membership
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import NOTHING, Wish
from vllm_llmd.router.upstream.usage import Usage

MOST_REQUESTS: Final = 65_536
"""Requests under way that are remembered; of those before, nothing more is learned."""

MOST_TOKENS: Final = 10**9
"""No answer has more; what an engine says is not believed for granted."""


@dataclass
class _Request:
    """`prompts` are what it gave to compute; `pool` is that of its destination."""

    served: str
    wish: Wish
    waits: bool = False
    prompts: list[Computed] = field(default_factory=list)
    pool: Pool | None = None


@dataclass
class Served:
    """One base model. Requests were `asked` for and `placed`, and so many are `waiting` in the router."""

    asked: Window
    placed: Window
    pools: dict[Role, Pool] = field(default_factory=dict)
    waiting: int = 0


class Traffic:
    """By name of the base model; the first that its engines tell."""

    def __init__(self, settings: RouterSettings, membership: Membership, began_ms: float) -> None:
        self._membership = membership
        self._ttft_ms, self._tpot_ms = float(settings.slo_ttft_ms), float(settings.slo_tpot_ms)
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        self._names: dict[str | None, str | None] = {}
        self._names_version = -1
        self.window_ms = float(settings.scaling_window_ms)
        self.began_ms = began_ms
        self.models: dict[str, Served] = {}

    # --- requests -----------------------------------------------------------------------------------------------

    def asked(self, request: str, model: str | None, wish: Wish, now_ms: float) -> None:
        """A request has come. One for a model that no engine serves is not of interest."""
        served = self._served_by(model)
        if served is not None:
            self._note(request, served, wish, now_ms)

    def waits(self, request: str) -> None:
        """It waits in the router."""
        known = self._requests.get(request)
        if known is not None and not known.waits:
            known.waits = True
            self.models[known.served].waiting += 1

    def waits_no_more(self, request: str) -> None:
        """It has been let in, was sent away or has left."""
        known = self._requests.get(request)
        if known is not None and known.waits:
            known.waits = False
            self.models[known.served].waiting -= 1

    def placed(self, request: str, decision: Decision, now_ms: float) -> None:
        """An engine is asked for it; only the first one counts."""
        destination = self._membership.get(decision.destination)
        if destination is None:
            return
        known = self._requests.get(request)
        if known is None:
            known = self._note(request, served_name(destination), NOTHING, now_ms)
        if known.pool is not None:
            return
        known.pool = self.pool(destination, now_ms)
        known.pool.answers.add(1.0, now_ms)
        self.models[known.served].placed.add(1.0, now_ms)
        for engine_id, own in decision.prefill_tokens.items():
            engine = self._membership.get(engine_id)
            if engine is not None and (own or len(decision.prefill_tokens) == 1):
                self._compute(known, engine, _prompt(decision, engine_id, own, self._ttft_of(known.wish)), now_ms)

    def answering(self, request: str, now_ms: float) -> None:
        """Its answer has begun: what it gave to compute has been."""
        known = self._requests.get(request)
        for part in known.prompts if known is not None else ():
            part.pool.computed(part.engine, part.prompt, now_ms)

    def answered(self, request: str, usage: Usage | None) -> None:
        """Its answer has come."""
        known = self._requests.get(request)
        if known is not None and known.pool is not None and usage is not None and usage.completion_tokens:
            prompt_tokens, output_tokens = (
                float(min(max(each, 0), MOST_TOKENS)) for each in (usage.prompt_tokens, usage.completion_tokens)
            )
            told = Told(prompt_tokens, output_tokens, self._tpot_of(known.wish), tuple(known.prompts))
            known.pool.told.append(told)

    def done(self, request: str) -> None:
        """It is over, well or not."""
        self.waits_no_more(request)
        self._requests.pop(request, None)

    def _compute(self, known: _Request, engine: Engine, prompt: Prompt, now_ms: float) -> None:
        pool = self.pool(engine, now_ms)
        pool.placed(prompt, now_ms)
        known.prompts.append(Computed(pool, engine.info.id, prompt))

    def _note(self, request: str, served: str, wish: Wish, now_ms: float) -> _Request:
        if len(self._requests) >= MOST_REQUESTS:
            self.done(next(iter(self._requests)))
        known = self._requests[request] = _Request(served, wish)
        self._model(served).asked.add(1.0, now_ms)
        return known

    def _ttft_of(self, wish: Wish) -> float | None:
        return wish.ttft_ms or (None if wish.priority < 0 else self._ttft_ms)

    def _tpot_of(self, wish: Wish) -> float | None:
        return wish.tpot_ms or (None if wish.priority < 0 else self._tpot_ms)

    # --- engines ------------------------------------------------------------------------------------------------

    def reported(self, engine: Engine, now_ms: float) -> None:
        """The engine has told its load."""
        self.pool(engine, now_ms).reported(engine.info.id, engine.load, now_ms)

    def left(self, engine: EngineId) -> None:
        """It is gone, or begins another life."""
        for served in self.models.values():
            for pool in served.pools.values():
                pool.engines.pop(engine, None)

    def pool(self, engine: Engine, now_ms: float) -> Pool:
        """The pool that the engine belongs to."""
        pools = self._model(served_name(engine)).pools
        known = pools.get(engine.info.role)
        if known is None:
            known = pools[engine.info.role] = Pool(self.window_ms, now_ms)
        return known

    def _model(self, served: str) -> Served:
        known = self.models.get(served)
        if known is None:
            asked, placed = (Window(self.window_ms, self.began_ms) for _ in range(2))
            known = self.models[served] = Served(asked, placed)
        return known

    def _served_by(self, model: str | None) -> str | None:
        """The base model of the engines that serve a name; None if nobody does."""
        if self._names_version != self._membership.version:
            self._names_version = self._membership.version
            self._names.clear()
        if model not in self._names:
            takers = (engine for engine in self._membership.all() if engine.info.serves(model))
            self._names[model] = next(map(served_name, takers), None)
        return self._names[model]


def served_name(engine: Engine) -> str:
    """The name of the base model that an engine serves."""
    return engine.info.models[0] if engine.info.models else ""


def _prompt(decision: Decision, engine: EngineId, own: int, ttft_ms: float | None) -> Prompt:
    """What an engine is to compute. Who is not the source begins where the source ends, or where its own cache does."""
    seen = decision.seen
    prompt_tokens = float(own) if seen is None else max(seen.prompt_tokens, float(own))
    end = prompt_tokens
    if engine == decision.source and decision.source_until is not None:
        end = min(float(decision.source_until), prompt_tokens)
    moved = float(own) if engine == decision.source else 0.0
    return Prompt(float(own), max(end - own, 0.0), ttft_ms, moved)
