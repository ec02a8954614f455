"""When a worker rank waits for I/O, and what ends its wait. Real NIXL and ZeroMQ, no vLLM."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from vllm_llmd.kv_connector.layout import LayerView, Memory, TensorView
from vllm_llmd.kv_connector.lifecycle import Outcome
from vllm_llmd.kv_connector.own_ranks import OwnRanks
from vllm_llmd.kv_connector.report import WorkerReport
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.staging import HostStaging
from vllm_llmd.kv_connector.steps import StepPlan
from vllm_llmd.kv_connector.worker_side import CacheMemory, RankFacts, WorkerSide
from vllm_llmd.names import EngineId, Epoch, OrderId, RequestId
from vllm_llmd.wire import Geometry, GroupShape

LONG_MS = 120_000.0

SOME_OUTCOME = Outcome(OrderId("o"), RequestId("r"), None, (), (), (), (), None)


@pytest.fixture
def worker() -> Iterator[WorkerSide]:
    memory = np.zeros((4, 4096), dtype=np.uint8)
    view = LayerView(0, 0, TensorView(memory.ctypes.data, memory.shape, (4096, 1), 1), "opaque")
    spans = ((memory.ctypes.data, memory.nbytes),)
    cache = CacheMemory((view,), spans, Memory(4, "DRAM", 0), lambda: lambda: True, HostStaging, lambda: None)
    geometry = Geometry(1, 2, "cells", [GroupShape(32, 1)])
    made = WorkerSide(RankFacts(EngineId("e"), 0, Epoch(1), "same", geometry, "127.0.0.1"), cache, Seal(None))
    yield made
    made.close()


@pytest.fixture
def waits(worker: WorkerSide, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that steps have asked for; none of them is waited."""
    asked: list[float] = []
    monkeypatch.setattr(worker._io, "wait", asked.append)
    return asked


def step(worker: WorkerSide, wait_ms: float = 50.0) -> None:
    worker.begin_step(StepPlan(wait_ms=wait_ms))
    worker.end_step()


def test_only_a_step_that_may_wait_does(worker: WorkerSide, waits: list[float]) -> None:
    step(worker, wait_ms=0.0)
    step(worker, wait_ms=7.0)
    worker.end_step()
    assert waits == [7.0]


def test_a_nudge_ends_a_wait(worker: WorkerSide) -> None:
    ranks = OwnRanks([worker.introduction()])
    worker.begin_step(StepPlan(wait_ms=LONG_MS))
    waiting = threading.Thread(target=worker.end_step, daemon=True)
    waiting.start()
    ranks.nudge()
    waiting.join(timeout=LONG_MS / 4000)
    ranks.close()
    assert not waiting.is_alive()


def test_steps_already_planned_do_not_wait_after_a_nudge(
    worker: WorkerSide, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    nudges = [True, False, False, False, False]
    monkeypatch.setattr(worker._io, "take_nudge", lambda: nudges.pop(0))
    for _ in range(3):
        step(worker)
    assert waits == [], "the step of the nudge, the one planned behind it, and the next"
    monkeypatch.undo()
    monkeypatch.setattr(worker._io, "wait", waits.append)
    step(worker)
    assert waits == [50.0]


def test_the_step_behind_one_that_told_of_a_load_does_not_wait(
    worker: WorkerSide, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = [WorkerReport(outcomes=[SOME_OUTCOME])]
    monkeypatch.setattr(worker._io, "take", lambda: reports.pop() if reports else None)
    step(worker)
    step(worker)
    assert waits == []
    step(worker)
    assert waits == [50.0]
