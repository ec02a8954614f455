"""What this router itself has in flight at one life of an engine. Pure; believes nobody."""

from dataclasses import dataclass, field


@dataclass
class Occupancy:
    """`tokens` are prompt tokens to compute for requests that have not begun to answer; `answering_requests` have.

    Of the tokens, `supplying_tokens` are for requests that come to the engine from others, as to their source.
    `newer_requests` and `newer_tokens` are by how much all that has changed since the engine's report of `report_ms`.
    """

    tokens: int = 0
    answering_requests: int = 0
    supplying_tokens: int = 0
    newer_requests: int = 0
    newer_tokens: int = 0
    report_ms: float = 0.0
    _prefills: dict[str, int | None] = field(default_factory=dict)
    """What each has to compute; None once it answers."""
    _supplying: dict[str, int] = field(default_factory=dict)
    """Those among them that come by others."""

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._prefills)

    @property
    def own_requests(self) -> int:
        """Those that this router has sent there itself."""
        return len(self._prefills) - len(self._supplying)

    @property
    def own_tokens(self) -> int:
        return self.tokens - self.supplying_tokens

    def supposed(self, report_ms: float) -> "Supposed":
        """The same, to try things out in, after the engine's latest report of `report_ms`."""
        self.reported(report_ms)
        return Supposed(self, len(self), self.tokens, self.newer_requests, self.newer_tokens)

    def share(self, request: str) -> tuple[int, int]:
        """Requests and prompt tokens that it counts for."""
        if request not in self._prefills:
            return 0, 0
        return 1, self._prefills[request] or 0

    def reported(self, report_ms: float) -> None:
        """The engine's latest report is of `report_ms`; it covers what was before."""
        if report_ms != self.report_ms:
            self.report_ms, self.newer_requests, self.newer_tokens = report_ms, 0, 0

    def sent(self, request: str, prefill_tokens: int) -> None:
        """A request is on its way to the engine. Counts once, however often it is said."""
        if request not in self._prefills:
            self._prefills[request] = prefill_tokens
            self.newer_requests += 1
            self._count(prefill_tokens)

    def supplies(self, request: str, prefill_tokens: int) -> None:
        """As `sent`, but the engine gets it from the one that it is the source of."""
        if request not in self._prefills:
            self.sent(request, prefill_tokens)
            self._supplying[request] = prefill_tokens
            self.supplying_tokens += prefill_tokens

    def answering(self, request: str) -> None:
        """Its answer has begun: the prompt is computed."""
        prefill_tokens = self._prefills.get(request)
        if prefill_tokens is not None:
            self._count(-prefill_tokens)
            self.supplying_tokens -= self._supplying.pop(request, 0)
            self._prefills[request] = None
            self.answering_requests += 1

    def ended(self, request: str) -> None:
        """It is over, well or not. Counts once."""
        if request not in self._prefills:
            return
        self.supplying_tokens -= self._supplying.pop(request, 0)
        prefill_tokens = self._prefills.pop(request)
        self.newer_requests -= 1
        if prefill_tokens is None:
            self.answering_requests -= 1
        else:
            self._count(-prefill_tokens)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        self.newer_tokens += tokens


@dataclass
class Supposed:
    """What would be in flight if some of `real` was not, or if there was more: numbers, which cost little to change."""

    real: Occupancy
    requests: int
    tokens: int
    newer_requests: int
    newer_tokens: int

    def __len__(self) -> int:
        return self.requests

    def without(self, request: str) -> None:
        """That one has gone."""
        requests, tokens = self.real.share(request)
        self.more(-requests, -tokens)

    def again(self, request: str) -> None:
        """It is back."""
        self.more(*self.real.share(request))

    def more(self, requests: int, tokens: int) -> None:
        """So much more is there, or less."""
        self.requests += requests
        self.newer_requests += requests
        self.tokens += tokens
        self.newer_tokens += tokens
