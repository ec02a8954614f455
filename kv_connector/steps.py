"""What the scheduler side tells the worker side with each step: values that travel by pickle inside one engine."""

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_llmd.kv_connector.exchange import Caller, SourceEndpoint
from vllm_llmd.kv_connector.lifecycle import OrderSpec
from vllm_llmd.names import Epoch, OrderId
from vllm_llmd.wire import Announce


@dataclass(frozen=True)
class LoadOrder:
    """Expect `spec` from the rank at `endpoint`, in the source's life `epoch`."""

    endpoint: SourceEndpoint
    epoch: Epoch
    spec: OrderSpec


@dataclass(frozen=True)
class PlannedLoad:
    """A LoadOrder for all ranks: `endpoints` in rank order."""

    endpoints: tuple[SourceEndpoint, ...]
    epoch: Epoch
    spec: OrderSpec


@dataclass(frozen=True)
class PlannedRange:
    """A range that this step makes ready for `caller` (whose rank is that of whoever announces)."""

    caller: Caller
    message: Announce
    lease_ms: float


@dataclass(frozen=True)
class Ready:
    """Ranges whose step has been launched; `step_done` tells whether it has passed on its stream."""

    ranges: tuple[PlannedRange, ...]
    step_done: Callable[[], bool]


@dataclass(frozen=True)
class Withdraw:
    """An order that `caller` placed will not be served to the end, or at all."""

    caller: Caller
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
    """One step's news. `wait_ms` is how long the worker may block for I/O when the step computes nothing."""

    loads: list[PlannedLoad] = field(default_factory=list)
    ranges: list[PlannedRange] = field(default_factory=list)
    withdrawals: list[Withdraw] = field(default_factory=list)
    failures: list[Fail] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    wait_ms: float = 0.0
