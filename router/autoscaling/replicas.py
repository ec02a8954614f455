"""How many engines each pool should have: puts what is asked and how fast engines are to `scaling.desired`. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

import numpy as np

from vllm_llmd.names import Role
from vllm_llmd.router.autoscaling.demand import Pool, Prompt, Told, column, prefill_ms
from vllm_llmd.router.autoscaling.scaling import MOST, PLACED_AMONG, Ability, Demand, Desired, Goal, desired
from vllm_llmd.router.autoscaling.traffic import Served, Traffic, served_name
from vllm_llmd.router.costs import CHUNK_TOKENS
from vllm_llmd.router.learning.engine_model import ENOUGH, Models
from vllm_llmd.router.members.membership import Engine, Membership, State
from vllm_llmd.router.members.rates import Rates
from vllm_llmd.router.settings import RouterSettings

STARTING: Final = (State.JOINING, State.READY)

BY_QUEUES: Final = ("cost",)
"""Policies that send a prompt to whichever prefill engine is done with it first, by what that has yet to compute: with
engines that each take one prompt after the other, that is one queue for all of them.
"""

LEAST_MS: Final = 1.0
"""What a request that waits takes at least, whatever is known of others."""

UNBOUNDED: Final = 1e12
"""Tokens, or sequences, of an engine that does not say how many it has room for."""


@dataclass(frozen=True)
class Plan:
    """What is wanted of one pool, which has `engines` now, and what is asked of it per second."""

    model: str
    role: Role
    engines: int
    desired: Desired
    demand: Demand
    requests_per_s: float
    prefill_tokens_per_s: float
    output_tokens_per_s: float

    def shown(self) -> dict[str, object]:
        """As JSON has it."""
        wanted = self.desired
        return {
            "model": self.model,
            "role": self.role,
            "engines": self.engines,
            "desired": wanted.replicas,
            "bound": wanted.bound,
            "misses": {name: round(share, 4) for name, share in asdict(wanted.misses).items()},
            "requests_per_s": round(self.requests_per_s, 3),
            "prefill_tokens_per_s": round(self.prefill_tokens_per_s, 1),
            "output_tokens_per_s": round(self.output_tokens_per_s, 1),
            "sequences": round(wanted.sequences, 2),
            "prefill_load": round(self.demand.prefill_load, 3),
        }


class Replicas:
    """Plans for all pools, made when they are asked for."""

    def __init__(self, settings: RouterSettings, membership: Membership, models: Models, traffic: Traffic) -> None:
        self._settings = settings
        self._membership = membership
        self._models = models
        self._traffic = traffic

    def plans(self, now_ms: float) -> list[Plan]:
        """One for each pool that there is, or was."""
        members: dict[tuple[str, Role], list[Engine]] = {}
        for engine in self._membership.all():
            self._traffic.pool(engine, now_ms)
            if engine.state in STARTING and not engine.draining:
                members.setdefault((served_name(engine), engine.info.role), []).append(engine)
        made = []
        for name, served in self._traffic.models.items():
            there = {role: members.get((name, role), []) for role in served.pools}
            made += self._plans_of(name, served, there, now_ms)
        return made

    def _plans_of(self, name: str, served: Served, there: Mapping[Role, Sequence[Engine]], now_ms: float) -> list[Plan]:
        asked = {role: self._asked(served, role, there[role], now_ms) for role in served.pools}
        wanted = {role: self._wanted(*each) for role, each in asked.items()}
        if "prefill" in asked and "decode" in asked:
            wanted |= self._apart(asked["prefill"], asked["decode"], wanted["prefill"])
        return [
            Plan(
                model=name,
                role=role,
                engines=len(there[role]),
                desired=self._safe(wanted[role], pool, len(there[role]), now_ms),
                demand=asked[role][0],
                requests_per_s=1000 * max(asked[role][0].prefills_per_ms, asked[role][0].answers_per_ms),
                prefill_tokens_per_s=1000 * pool.prefill_tokens.total(now_ms) / pool.prefill_tokens.covered_ms(now_ms),
                output_tokens_per_s=1000 * asked[role][0].tokens_per_ms,
            )
            for role, pool in served.pools.items()
        ]

    def _wanted(self, demand: Demand, ability: Ability, missing: float | None = None) -> Desired:
        settings = self._settings
        allowed = 1 - settings.slo_percent / 100 if missing is None else missing
        goal = Goal(allowed, float(settings.scaling_window_ms), settings.min_replicas, settings.max_replicas)
        return desired(demand, ability, goal)

    def _apart(
        self, prefill: tuple[Demand, Ability], decode: tuple[Demand, Ability], alone: Desired
    ) -> dict[Role, Desired]:
        """Of the misses that are allowed, decoding gets half at most, and prefilling what is left of them.

        While prompts wait to be computed, their blocks are held where they will be decoded.
        """
        allowed = 1 - self._settings.slo_percent / 100
        held = replace(decode[0], held_ms=decode[0].held_ms + alone.wait_ms)
        decoding = self._wanted(held, decode[1], allowed / 2)
        return {"decode": decoding, "prefill": self._wanted(*prefill, max(allowed - decoding.misses.all, allowed / 2))}

    def _safe(self, wanted: Desired, pool: Pool, engines: int, now_ms: float) -> Desired:
        """No fewer than there are while too little is known to say so."""
        is_new = now_ms - self._traffic.began_ms < self._traffic.window_ms
        untried = bool(pool.prompts) and len(pool.prompts) + len(pool.told) < ENOUGH
        least = min(max(engines, self._settings.min_replicas), self._settings.max_replicas)
        if (is_new or untried) and wanted.replicas < least:
            return replace(wanted, replicas=least, bound="unknown")
        return wanted

    # --- what is asked of a pool, and what its engines can do -----------------------------------------------------

    def _asked(self, served: Served, role: Role, engines: Sequence[Engine], now_ms: float) -> tuple[Demand, Ability]:
        pool = served.pools[role]
        if engines:
            pool.rates = _mean_rates([self._models.rates(engine.info.id) for engine in engines])
            pool.kv_tokens = _mean([engine.info.num_blocks * engine.info.block_size for engine in engines])
            pool.sequences = _mean([engine.info.max_sequences or self._settings.engine_requests for engine in engines])
        corrections = {each: each.correction(now_ms) for each in served.pools.values()}
        correction, rates = corrections[pool], pool.rates
        per_ms = served.asked.total(now_ms) / served.asked.covered_ms(now_ms)
        placed = served.placed.total(now_ms)
        computes, answers = float(role != "decode"), float(role != "prefill")
        if placed:
            computes, answers = pool.prefills.total(now_ms) / placed, pool.answers.total(now_ms) / placed
        own_ms = correction * column([prefill_ms(prompt, rates) for prompt in pool.prompts])
        mean_ms = float(np.mean(own_ms)) if len(own_ms) else 0.0
        ahead = 0 if role == "decode" else sum(engine.tokens_ahead for engine in engines)
        own_tokens = float(np.mean([prompt.own for prompt in pool.prompts])) if pool.prompts else 0.0
        demand = Demand(
            prefills_per_ms=per_ms * computes,
            prefill_ms=own_ms,
            until_ms=column([_until_ms(prompt, rates) for prompt in pool.prompts]),
            placed_among=MOST if role == "prefill" and self._settings.policy in BY_QUEUES else PLACED_AMONG,
            backlog_ms=max(mean_ms, LEAST_MS) * served.waiting * computes + mean_ms * ahead / max(own_tokens, 1.0),
            answers_per_ms=per_ms * answers,
            output_tokens=column([told.output_tokens for told in pool.told]),
            tpot_ms=column([np.inf if told.tpot_ms is None else told.tpot_ms for told in pool.told]),
            kv_tokens=column([told.prompt_tokens + told.output_tokens / 2 for told in pool.told]),
            held_ms=column([_held_ms(told, corrections) for told in pool.told]),
        )
        return demand, self._ability(pool)

    def _ability(self, pool: Pool) -> Ability:
        """Steps that only decode, as engines tell of them; until they have, as the cost model has it from answers."""
        step_ms, step_running_ms = pool.rates.step_ms, pool.rates.step_running_ms
        if pool.steps.count >= ENOUGH:
            step_ms, step_running_ms = pool.steps.coefficients
        return Ability(step_ms, step_running_ms, pool.kv_tokens or UNBOUNDED, pool.sequences or UNBOUNDED)


def _until_ms(prompt: Prompt, rates: Rates) -> float:
    """For how long it may wait and be computed, given what comes after."""
    if prompt.ttft_ms is None:
        return np.inf
    if not prompt.transfer_tokens:
        return prompt.ttft_ms
    travels_ms = rates.transfer_ms + min(prompt.transfer_tokens, CHUNK_TOKENS) * rates.transfer_token_ms
    return prompt.ttft_ms - travels_ms - rates.base_ms


def _held_ms(told: Told, corrections: Mapping[Pool, float]) -> float:
    """How long the prompt was being computed."""
    return sum(corrections[part.pool] * prefill_ms(part.prompt, part.pool.rates) for part in told.computed)


def _mean_rates(rates: Sequence[Rates]) -> Rates:
    names = Rates.__dataclass_fields__
    return Rates(**{name: _mean([getattr(each, name) for each in rates]) for name in names})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
