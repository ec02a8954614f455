"""The simulated engine's model: continuous batching with chunked prefill over a block pool, in virtual time.

Pure. One step: every running request gets its next tokens, then waiting ones are admitted, until the token budget, the
sequences or the blocks run out. Steps in which nothing but decoding happens are taken together, as a run.
"""

import heapq
import itertools

from vllm_llmd.due import once_answering
from vllm_llmd.errors import ConfigError
from vllm_llmd.kv_connector.turns import LOOKED_AT
from vllm_llmd.sim import batch
from vllm_llmd.sim.block_pool import BlockId, BlockPool
from vllm_llmd.sim.limits import Limits
from vllm_llmd.sim.offload import OffloadTier
from vllm_llmd.sim.requests import Counts, Report, SimRequest
from vllm_llmd.sim.runs import Run
from vllm_llmd.sim.speeds import Speeds
from vllm_llmd.sim.supplies import Supplies
from vllm_llmd.sim.turns import Turns

_Turn = tuple[bool, int, float, int]

PASSED_OVER = 64
"""So many of those that wait for what others bring are passed over in a step; vLLM sets no bound."""


class Scheduler:
    """One engine. Call `step` whenever `next_ms` has come; in between, requests come, go, and are supplied.

    `slowdown` stretches every step that begins from now on; `run_steps` bounds every run. `busy_ms` is how long all
    steps took that have ended.
    """

    def __init__(self, limits: Limits, speeds: Speeds) -> None:
        self.limits = limits
        self.speeds = speeds
        self.pool = BlockPool(limits.blocks)
        self.offload = OffloadTier(limits.offload_blocks) if limits.offload_blocks else None
        self.slowdown = 1.0
        self.run_steps = limits.run_steps
        self.counts = Counts()
        self.busy_ms = 0.0
        self.running: list[SimRequest] = []
        self.parked: dict[str, SimRequest] = {}
        self._known: dict[str, SimRequest] = {}
        self._waiting: list[tuple[_Turn, SimRequest]] = []
        self._turns = Turns(limits)
        self._supplies = Supplies(limits, self.parked)
        self._reloads: list[tuple[float, int, SimRequest, int]] = []
        self._numbers = itertools.count()
        self._batch: list[tuple[SimRequest, int]] = []
        self._run: Run | None = None
        self._poked_ms: float | None = None

    # --- from outside -------------------------------------------------------------------------------------------

    @property
    def next_ms(self) -> float | None:
        """When `step` has something to do; None until something comes from outside."""
        due_ms = [self._reloads[0][0]] if self._reloads else []
        if self._run is not None:
            due_ms.append(self._run.end_ms)
        elif self._poked_ms is not None:
            due_ms.append(self._poked_ms)
        return min(due_ms, default=None)

    @property
    def waiting(self) -> list[SimRequest]:
        """Those that wait for their turn, in no order; `parked` are those that wait for KV."""
        return [entry[-1] for entry in self._waiting if not entry[-1].gone]

    @property
    def step_ms(self) -> float:
        """How long the step takes that is under way."""
        return 0.0 if self._run is None else self._run.first_ms

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens of all requests that are still to be computed here: others supply what they are asked for."""
        here = (each for each in self.waiting if each.source is None or each.asked)
        return sum(max(each.prompt_tokens - each.computed, 0) for each in (*self.running, *here))

    @property
    def unplaced_tokens(self) -> int:
        """Prompt tokens of all requests that have no block yet, whoever computes them."""
        return sum(max(each.prompt_tokens - each.computed, 0) for each in (*self.running, *self.waiting))

    def uncomputed(self, request: SimRequest) -> int:
        """How many tokens of its prompt will still not be computed when the step under way has ended."""
        return batch.uncomputed(request, self._batch)

    def there(self, request: SimRequest) -> int:
        """How many tokens of its prompt are computed before the step under way has ended."""
        return batch.there(request, self._batch, self.limits.block_size)

    def submit(self, request: SimRequest, now_ms: float) -> None:
        """A request arrives. Raises ConfigError if it can never fit."""
        most = self.limits.max_tokens
        if (
            min(request.prompt_tokens, request.output_tokens) < 1
            or request.prompt_tokens + request.output_tokens > most
        ):
            raise ConfigError(
                f"prompt and answer must have at least a token each, and {most} together at most; got "
                f"{request.prompt_tokens} and {request.output_tokens}"
            )
        request.arrived_ms = now_ms
        self._known[request.id] = request
        self._queue(request)
        self._poke(now_ms)

    def abort(self, request_id: str, now_ms: float) -> None:
        """Nobody wants the request any more. One that is over or unknown stays as it is."""
        request = self._known.pop(request_id, None)
        if request is None:
            return
        request.gone = True
        self.parked.pop(request_id, None)
        self._supplies.ended(request)
        if request not in self.running:
            self._release(request)
        self._poke(now_ms)

    def supplied(self, request_id: str, end_token: int, now_ms: float) -> None:
        """The KV of a parked request's tokens up to `end_token` is here; if that is not all, the rest is computed."""
        request = self.parked.pop(request_id, None)
        if request is None:
            return
        came = min(end_token, request.prompt_tokens - 1) - request.computed
        if came > 0:
            request.computed += came
            self.counts.supplied += came
            self._name(request, request.computed)
        self._queue(request)
        self._poke(now_ms)

    def step(self, now_ms: float) -> Report:
        """Ends the step, or the run of steps, that is due, and begins the next."""
        report = Report()
        while self._reloads and self._reloads[0][0] <= now_ms:
            _, _, request, end_token = heapq.heappop(self._reloads)
            self.supplied(request.id, end_token, now_ms)
        if self._run is not None and self._run.end_ms <= now_ms:
            self.busy_ms += self._run.end_ms - self._run.began_ms
            self._end(report, self._run.steps)
            self._run = None
        if self._run is None:
            self._poked_ms = None
            self._begin(now_ms, report)
        return report

    # --- a step begins ------------------------------------------------------------------------------------------

    def _begin(self, now_ms: float, report: Report) -> None:
        self._batch = []
        self._drop_gone()
        if self.limits.policy == "priority":
            self._begin_turns()
        before = self.counts.preemptions
        budget = self._continue_running(self.limits.token_budget)
        preempted = self.counts.preemptions > before
        if not preempted:
            budget = self._admit_waiting(budget, now_ms, report)
        held = bool(self._turns.held)
        if not self._batch:
            self._poked_ms = now_ms if preempted or held else None
            return
        work = batch.work_of(self._batch)
        work.requests = len(report.admitted)
        steps = 1 if preempted or held or work.prefill_tokens or budget < 1 else self._steps_alike()
        first_ms = self.speeds.work_ms(work) * self.slowdown
        self._run = Run(now_ms, first_ms, self.speeds.growth_ms(work.decoding) * self.slowdown, steps)

    def _begin_turns(self) -> None:
        partial = [request for request in self.running if request.computed < request.total - 1]
        seats = self.limits.max_sequences - len(self.running)
        first = heapq.nsmallest(LOOKED_AT, self._waiting) if partial and seats > 0 else []
        could_begin = [each for _, each in first if not each.gone]
        if self.parked:
            could_begin = [each for each in could_begin if not self._is_on_its_way(each, self._cached(each))]
        self._turns.begin(partial, could_begin, self.pool.free)

    def _drop_gone(self) -> None:
        """Those that run and are over, or were aborted meanwhile."""
        gone = [request for request in self.running if request.gone]
        if gone:
            self.running = [request for request in self.running if not request.gone]
            for request in gone:
                self._release(request)

    def _continue_running(self, budget: int) -> int:
        """Gives everyone who runs its next tokens; what is left of the budget comes back."""
        at = 0
        while at < len(self.running) and budget > 0:
            request = self.running[at]
            if request in self._turns.held:
                at += 1
                continue
            tokens = min(request.total - request.computed, budget)
            if self._grow(request, tokens):
                self._batch.append((request, tokens))
                budget -= tokens
                at += 1
                continue
            victim = self._victim()
            at -= self.running.index(victim) < at
            budget += self._preempt(victim)
            if victim is request:
                break
        return budget

    def _victim(self) -> SimRequest:
        if self.limits.policy == "fcfs":
            return self.running[-1]
        return max(self.running, key=lambda request: (request.priority, request.arrived_ms))

    def _preempt(self, victim: SimRequest) -> int:
        """Sends the victim back to wait; the tokens that it had been given in this step come back."""
        given = sum(tokens for request, tokens in self._batch if request is victim)
        self._batch = [entry for entry in self._batch if entry[0] is not victim]
        self.running.remove(victim)
        self._release(victim)
        victim.preemptions += 1
        self.counts.preemptions += 1
        self._queue(victim)
        return given

    def _admit_waiting(self, budget: int, now_ms: float, report: Report) -> int:
        passed_over = []
        while self._waiting and budget > 0 and len(self.running) < self.limits.max_sequences:
            request = self._waiting[0][-1]
            if not request.gone:
                hits = None if self._turns.passes_over(request) else self._cached(request)
                if hits is None or self._is_on_its_way(request, hits):
                    passed_over.append(self._waiting[0])
                else:
                    tokens = self._admit(request, hits, budget, now_ms, report)
                    if tokens is None:
                        break
                    budget -= tokens
            heapq.heappop(self._waiting)
            if len(passed_over) == PASSED_OVER:
                break
        for entry in passed_over:
            heapq.heappush(self._waiting, entry)
        return budget

    def _cached(self, request: SimRequest) -> list[BlockId]:
        """What it would find of its tokens but the last; nothing if it has blocks already."""
        return [] if request.blocks else self.pool.cached(request.names, (request.total - 1) // self.limits.block_size)

    def _admit(
        self, request: SimRequest, hits: list[BlockId], budget: int, now_ms: float, report: Report
    ) -> int | None:
        """The tokens given to a waiting request: 0 if it goes to wait for KV, None if there are no blocks for it."""
        computed = request.computed or len(hits) * self.limits.block_size
        reload_end = self._reload_end(request, computed)
        loads = reload_end is not None or self._supplies.wants(request, computed)
        tokens = 0 if loads else min(request.total - computed, budget)
        needed = self.limits.blocks_of(request.prompt_tokens if loads else computed + tokens)
        needed -= len(request.blocks) + len(hits)
        if needed > self.pool.free - self.pool.unheld(hits):
            return None
        self._give(request, hits, needed)
        if not loads:
            self._start(request, tokens, report)
            return tokens
        self.parked[request.id] = request
        if reload_end is not None:
            due_ms = now_ms + self.speeds.reload_ms(reload_end - computed) * self.slowdown
            heapq.heappush(self._reloads, (due_ms, next(self._numbers), request, reload_end))
        else:
            self._supplies.asked(request, computed)
            report.wanted.append(request)
        return 0

    def _is_on_its_way(self, request: SimRequest, hits: list[BlockId]) -> bool:
        """Whether it waits for what is being sent here for another one, after what it finds."""
        if not self.parked or request.blocks:
            return False
        return self._supplies.come_for_another(request, len(hits) * self.limits.block_size)

    def _reload_end(self, request: SimRequest, computed: int) -> int | None:
        """Up to which token the offload tier has what follows the first `computed` ones."""
        size = self.limits.block_size
        if self.offload is None or computed % size:
            return None
        blocks = self.offload.held_from(request.names, computed // size, (request.total - 1) // size)
        end_token = min(computed + blocks * size, request.prompt_tokens - 1)
        return end_token if end_token > computed else None

    def _give(self, request: SimRequest, hits: list[BlockId], more: int) -> None:
        """A waiting request gets the blocks that are cached of it, and more for what is to come."""
        if not request.blocks:
            request.computed = len(hits) * self.limits.block_size
            request.named = len(hits)
            if request.cached_tokens is None:
                self.counts.queried += request.prompt_tokens
                self.counts.hit += request.computed
        self.pool.hold(hits)
        request.blocks += hits
        if more > 0:
            request.blocks += self.pool.take(more)

    def _start(self, request: SimRequest, tokens: int, report: Report) -> None:
        if request.cached_tokens is None:
            request.cached_tokens = request.computed
            self.counts.prompt += request.prompt_tokens
            report.admitted.append(request)
        self._name(request, request.computed + tokens)
        self.running.append(request)
        self._batch.append((request, tokens))

    def _steps_alike(self) -> int:
        """How many steps like this one follow each other: until someone has all of its tokens, or blocks run short."""
        steps = min(self.run_steps, *(request.output_tokens - request.made for request, _ in self._batch))
        while steps > 1 and self._blocks_for(steps) > self.pool.free:
            steps //= 2
        return steps

    def _blocks_for(self, steps: int) -> int:
        size = self.limits.block_size
        most = len(self._batch) * (steps // size + 1)
        if most <= self.pool.free:
            return most
        return sum(max(-(-(each.computed + steps) // size) - len(each.blocks), 0) for each, _ in self._batch)

    # --- a step ends --------------------------------------------------------------------------------------------

    def _end(self, report: Report, steps: int) -> None:
        self.counts.steps += steps
        for request, tokens in self._batch:
            if steps > 1:
                grown = self._grow(request, steps)
                assert grown, "a run ends before blocks run out"
            request.computed += tokens if steps == 1 else steps
            if request.computed < request.prompt_tokens + request.made or request.gone:
                continue
            request.made += steps
            request.priority = once_answering(request.priority)
            self.counts.generated += steps
            report.made.append((request, steps))
            if request.made >= request.output_tokens:
                report.finished.append(request)
        self._batch = []
        if report.finished:
            for request in report.finished:
                request.gone = True
                self._known.pop(request.id)
                self._supplies.ended(request)
            self.counts.finished_requests += len(report.finished)
            self._drop_gone()

    # --- blocks and queues --------------------------------------------------------------------------------------

    def _grow(self, request: SimRequest, tokens: int) -> bool:
        """Room for so many more tokens; False if there is none."""
        size = self.limits.block_size
        end = request.computed + tokens
        needed = -(-end // size) - len(request.blocks)
        if needed > 0:
            if needed > self.pool.free:
                return False
            request.blocks += self.pool.take(needed)
        if request.named < len(request.names) and end // size > request.named:
            self._name(request, end)
        return True

    def _name(self, request: SimRequest, tokens: int) -> None:
        """The request's full blocks among the first `tokens` tokens can be found by others from now on."""
        full = min(tokens // self.limits.block_size, len(request.names))
        if full <= request.named:
            return
        for at in range(request.named, full):
            self.pool.name(request.blocks[at], request.names[at])
        if self.offload is not None:
            self.offload.store(request.names[request.named : full])
        request.named = full

    def _release(self, request: SimRequest) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
        request.computed = request.named = 0

    def _queue(self, request: SimRequest) -> None:
        """Who holds blocks goes first: others may wait for them."""
        priority = request.priority if self.limits.policy == "priority" else 0
        key = (not request.blocks, priority, request.arrived_ms, next(self._numbers))
        heapq.heappush(self._waiting, (key, request))

    def _poke(self, now_ms: float) -> None:
        """There is something new to look at, as soon as the step under way has ended."""
        if self._run is None:
            self._poked_ms = now_ms
        else:
            self._run = self._run.cut(now_ms)
