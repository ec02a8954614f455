"""Whose turn it is among the prompts of a simulated engine: the connector's rules, on what the model knows. Pure.

A prompt that is being computed is held, with its blocks and its seat, while one that is due earlier is to be computed.
Who would compute the same as one that is held waits for it, while others pass.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile

from vllm_llmd.due import rank_of
from vllm_llmd.kv_connector.turns import Prompt, follows
from vllm_llmd.kv_connector.turns import Turns as Rules
from vllm_llmd.names import BlockName, RequestId
from vllm_llmd.sim.limits import Limits
from vllm_llmd.sim.requests import SimRequest


class Turns:
    """Of one engine. `held` get no tokens in the step that has begun."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._rules = Rules()
        self.held: Sequence[SimRequest] = ()
        self._held_prompts: list[Prompt] = []

    def begin(self, partial: Sequence[SimRequest], waiting: Iterable[SimRequest], free_blocks: int) -> None:
        """Some of `partial`, prompts that are being computed, are held for others.

        Of `waiting`, those that there are seats for, in order, only those count that there are blocks for, too: whoever
        comes after one that there are none for waits with it.
        """
        blocks_of = self._limits.blocks_of
        free_blocks -= sum(blocks_of(each.total) - len(each.blocks) for each in partial)
        fit = takewhile(lambda each: each.blocks or blocks_of(each.total) <= free_blocks, waiting)
        begun = [self._prompt(each, self._names(each)) for each in partial]
        held = self._rules.held(begun, [self._prompt(each, self._sought(each)) for each in fit])
        self.held = [each for each in partial if each.id in held]
        self._held_prompts = [each for each in begun if each.request in held]

    def passes_over(self, request: SimRequest) -> bool:
        """Whether a waiting request waits for one that is held, while others behind it go on."""
        if not self._held_prompts:
            return False
        prompt = self._prompt(request, self._sought(request))
        return any(follows(prompt, each) for each in self._held_prompts)

    def _prompt(self, request: SimRequest, names: Sequence[BlockName]) -> Prompt:
        return Prompt(
            RequestId(request.id), rank_of(request.priority), names, request.computed // self._limits.block_size
        )

    def _names(self, request: SimRequest) -> Sequence[BlockName]:
        return request.names[: request.prompt_tokens // self._limits.block_size]

    def _sought(self, request: SimRequest) -> Sequence[BlockName]:
        """What it would take from others: one that has blocks already computes what they lack."""
        return () if request.blocks else self._names(request)
