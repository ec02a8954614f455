"""How busy this engine is, counted by the connector itself. Written by the engine thread, read by the link thread."""

from vllm_llmd.names import RequestId
from vllm_llmd.wire import Load

SMOOTHING = 0.1
"""Weight of the newest step in the moving average of step time."""


class LoadCounter:
    """Counts requests and tokens. Every value it hands out is a plain number, so a stale read is harmless."""

    def __init__(self) -> None:
        self._prompt_left: dict[RequestId, int] = {}
        self._elsewhere: dict[RequestId, int] = {}
        self._parked: set[RequestId] = set()
        self._started: set[RequestId] = set()
        self.waiting_for_kv = 0
        self.pinned_blocks = 0
        self.orders_placed = 0
        self.orders_served = 0
        self._step_ms = 0.0
        self._step_began_ms: float | None = None

    def arrived(self, request: RequestId, prompt_tokens: int, elsewhere: int = 0) -> None:
        """Of the prompt, `elsewhere` tokens are to be computed by other engines."""
        self._prompt_left[request] = prompt_tokens
        if elsewhere > 0:
            self._elsewhere[request] = min(elsewhere, prompt_tokens)

    def parked(self, request: RequestId) -> None:
        """It has blocks for its prompt, and waits for what is to come into them."""
        if request in self._prompt_left:
            self._parked.add(request)

    def scheduled(self, request: RequestId, prompt_left: int) -> None:
        """The step at hand leaves `prompt_left` tokens of the prompt to compute."""
        if request in self._prompt_left:
            self._started.add(request)
            self._parked.discard(request)
            self._elsewhere.pop(request, None)
            self._prompt_left[request] = max(prompt_left, 0)

    def ended(self, request: RequestId) -> None:
        self._prompt_left.pop(request, None)
        self._started.discard(request)
        self._parked.discard(request)
        self._elsewhere.pop(request, None)

    def step_began(self, now_ms: float, computes: bool) -> None:
        """A step has been scheduled; steps without compute do not count."""
        self._step_began_ms = now_ms if computes else None

    def step_ended(self, now_ms: float) -> None:
        if self._step_began_ms is not None:
            took_ms = now_ms - self._step_began_ms
            self._step_ms += SMOOTHING * (took_ms - self._step_ms) if self._step_ms else took_ms
            self._step_began_ms = None

    def read(self, free_blocks: int) -> Load:
        """The load now."""
        running = len(self._started)
        left, parked = dict(self._prompt_left), set(self._parked)
        return Load(
            running=running,
            waiting=max(len(self._prompt_left) - running - self.waiting_for_kv, 0),
            waiting_for_kv=self.waiting_for_kv,
            prefill_tokens=max(sum(left.values()) - sum(list(self._elsewhere.values())), 0),
            free_blocks=free_blocks,
            pinned_blocks=self.pinned_blocks,
            step_ms=self._step_ms,
            orders_placed=self.orders_placed,
            orders_served=self.orders_served,
            unplaced_tokens=sum(tokens for request, tokens in left.items() if request not in parked),
        )
