"""What the parts of one router share. Values only."""

from dataclasses import dataclass

from vllm_llmd.clock import Clock
from vllm_llmd.router.audit.decisions import Decisions
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.settings import RouterSettings


@dataclass(frozen=True)
class Context:
    """`life` names this life of the router."""

    settings: RouterSettings
    fleet: Fleet
    metrics: Metrics
    clock: Clock
    decisions: Decisions
    life: str
