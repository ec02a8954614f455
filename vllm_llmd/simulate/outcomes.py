"""What became of each simulated request. Values."""

from dataclasses import dataclass, field

from vllm_llmd.names import EngineId
from vllm_llmd.router.waiting.flow import Reason
from vllm_llmd.simulate.settings import Slo


@dataclass(slots=True)
class Outcome:
    """One request. Times are virtual milliseconds; None where it has not come so far.

    `computed_tokens` of the prompt were computed somewhere, at the destination or its source; the others were cached.
    At `sent_ms` it left the router for its destination. `refused` says why it could never be served, `shed` why the
    router sent it away. To count as good it has to keep `slo`, None if it is what all have to.

    The router had engines leave it `preempted` times for the sake of others; they had had it for `lost_ms` then. What
    they had computed of it counts among `computed_tokens`.
    """

    at_ms: float
    prompt_tokens: int
    output_tokens: int
    destination: EngineId | None = None
    source: EngineId | None = None
    predicted_cached_tokens: int = 0
    computed_tokens: int = 0
    made_tokens: int = 0
    sent_ms: float | None = None
    first_ms: float | None = None
    last_ms: float | None = None
    refused: str | None = None
    shed: Reason | None = None
    slo: Slo | None = None
    priority: int = 0
    preempted: int = 0
    lost_ms: float = 0.0

    @property
    def waited_ms(self) -> float:
        """In the router; 0 for one that was not sent."""
        return 0.0 if self.sent_ms is None else self.sent_ms - self.at_ms - self.lost_ms

    def given_up(self, now_ms: float) -> None:
        """Its engine has left it: it is back in the router."""
        assert self.sent_ms is not None and self.first_ms is None
        self.preempted += 1
        self.lost_ms += now_ms - self.sent_ms
        self.sent_ms = self.destination = self.source = None
        self.predicted_cached_tokens = 0

    @property
    def ttft_ms(self) -> float | None:
        return None if self.first_ms is None else self.first_ms - self.at_ms

    @property
    def tpot_ms(self) -> float | None:
        """Per token after the first; None for an answer of one token."""
        if self.first_ms is None or self.last_ms is None or self.made_tokens < 2:
            return None
        return (self.last_ms - self.first_ms) / (self.made_tokens - 1)

    @property
    def e2e_ms(self) -> float | None:
        return None if self.last_ms is None else self.last_ms - self.at_ms


@dataclass(slots=True)
class EngineTotals:
    """What one engine has done in all. `orders` it has served as a source."""

    id: EngineId
    requests: int
    orders: int
    computed_tokens: int
    output_tokens: int
    busy_ms: float
    preemptions: int


@dataclass
class Played:
    """A simulation that has ended, at `end_ms`. `given_up` orders were waited for in vain."""

    outcomes: list[Outcome] = field(default_factory=list)
    engines: list[EngineTotals] = field(default_factory=list)
    end_ms: float = 0.0
    steps: int = 0
    given_up: int = 0
