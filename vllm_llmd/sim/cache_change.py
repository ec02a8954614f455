"""What became of a set of block names between two looks at it. Pure."""

from dataclasses import dataclass

from vllm_llmd.names import BlockName


@dataclass(frozen=True)
class CacheChange:
    """Net: clear if `cleared`, then remove, then store."""

    cleared: bool
    removed: list[BlockName]
    stored: list[BlockName]


class ChangeLog:
    """Adds single changes up. A name that comes and goes between two calls of `drain` is never heard of."""

    def __init__(self) -> None:
        self._cleared = False
        self._removed: dict[BlockName, None] = {}
        self._stored: dict[BlockName, None] = {}

    def stored(self, name: BlockName) -> None:
        if name in self._removed:
            del self._removed[name]
        else:
            self._stored[name] = None

    def removed(self, name: BlockName) -> None:
        if name in self._stored:
            del self._stored[name]
        else:
            self._removed[name] = None

    def cleared(self) -> None:
        self._cleared = True
        self._removed.clear()
        self._stored.clear()

    def drain(self) -> CacheChange | None:
        """What has changed since the last call, if anything has."""
        if not (self._cleared or self._removed or self._stored):
            return None
        change = CacheChange(self._cleared, list(self._removed), list(self._stored))
        self._cleared = False
        self._removed.clear()
        self._stored.clear()
        return change
