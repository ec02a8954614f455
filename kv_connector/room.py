"""Pure: how much of the block pool may wait for other engines, so that engines that order from each other go on.

A request that waits for its KV holds blocks and computes nothing. Were all blocks of two engines held so, each by
orders that the other has no room to serve, neither would ever move. So an engine never lets requests that wait take
the room that the largest order it serves needs, and refuses an order that has no room beside them.
"""

from vllm_llmd.names import RequestId


class Room:
    """Counts blocks. `capacity` is that of the pool."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: dict[RequestId, int] = {}
        self._served: dict[RequestId, int] = {}

    @property
    def waiting(self) -> int:
        """Blocks held by requests that wait for KV."""
        return sum(self._waiting.values())

    def may_wait(self, blocks: int) -> bool:
        """Whether one more request, of so many blocks, may wait for KV."""
        return self.waiting + blocks + max(self._served.values(), default=0) <= self._capacity

    def may_serve(self, blocks: int) -> bool:
        """Whether there will be room for an order of so many blocks without any waiting request going on first."""
        return self.waiting + blocks <= self._capacity

    def waits(self, request: RequestId, blocks: int) -> None:
        self._waiting[request] = blocks

    def serves(self, request: RequestId, blocks: int) -> None:
        self._served[request] = blocks

    def leaves(self, request: RequestId) -> None:
        """The request waits no more, or is served no more."""
        self._waiting.pop(request, None)
        self._served.pop(request, None)
