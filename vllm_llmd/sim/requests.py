"""A request as the simulated scheduler sees it, and what a step says of requests. Values."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_llmd.names import BlockName, EngineId, RequestId
from vllm_llmd.sim.block_pool import BlockId


@dataclass(slots=True, eq=False)
class SimRequest:
    """What is asked for, and how far it has come.

    `names` are those of the prompt's full blocks, and may go on with those of the answer where that is known.
    `source` is another engine that shall supply the prompt's KV, up to token `source_until` or to its end, if at least
    `source_least` tokens lack; `asked` is whether it has been.

    `cached_tokens` is None before the request is admitted for the first time; then how much of its prompt
    needed no computing here.
    """

    id: str
    prompt_tokens: int
    output_tokens: int
    names: Sequence[BlockName] = ()
    arrived_ms: float = 0.0
    priority: int = 0
    source: EngineId | None = None
    source_until: int | None = None
    source_least: int | None = None

    blocks: list[BlockId] = field(default_factory=list)
    computed: int = 0
    made: int = 0
    named: int = 0
    cached_tokens: int | None = None
    preemptions: int = 0
    asked: bool = False
    gone: bool = False

    @property
    def request_id(self) -> RequestId:
        """As the connector's rules read it, and `block_hashes`."""
        return RequestId(self.id)

    @property
    def block_hashes(self) -> Sequence[BlockName]:
        return self.names

    @property
    def supplied_end(self) -> int:
        """Up to which token its source is to supply it: the last one is left to the engine that it is at."""
        return min(self.source_until or self.prompt_tokens, self.prompt_tokens - 1)

    @property
    def total(self) -> int:
        """Tokens that there are, computed or not."""
        return self.prompt_tokens + self.made


@dataclass(slots=True)
class Report:
    """What a step brought about.

    `made` are requests with how many tokens each has made now; `finished` are those that have all of theirs.
    `admitted` are scheduled for the first time. `wanted` wait for their source to supply the KV of the tokens from
    `computed` to the last but one of the prompt: `Scheduler.supplied` lets them go on.
    """

    made: list[tuple[SimRequest, int]] = field(default_factory=list)
    finished: list[SimRequest] = field(default_factory=list)
    admitted: list[SimRequest] = field(default_factory=list)
    wanted: list[SimRequest] = field(default_factory=list)


@dataclass(slots=True)
class Counts:
    """Since start, in tokens unless it says otherwise."""

    steps: int = 0
    prompt: int = 0
    generated: int = 0
    queried: int = 0
    hit: int = 0
    supplied: int = 0
    preemptions: int = 0
    finished_requests: int = 0
