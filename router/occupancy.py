"""What this router itself has in flight at one life of an engine. Pure; believes nobody."""

from dataclasses import dataclass, field


@dataclass
class Occupancy:
    """`tokens` are prompt tokens to compute for requests that have not begun to answer.

    `newer_requests` and `newer_tokens` are by how much that has changed since the engine's report of `report_ms`.
    """

    tokens: int = 0
    newer_requests: int = 0
    newer_tokens: int = 0
    report_ms: float = 0.0
    _prefills: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._prefills)

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

    def answering(self, request: str) -> None:
        """Its answer has begun: the prompt is computed."""
        if request in self._prefills:
            self._count(-self._prefills[request])
            self._prefills[request] = 0

    def ended(self, request: str) -> None:
        """It is over, well or not. Counts once."""
        prefill_tokens = self._prefills.pop(request, None)
        if prefill_tokens is not None:
            self.newer_requests -= 1
            self._count(-prefill_tokens)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        self.newer_tokens += tokens
