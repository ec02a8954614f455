"""How busy a simulated engine is, as it tells the router. Pure."""

from vllm_llmd.sim.scheduler import Scheduler
from vllm_llmd.wire import Load


def load_of(model: Scheduler, orders_placed: int, orders_served: int) -> Load:
    """The load of this instant; the orders are counted outside the model."""
    return Load(
        running=len(model.running),
        waiting=len(model.waiting),
        waiting_for_kv=len(model.parked),
        prefill_tokens=model.prefill_tokens,
        unplaced_tokens=model.unplaced_tokens,
        free_blocks=model.pool.free,
        step_ms=model.step_ms,
        orders_placed=orders_placed,
        orders_served=orders_served,
    )
