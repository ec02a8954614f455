"""vLLM's scheduler as turns see it. Needs vLLM."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch deprecates as vLLM imports it is not ours to mend
    requests = pytest.importorskip("vllm.v1.request")
    pytest.importorskip("vllm.v1.core.sched.scheduler")
    from vllm_llmd.kv_connector import vllm_turns
    from vllm_llmd.kv_connector.vllm_turns import StepView, forget_steps, on_step

WAITING = requests.RequestStatus.WAITING
PREEMPTED = requests.RequestStatus.PREEMPTED
PARKED = requests.RequestStatus.WAITING_FOR_REMOTE_KVS
GRAMMAR = requests.RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR


def request(name: str, computed: int = 0, status: Any = WAITING) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=name, num_computed_tokens=computed, num_tokens=100, status=status, next_decode_eligible_step=0
    )


def scheduler(**queues: list[SimpleNamespace]) -> SimpleNamespace:
    facts = {"running": [], "waiting": [], "finished_recving_kv_req_ids": {"come"}}
    return SimpleNamespace(**{**facts, **queues}, max_num_running_reqs=4, current_step=7)


def names(requests: list[Any]) -> list[str]:
    return [each.request_id for each in requests]


def test_those_that_run_and_lack_more_than_a_token_have_been_begun() -> None:
    step = StepView(scheduler(running=[request("a", 99), request("b", 98), request("c", 130)]))
    assert names(step.begun()) == ["b"]
    assert step.seats == 1


@pytest.mark.parametrize("apart", ["kv_holding_waiting", "skipped_waiting"])
def test_whose_kv_has_come_waits_wherever_vllm_keeps_it(apart: str) -> None:
    parked = [request(name, 99, PARKED) for name in ("coming", "come")]
    waiting = [request("new"), request("again", status=PREEMPTED), request("third"), request("fourth")]
    step = StepView(scheduler(waiting=waiting, **{apart: parked}))
    assert names(step.waiting(3)) == ["come", "new", "again", "third"]


def test_who_waits_for_anything_else_is_not_looked_at() -> None:
    grammar = request("grammar", status=GRAMMAR)
    assert StepView(scheduler(waiting=[grammar])).waiting(8) == []


def test_who_is_held_is_not_eligible_in_the_step_that_is_to_come_and_is_in_the_next() -> None:
    held, at = request("a"), scheduler()
    StepView(at).hold(held)
    assert at.current_step + 1 < held.next_decode_eligible_step == at.current_step + 2


# --- listening ------------------------------------------------------------------------------------------------------


class Scheduler:
    """vLLM's, as far as `on_step` goes."""

    def schedule(self, throttle_prefills: bool = False) -> str:
        return f"planned {throttle_prefills}"


@pytest.fixture(autouse=True)
def nothing_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.v1.core.sched.scheduler.Scheduler", Scheduler)
    monkeypatch.setattr(vllm_turns, "_step_listeners", [])
    monkeypatch.setattr(Scheduler, "schedule", Scheduler.schedule)


def test_listeners_hear_of_each_step_until_they_are_forgotten() -> None:
    heard: list[StepView] = []
    on_step(heard.append)
    assert Scheduler().schedule(throttle_prefills=True) == "planned True"
    forget_steps(heard.append)
    forget_steps(heard.append)
    assert Scheduler().schedule() == "planned False"
    assert len(heard) == 1


def test_a_scheduler_of_an_unknown_kind_is_warned_of_once_and_left_alone(log: pytest.LogCaptureFixture) -> None:
    def hold(step: StepView) -> None:
        step.hold(SimpleNamespace())

    on_step(hold)
    assert [Scheduler().schedule() for _ in range(3)] == ["planned False"] * 3
    assert len(log.records) == 1 and "next_decode_eligible_step" in log.text
