"""What the connector costs an engine per step while no order is in flight, beside nothing at all.

Runs both sides in one process, with a fake block pool and a real I/O thread: plans a step for so many running
requests, carries the plan by pickle as vLLM does, begins and ends the step, and takes the report. Times are medians in
microseconds; the last line is one JSON object.
"""

import json
import pickle
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_llmd.kv_connector.layout import LayerView, Memory, TensorView
from vllm_llmd.kv_connector.scheduler_side import SchedulerSide
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.staging import HostStaging
from vllm_llmd.kv_connector.vllm_compat import BlockPoolView
from vllm_llmd.kv_connector.vllm_facts import EngineFacts, Layer
from vllm_llmd.kv_connector.worker_side import CacheMemory, RankFacts, WorkerSide
from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.settings import EngineSettings
from vllm_llmd.wire import Geometry, GroupShape

STEPS = 20_000
RUNNING = (0, 1, 8, 64)


class Pool:
    """The parts of vLLM's cache manager that are touched in a step."""

    enable_kv_cache_events = False
    num_gpu_blocks = 1000
    block_pool: "Pool"

    def __init__(self) -> None:
        self.block_pool = self

    def take_events(self) -> list[Any]:
        return []

    def get_num_free_blocks(self) -> int:
        return 999


def sides() -> tuple[SchedulerSide, WorkerSide]:
    geometry = Geometry(1, 2, "cells", [GroupShape(32, 1)])
    memory = np.zeros((4, 4096), dtype=np.uint8)
    view = LayerView(0, 0, TensorView(memory.ctypes.data, memory.shape, (4096, 1), 1), "opaque")
    spans = ((memory.ctypes.data, memory.nbytes),)
    cache = CacheMemory((view,), spans, Memory(4, "DRAM", 0), lambda: lambda: True, HostStaging, lambda: None)
    rank = RankFacts(EngineId("bench"), 0, Epoch(1), "same", geometry, "127.0.0.1")
    worker = WorkerSide(rank, cache, Seal(None))
    facts = EngineFacts(
        id="bench",
        role="both",
        models=("m",),
        adapters=(),
        block_size=32,
        num_blocks=1000,
        max_model_len=4096,
        geometry=geometry,
        layers=(Layer("layers.0", 0, "cells"),),
        layer_bytes=4096,
        hash_tokens=32,
        prefix_caching=True,
        priorities=False,
        fingerprint="same",
    )
    scheduler = SchedulerSide(facts, EngineSettings(), "http://127.0.0.1:9")
    scheduler.bind(BlockPoolView(Pool()))
    scheduler.introduce([worker.introduction()])
    return scheduler, worker


def requests(count: int) -> list[Any]:
    return [
        SimpleNamespace(
            request_id=f"r{i}", num_prompt_tokens=100, num_computed_tokens=200, kv_transfer_params=None, block_hashes=[]
        )
        for i in range(count)
    ]


def measure(scheduler: SchedulerSide, worker: WorkerSide, running: int) -> float:
    """Median microseconds of a step with so many running requests."""
    some = requests(running)
    for request in some:
        scheduler.new_request(request)
    scheduled = {request.request_id: 1 for request in some}
    times = []
    for _ in range(STEPS):
        began = time.perf_counter_ns()
        plan = pickle.loads(pickle.dumps(scheduler.plan_step(scheduled) or None))
        if plan is not None:
            worker.begin_step(plan)
        results = worker.end_step()
        scheduler.take_report(results.report, results.received)
        times.append(time.perf_counter_ns() - began)
    for request in some:
        scheduler.request_finished(request)
    return statistics.median(times) / 1000


def main() -> None:
    scheduler, worker = sides()
    try:
        found = {running: measure(scheduler, worker, running) for running in RUNNING}
    finally:
        scheduler.close()
        worker.close()
    for running, us in found.items():
        print(f"{running:3d} running requests: {us:6.1f} us a step")  # noqa: T201
    print(json.dumps({"step_us": {str(running): round(us, 1) for running, us in found.items()}}))  # noqa: T201


if __name__ == "__main__":
    main()
