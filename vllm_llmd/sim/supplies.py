"""What other engines are to supply a simulated engine with, by the connector's rules. Pure."""

from collections.abc import Mapping

from vllm_llmd.kv_connector.inflight import InFlight
from vllm_llmd.sim.limits import Limits
from vllm_llmd.sim.requests import SimRequest


class Supplies:
    """`parked` requests wait for KV, by id."""

    def __init__(self, limits: Limits, parked: Mapping[str, SimRequest]) -> None:
        self._min_tokens = limits.min_order_tokens
        self._on_their_way = InFlight(limits.block_size, limits.min_order_tokens, lambda each: each.id in parked)

    def wants(self, request: SimRequest, computed: int) -> bool:
        """Whether its source is to be asked for what it lacks after so many tokens."""
        if request.source is None or request.asked or request.cached_tokens is not None:
            return False
        return request.supplied_end - computed >= max(self._min_tokens, request.source_least or 0)

    def asked(self, request: SimRequest, computed: int) -> None:
        """Its source has been."""
        request.asked = True
        self._on_their_way.add(request, computed, request.supplied_end)

    def ended(self, request: SimRequest) -> None:
        """The request is over."""
        self._on_their_way.forget(request.request_id)

    def come_for_another(self, request: SimRequest, computed: int) -> bool:
        """Whether enough of what it lacks after so many tokens is being sent here for another one."""
        return self._on_their_way.covers(request, computed)
