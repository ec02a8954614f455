"""A fleet of modelled engines behind the real router, in virtual time: from requests to what became of them. Pure.

Every engine's model is asked when it next has something to do; arrivals, steps, transfers and load reports happen in
order of time. Nothing is lost on the way and nothing takes time but what the model says does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels.hash_chain_cpu import chain_names
from vllm_llmd.names import BlockName, EngineId
from vllm_llmd.router.decide import Decision
from vllm_llmd.router.upstream.seen import Measured
from vllm_llmd.router.upstream.usage import Usage
from vllm_llmd.router.waiting.flow import Shed
from vllm_llmd.sim.requests import Report, SimRequest
from vllm_llmd.sim.transfer import Transfer, order_tokens
from vllm_llmd.simulate.events import Events
from vllm_llmd.simulate.member import Member
from vllm_llmd.simulate.outcomes import Outcome, Played
from vllm_llmd.simulate.routing import Call, Routing
from vllm_llmd.simulate.trace import TraceRequest
from vllm_llmd.simulate.waiting import Waiting

Follow = Callable[[int, float], Sequence[TraceRequest]]
"""What users ask because the request of that number has ended, at that time: none of it is earlier than that."""

QUIET_REPORTS = 3
"""An engine with nothing to do has told all it has to tell after so many load reports."""

STUCK_MS = 60_000
"""An order that nobody makes progress with for so long is given up."""


def nothing_follows(number: int, now_ms: float) -> Sequence[TraceRequest]:
    """As where all requests are known from the start."""
    return ()


@dataclass(slots=True, eq=False)
class _Asked:
    """A request of that number at its destination; `source_priority` is that of the order that it may place."""

    number: int
    call: Call
    decision: Decision
    member: Member
    request: SimRequest
    outcome: Outcome
    source_priority: int


@dataclass(slots=True, eq=False)
class _Order:
    """What `member` waits for, up to token `end_token`: `source` has it as `asked`. It is `coming` when computed."""

    member: Member
    source: Member
    request: SimRequest
    asked: SimRequest
    transfer: Transfer
    end_token: int
    coming: bool = False


class Simulation:
    """`routing` must use `events` as its clock; `heartbeat_ms` is how often engines report their load."""

    def __init__(self, members: Sequence[Member], routing: Routing, events: Events, heartbeat_ms: float) -> None:
        self._members = members
        self._by_id: dict[EngineId, Member] = {member.id: member for member in members}
        self._routing = routing
        self._events = events
        self._waiting = Waiting(routing.admission, events, self._take_back)
        self._heartbeat_ms = heartbeat_ms
        self._asked: dict[str, _Asked] = {}
        self._orders: dict[str, _Order] = {}
        self._progress_ms = 0.0
        self._unfinished = 0
        self._played = Played()

    def run(self, requests: Sequence[TraceRequest], follow: Follow = nothing_follows) -> Played:
        """Plays all requests, in order of arrival, to their ends, and what follows from these, which is numbered on."""
        for place, member in enumerate(self._members):
            for message in member.hello():
                self._routing.told(message)
            member.phase_ms = self._heartbeat_ms * place / len(self._members)
            self._events.at(member.phase_ms, self._report_load, member)
        self._played.outcomes = [_unanswered(each) for each in requests]
        self._unfinished = self._told_before = len(requests)
        self._requests, self._follow = list(requests), follow
        self._events.at(requests[0].at_ms, self._arrive, 0)
        while self._unfinished and self._events.next():
            pass
        assert not self._unfinished, "every request ends"
        self._events.clear()
        self._played.end_ms = self._events.now_ms()
        self._played.engines = [member.totals() for member in self._members]
        self._played.steps = sum(member.model.counts.steps for member in self._members)
        return self._played

    # --- requests -----------------------------------------------------------------------------------------------

    def _arrive(self, number: int) -> None:
        if number + 1 < self._told_before:
            self._events.at(self._requests[number + 1].at_ms, self._arrive, number + 1)
        request = self._requests[number]
        call = self._routing.call(str(number), request.prompt(), request.most_tokens, request.wish)
        plan, then = partial(self._routing.plan, call), partial(self._let_in, number, call)
        self._waiting.admit(self._routing.arrival(call), call.wish, plan, then)

    def _let_in(self, number: int, call: Call, shed: Shed | None) -> None:
        """Its wait is over, or there was none."""
        outcome = self._played.outcomes[number]
        if shed is not None:
            outcome.shed = shed.reason
            self._ended(number)
            return
        outcome.sent_ms = self._events.now_ms()
        decision = self._routing.place(call)
        if decision is None:
            self._refuse(number, "no engine is ready, or none is long enough")
            return
        self._submit(number, call, decision)

    def _take_back(self, call_id: str) -> None:
        """Its engine is to leave it for the sake of another: what is computed of it stays in the cache for a while."""
        now_ms, name = self._events.now_ms(), _attempt(call_id, self._played.outcomes[int(call_id)])
        asked, order = self._asked.pop(name), self._orders.pop(_order_of(name), None)
        self._abandon(asked.member, asked.request, asked.outcome)
        if order is not None:
            self._abandon(order.source, order.asked, asked.outcome)
        asked.outcome.given_up(now_ms)
        self._routing.given_up(asked.call, asked.decision)
        self._waiting.look(asked.decision.destination, asked.decision.source)
        self._events.at(now_ms, self._come_again, asked)

    def _abandon(self, member: Member, request: SimRequest, outcome: Outcome) -> None:
        """The engine hears that nobody wants it any more; what is not computed of it will not be."""
        if request.cached_tokens is not None:
            left = min(member.model.uncomputed(request), request.prompt_tokens - request.cached_tokens)
            member.computed_tokens -= left
            outcome.computed_tokens -= left
        member.model.abort(request.id, self._events.now_ms())
        self._stirred(member)

    def _come_again(self, asked: _Asked) -> None:
        call = asked.call
        plan, then = partial(self._routing.plan, call), partial(self._let_in, asked.number, call)
        self._waiting.readmit(self._routing.arrival(call), call.wish, plan, then)

    def _submit(self, number: int, call: Call, decision: Decision) -> None:
        request, outcome = self._requests[number], self._played.outcomes[number]
        prompt = np.frombuffer(call.facts.text, np.uint32)
        member = self._by_id[decision.destination]
        size = member.info.block_size
        names: list[BlockName] = chain_names(np.concatenate((prompt, request.answer(number))), size).tolist()
        name = _attempt(call.id, outcome)
        asked = SimRequest(name, request.prompt_tokens, request.output_tokens, names, source=decision.source)
        asked.source_until, asked.source_least = decision.source_until, decision.source_least
        asked.priority = self._priority(call, decision, decision.destination)
        outcome.destination, outcome.source = decision.destination, decision.source
        outcome.predicted_cached_tokens = decision.predicted_blocks * size
        try:
            member.model.submit(asked, self._events.now_ms())
        except ConfigError as error:
            self._routing.done(call.id, decision)
            self._refuse(number, str(error))
            return
        member.requests += 1
        source_priority = self._priority(call, decision, decision.source)
        self._asked[name] = _Asked(number, call, decision, member, asked, outcome, source_priority)
        self._routing.began(call, decision, outcome.preempted)
        self._stirred(member)

    def _priority(self, call: Call, decision: Decision, engine: EngineId | None) -> int:
        if engine is None or not self._by_id[engine].info.priorities:
            return 0
        return self._routing.priority(call, decision, engine)

    def _refuse(self, number: int, why: str) -> None:
        self._played.outcomes[number].refused = why
        self._ended(number)

    def _ended(self, number: int) -> None:
        self._unfinished -= 1
        for request in self._follow(number, self._events.now_ms()):
            self._unfinished += 1
            self._events.at(request.at_ms, self._arrive, len(self._requests))
            self._requests.append(request)
            self._played.outcomes.append(_unanswered(request))

    # --- engines ------------------------------------------------------------------------------------------------

    def _stirred(self, member: Member) -> None:
        """Something has come to the engine from outside: its next step may be due sooner, and its load is another."""
        self._progress_ms = self._events.now_ms()
        self._arm(member)
        member.quiet = 0
        if member.asleep:
            member.asleep = False
            beats = (self._events.now_ms() - member.phase_ms) // self._heartbeat_ms + 1
            self._events.at(member.phase_ms + beats * self._heartbeat_ms, self._report_load, member)

    def _arm(self, member: Member) -> None:
        due_ms = member.model.next_ms
        if due_ms is not None and due_ms != member.armed_ms:
            self._events.at(due_ms, self._step, member)
        member.armed_ms = due_ms

    def _step(self, member: Member) -> None:
        now_ms = self._events.now_ms()
        if member.armed_ms is None or member.armed_ms > now_ms:
            return  # a step that was cut short, or has been taken
        self._deliver(member, member.model.step(now_ms))
        for change in member.changes():
            self._routing.told(change)
        member.armed_ms = None
        self._arm(member)

    def _deliver(self, member: Member, report: Report) -> None:
        now_ms = self._progress_ms = self._events.now_ms()
        for request in report.admitted:
            self._note_computed(member, request)
            order = self._orders.get(request.id)
            if order is not None and member.model.there(request) >= order.end_token:
                self._send(order)  # what was cached travels while the source computes
        for request in report.wanted:
            self._order(member, request)
        for request, tokens in report.made:
            asked = self._asked.get(request.id)
            if asked is not None:
                outcome = asked.outcome
                outcome.made_tokens += tokens
                outcome.last_ms = now_ms
                if outcome.first_ms is None:
                    outcome.first_ms = now_ms
                    self._routing.answering(asked.call.id, asked.decision)
                    self._waiting.look(asked.decision.destination, asked.decision.source)
        for request in report.finished:
            order = self._orders.get(request.id)
            if order is not None:
                self._send(order)
            if request.id not in self._asked:
                continue  # an order, which may have brought all that it was for
            asked = self._asked.pop(request.id)
            self._routing.answered(asked.call.id, asked.decision, _measured(asked.outcome, request))
            self._routing.done(asked.call.id, asked.decision)
            self._waiting.look(asked.decision.destination, asked.decision.source)
            self._ended(asked.number)

    def _note_computed(self, member: Member, request: SimRequest) -> None:
        tokens = request.prompt_tokens - (request.cached_tokens or 0)
        member.computed_tokens += tokens
        order = self._orders.get(request.id)
        self._asked[request.id if order is None else order.request.id].outcome.computed_tokens += tokens

    def _report_load(self, member: Member) -> None:
        self._routing.told(member.heartbeat())
        if member.idle:
            member.quiet += 1
        if member.quiet < QUIET_REPORTS:
            self._events.at(self._events.now_ms() + self._heartbeat_ms, self._report_load, member)
        else:
            member.asleep = True
        if self._events.now_ms() - self._progress_ms > STUCK_MS:
            self._give_up_orders()

    # --- orders -------------------------------------------------------------------------------------------------

    def _order(self, member: Member, request: SimRequest) -> None:
        """The destination orders what it lacks of the prompt, but the last token, or up to where it is told."""
        now_ms, asked = self._events.now_ms(), self._asked[request.id]
        decision = asked.decision
        source = self._by_id.get(decision.source or member.id)
        end_token = request.supplied_end
        if source is None or source is member or end_token <= request.computed:
            member.model.supplied(request.id, 0, now_ms)
            return
        tokens = order_tokens(end_token, source.info.block_size)
        names = request.names[: tokens // source.info.block_size]
        order = SimRequest(_order_of(request.id), tokens, 1, names, priority=asked.source_priority)
        transfer = Transfer(now_ms, end_token - request.computed, source.model.limits.token_budget)
        self._orders[order.id] = _Order(member, source, request, order, transfer, end_token)
        member.orders_placed += 1
        source.orders_served += 1
        source.model.submit(order, now_ms)
        self._stirred(source)

    def _send(self, order: _Order) -> None:
        """All of it is computed, and travels from now on, if it has not before."""
        if not order.coming:
            order.coming = True
            due_ms = order.transfer.here_ms(self._events.now_ms(), order.member.model.speeds)
            self._events.at(due_ms, self._supply, order.asked.id)

    def _supply(self, order_id: str) -> None:
        order = self._orders.pop(order_id, None)
        if order is not None:
            order.member.model.supplied(order.request.id, order.end_token, self._events.now_ms())
            self._stirred(order.member)

    def _give_up_orders(self) -> None:
        """Engines whose blocks are all held by requests that wait for each other's KV: each computes by itself."""
        for order_id, order in list(self._orders.items()):
            del self._orders[order_id]
            order.source.model.abort(order_id, self._events.now_ms())
            self._stirred(order.source)
            order.member.model.supplied(order.request.id, 0, self._events.now_ms())
            self._stirred(order.member)
            self._played.given_up += 1


def _unanswered(request: TraceRequest) -> Outcome:
    asked = request.at_ms, request.prompt_tokens, request.output_tokens
    return Outcome(*asked, slo=request.slo, priority=request.wish.priority)


def _attempt(call_id: str, outcome: Outcome) -> str:
    """What engines call it: another name each time that it comes to one."""
    return f"{call_id}.{outcome.preempted}"


def _order_of(name: str) -> str:
    return f"{name} order"


def _measured(outcome: Outcome, request: SimRequest) -> Measured:
    """A finished answer, as the router would see it streamed; it counts from when it sent the request."""
    assert outcome.sent_ms is not None and outcome.first_ms is not None and outcome.last_ms is not None
    usage = Usage(request.prompt_tokens, request.cached_tokens, request.made)
    return Measured(outcome.first_ms - outcome.sent_ms, outcome.last_ms - outcome.sent_ms, True, usage)
