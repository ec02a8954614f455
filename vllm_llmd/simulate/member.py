"""One engine of a simulated fleet: the model, and what it tells the router of itself. Pure."""

from collections.abc import Iterator

from vllm_llmd.kv_connector.mirror import Change, Mirror
from vllm_llmd.names import EngineId, Epoch, Role, Tier
from vllm_llmd.sim.cache_change import ChangeLog
from vllm_llmd.sim.limits import Limits
from vllm_llmd.sim.load import load_of
from vllm_llmd.sim.scheduler import Scheduler
from vllm_llmd.sim.speeds import Speeds
from vllm_llmd.simulate.outcomes import EngineTotals
from vllm_llmd.wire import BlocksChanged, EngineInfo, Geometry, GroupShape, Heartbeat, Hello, Snapshot

MODEL = "sim"


class Member:
    """`armed_ms` is when its next step stands in the queue of events.

    It reports its load at `phase_ms` and so on; `quiet` counts reports with nothing to do, until it falls asleep.
    """

    def __init__(self, engine: EngineId, role: Role, limits: Limits, speeds: Speeds) -> None:
        self.model = Scheduler(limits, speeds)
        self.info = EngineInfo(
            id=engine,
            epoch=Epoch(1),
            role=role,
            http="",
            models=[MODEL],
            block_size=limits.block_size,
            num_blocks=limits.blocks,
            max_model_len=limits.max_tokens,
            fingerprint=f"{MODEL} {speeds.kv_bytes_per_token}",
            workers=[],
            geometry=Geometry(groups=[GroupShape(limits.block_size, 1)]),
            priorities=limits.policy == "priority",
            max_sequences=limits.max_sequences,
        )
        self._mirror = Mirror(self.info)
        self.armed_ms: float | None = None
        self.phase_ms = 0.0
        self.quiet = 0
        self.asleep = False
        self.requests = 0
        self.orders_placed = 0
        self.orders_served = 0
        self.computed_tokens = 0

    @property
    def id(self) -> EngineId:
        return self.info.id

    @property
    def idle(self) -> bool:
        return not (self.model.running or self.model.parked or self.model.waiting)

    def hello(self) -> tuple[Hello, *tuple[Snapshot, ...]]:
        """What makes it a member."""
        return Hello(self.info), *self._mirror.snapshot()

    def heartbeat(self) -> Heartbeat:
        return self._mirror.heartbeat(load_of(self.model, self.orders_placed, self.orders_served))

    def changes(self) -> Iterator[BlocksChanged]:
        """What has changed in its caches since the last call."""
        yield from self._changes_of(self.model.pool.changes, "gpu")
        if self.model.offload is not None:
            yield from self._changes_of(self.model.offload.changes, "cpu")

    def _changes_of(self, log: ChangeLog, tier: Tier) -> Iterator[BlocksChanged]:
        change = log.drain()
        if change is not None:
            yield self._mirror.change(Change(change.cleared, change.removed, change.stored, tier))

    def totals(self) -> EngineTotals:
        counts = self.model.counts
        return EngineTotals(
            id=self.id,
            requests=self.requests,
            orders=self.orders_served,
            computed_tokens=self.computed_tokens,
            output_tokens=counts.generated,
            busy_ms=self.model.busy_ms,
            preemptions=counts.preemptions,
        )
