"""The real router's part of a simulation: its fleet, told by messages, and a policy that decides. Pure."""

from array import array
from dataclasses import dataclass, replace
from typing import Final

from vllm_llmd.clock import Clock
from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Candidates
from vllm_llmd.router.decide import Decision, decision_of, placed
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.placement.prospects import Prospect, prospect
from vllm_llmd.router.policy import Policy
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import NOTHING, Wish, still_due, with_wish
from vllm_llmd.router.upstream import turns
from vllm_llmd.router.upstream.seen import Measured
from vllm_llmd.router.waiting.admission import Admission
from vllm_llmd.router.waiting.flow import Arrival
from vllm_llmd.router.waiting.preemption import Running
from vllm_llmd.simulate.trace import Tokens
from vllm_llmd.wire import LinkMessage

BEGAN_UNIX_MS: Final = 1_790_000_000_000.0
"""When simulated time begins, in milliseconds since 1970: any time that a router could live in."""

_NOTHING = Facts(None, None, b"", b"", 0, None)


@dataclass(frozen=True)
class Call:
    """One request at the router."""

    id: str
    facts: Facts
    came_ms: float
    wish: Wish = NOTHING


@dataclass(frozen=True)
class _Planned:
    """Where a request would go if it was placed at once, and what that was found among."""

    request: str
    candidates: Candidates
    prospect: Prospect


class Routing:
    """Does for a request what `router/serving/front.py` and `router/serving/dispatch.py` do, without HTTP."""

    def __init__(self, settings: RouterSettings, clock: Clock, policy: Policy) -> None:
        self.fleet = Fleet(settings, clock, "simulated")
        self.admission = Admission(settings, self.fleet)
        self._clock = clock
        self._policy = policy
        self._no_text = self.fleet.cut(_NOTHING)
        self._planned: _Planned | None = None

    def told(self, message: LinkMessage) -> None:
        """An engine says so. What the router owes it in return, a simulated engine does not need."""
        self.fleet.on_message(b"", message)

    def call(self, request: str, prompt: Tokens, most_tokens: int | None = None, wish: Wish = NOTHING) -> Call:
        """A prompt of token ids, which comes now. The client may have set a bound on the answer, in tokens.

        Policies that look at text see four bytes for each token.
        """
        text = prompt.tobytes()
        facts = replace(
            _NOTHING, tokens=array("I", text), text=text, prompt_tokens=len(prompt), output_tokens=most_tokens
        )
        return Call(request, with_wish(facts, wish), self._clock.now_ms(), wish)

    def arrival(self, call: Call) -> Arrival:
        """What of it decides how it waits."""
        return self.admission.arrival(call.id, call.facts, len(call.facts.text), call.came_ms)

    def plan(self, call: Call) -> Prospect | None:
        """Where it would go now, and whether it does better to wait. None if nobody can take it."""
        facts = still_due(call.facts, self._clock.now_ms() - call.came_ms)
        candidates = self.fleet.candidates(facts, self._no_text)
        found = prospect(facts, candidates, self._policy, self._is_saturated)
        self._planned = None if found is None else _Planned(call.id, candidates, found)
        return found

    def place(self, call: Call) -> Decision | None:
        """Where it goes, and from whom its KV comes; counted until `done`. None if nobody can take it.

        That is where it has just been planned to go, unless it was then still to wait.
        """
        planned = self._planned
        if planned is None or planned.request != call.id or planned.prospect.wait is not None:
            self.plan(call)
            planned = self._planned
        self._planned = None
        if planned is None:
            return None
        decision = decision_of(planned.prospect.choice, call.facts, planned.candidates)
        placed(decision, call.facts, planned.candidates, self._policy)
        self.fleet.place(call.id, decision, call.facts, self._no_text)
        return decision

    def priority(self, call: Call, decision: Decision, engine: EngineId) -> int:
        """What an engine that schedules by priority is told of the request, or of the order that is placed for it."""
        came_ms, work_ms = BEGAN_UNIX_MS + call.came_ms, decision.work_ms.get(engine)
        return turns.priority(call.wish.priority, came_ms, work_ms, call.wish.ttft_ms, decision.gives(engine))

    def _is_saturated(self, engine: Engine) -> bool:
        return self.admission.is_saturated(engine, self._clock.now_ms())

    def began(self, call: Call, decision: Decision, given_up: int) -> None:
        """Its engine has it, after others had to leave it so often. Best effort may be given up from now on."""
        item = self.admission.item(self.arrival(call), call.wish)
        running = Running(item, tuple(decision.prefill_tokens), self._clock.now_ms(), given_up)
        self.admission.preemption.began(running)

    def given_up(self, call: Call, decision: Decision) -> None:
        """Its engines were told to leave it: it comes again."""
        self.admission.preemption.ended(call.id)
        self.fleet.withdrawn(call.id, decision)

    def answering(self, request: str, decision: Decision) -> None:
        """The first token has come."""
        self.admission.preemption.ended(request)
        self.fleet.answering(request, decision)

    def done(self, request: str, decision: Decision) -> None:
        """The answer has ended, or there will be none."""
        self.admission.preemption.ended(request)
        self.fleet.done(request, decision)

    def answered(self, request: str, decision: Decision, measured: Measured) -> None:
        """What the answer tells of the engines' speed. To be told before `done`."""
        self.fleet.answered(request, decision, measured)
