"""What the scheduler side tells the worker side with each step: values that travel by pickle inside one engine."""

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_llmd.kv_connector.delivery import SourceEndpoint
from vllm_llmd.kv_connector.exchange import Expect
from vllm_llmd.kv_connector.lifecycle import OrderSpec
from vllm_llmd.names import EngineId, Epoch, OrderId
from vllm_llmd.wire import Announce


@dataclass(frozen=True)
class PlannedOrder:
    """An order for all ranks: the source's `endpoints` in rank order, in its life `epoch`."""

    endpoints: tuple[SourceEndpoint, ...]
    epoch: Epoch
    spec: OrderSpec


@dataclass(frozen=True)
class Load:
    """Expect everything that is to arrive for one request at this rank."""

    expected: tuple[Expect, ...]


@dataclass(frozen=True)
class Reader:
    """One life of an engine that reads from this one, with `tp` ranks."""

    engine: EngineId
    epoch: Epoch
    tp: int


@dataclass(frozen=True)
class PlannedRange:
    """A range that this step makes ready, once it has written the layers before `message.end_layer`, if that is set."""

    reader: Reader
    message: Announce
    lease_ms: float


@dataclass(frozen=True)
class Ready:
    """Ranges whose step has been launched; `step_done` tells whether it has passed on its stream."""

    ranges: tuple[PlannedRange, ...]
    step_done: Callable[[], bool]


@dataclass(frozen=True)
class Withdraw:
    """An order that `reader` placed will not be served to the end, or at all."""

    reader: Reader
    order: OrderId
    reason: str


@dataclass(frozen=True)
class Fail:
    """An order that we placed will bring nothing more."""

    order: OrderId
    reason: str


@dataclass(frozen=True)
class Finish:
    """The source's request for our order has ended in good order."""

    order: OrderId


@dataclass
class StepPlan:
    """One step's news. `wait_ms` is how long the worker may block for I/O when the step computes nothing.

    `loads` are requests, each with its orders in the order of the prompt. `cached` ranges were ready before the step;
    of `ranges`, those of some layers become ready while it runs, in the order given.
    """

    loads: list[tuple[PlannedOrder, ...]] = field(default_factory=list)
    cached: list[PlannedRange] = field(default_factory=list)
    ranges: list[PlannedRange] = field(default_factory=list)
    withdrawals: list[Withdraw] = field(default_factory=list)
    failures: list[Fail] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    wait_ms: float = 0.0

    def __bool__(self) -> bool:
        return bool(
            self.loads
            or self.cached
            or self.ranges
            or self.withdrawals
            or self.failures
            or self.finishes
            or self.wait_ms
        )
