"""vLLM's scheduler before it plans a step: what it has begun, what waits, and what it is to leave out of the step."""

import itertools
import logging
from collections.abc import Callable
from typing import Any

from vllm.v1.request import RequestStatus

from vllm_llmd.kv_connector.vllm_compat import wrap

logger = logging.getLogger(__name__)


class StepView:
    """vLLM's scheduler, before it plans a step."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def begun(self) -> list[Any]:
        """Those that run and whose prompts are not computed yet, but for one token."""
        return [each for each in self._scheduler.running if each.num_computed_tokens < each.num_tokens - 1]

    def waiting(self, most: int) -> list[Any]:
        """Those that could run: the first of those that wait, at most so many, and those that were passed over.

        Up to 0.30 vLLM keeps who waits for KV among the latter; from 0.31 on, apart.
        """
        come = self._scheduler.finished_recving_kv_req_ids
        apart = ("kv_holding_waiting", "skipped_waiting")
        passed_over = (each for name in apart for each in getattr(self._scheduler, name, ()))
        return [
            each
            for each in (*passed_over, *itertools.islice(self._scheduler.waiting, most))
            if each.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) or each.request_id in come
        ]

    @property
    def seats(self) -> int:
        """How many more requests may run."""
        return int(self._scheduler.max_num_running_reqs) - len(self._scheduler.running)

    def hold(self, request: Any) -> None:
        """The step shall compute nothing of it. It keeps its blocks. Raises AttributeError if vLLM cannot."""
        _ = request.next_decode_eligible_step
        request.next_decode_eligible_step = self._scheduler.current_step + 2


_step_listeners: list[Callable[[StepView], None]] = []


def on_step(listener: Callable[[StepView], None]) -> None:
    """Call `listener` before every step is planned."""
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "schedule", _telling_of_steps)
    _step_listeners.append(listener)


def _telling_of_steps(theirs: Any) -> Any:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        for tell in list(_step_listeners):
            try:
                tell(StepView(self))
            except AttributeError as error:  # of vLLM's: releases differ in what schedulers have
                logger.warning("prompts do not stand still for those due earlier: not with this vLLM (%s)", error)
                _step_listeners.remove(tell)
        return theirs(self, *args, **kwargs)

    return schedule


def forget_steps(listener: Callable[[StepView], None]) -> None:
    """Undo `on_step`."""
    if listener in _step_listeners:
        _step_listeners.remove(listener)
