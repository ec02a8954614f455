"""The policies that a router can be started with, by name: ours, and those of other packages.

Another package adds one with an entry point in the group `vllm_llmd.policies` that names a `policy.Factory`, and
filters, which all policies keep to, in the group `vllm_llmd.filters`.
"""

import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from vllm_llmd.errors import ConfigError
from vllm_llmd.router.placement import filters
from vllm_llmd.router.policy import Factory, Policy, PolicySettings

GROUP: Final = "vllm_llmd.policies"

BUILT_IN: Final = {
    "cost": "cost:cost",
    "prefix_first": "prefix_first:prefix_first",
    "round_robin": "plain:round_robin",
    "random": "plain:by_chance",
    "least_requests": "plain:least_requests",
    "power_of_two": "plain:power_of_two",
    "approximate_prefix": "approximate_prefix:approximate_prefix",
    "weighted": "weighted:weighted",
}
"""Name -> module in this package and factory in it."""


def names() -> list[str]:
    """Every policy that can be made here, ours first."""
    return [*BUILT_IN, *sorted(each.name for each in entry_points(group=GROUP) if each.name not in BUILT_IN)]


def make(name: str, settings: PolicySettings) -> Policy:
    """The policy of this name, which sees only whom filters let through.

    Raises ConfigError if there is none, or it cannot be made, or a filter cannot be had.
    """
    made, found = _make(name, settings), loaded(filters.GROUP)
    return filters.Filtered(made, found) if found else made


def _make(name: str, settings: PolicySettings) -> Policy:
    if name in BUILT_IN:
        module, _, factory = BUILT_IN[name].partition(":")
        made: Policy = getattr(importlib.import_module(f"{__name__}.{module}"), factory)(settings)
        return made
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return _made(entry, settings)
    raise ConfigError(f"policy must be one of {', '.join(names())}; got {name}")


def loaded(group: str) -> dict[str, Any]:
    """What other packages add to a group of entry points, by name. Raises ConfigError for what cannot be loaded."""
    found = {}
    for entry in entry_points(group=group):
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # whatever another package's code may raise
            raise ConfigError(f"{entry.name} ({entry.value}) of {group} cannot be loaded: {error!r}") from error
    return found


def _made(entry: EntryPoint, settings: PolicySettings) -> Policy:
    try:
        factory: Factory = entry.load()
        policy: Any = factory(settings)
    except Exception as error:  # whatever another package's code may raise
        raise ConfigError(f"policy {entry.name} ({entry.value}) cannot be made: {error!r}") from error
    if not callable(getattr(policy, "choose", None)):
        raise ConfigError(f"policy {entry.name} ({entry.value}) must have a method `choose`; got {policy!r}")
    return policy  # type: ignore[no-any-return]
