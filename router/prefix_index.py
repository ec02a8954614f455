"""Which engine holds which KV block, and how long a prefix each has cached. Pure.

`match` walks the prompt's block names once: its cost is the longest match, whatever the number of blocks held.
"""

from collections.abc import Collection, Iterable, Sequence

from vllm_llmd.names import BlockName, EngineId


class PrefixIndex:
    """Block name -> holders, and its inverse."""

    def __init__(self) -> None:
        self._holders: dict[BlockName, set[EngineId]] = {}
        self._held: dict[EngineId, set[BlockName]] = {}

    def apply(self, engine: EngineId, removed: Iterable[BlockName], stored: Iterable[BlockName]) -> None:
        """Takes blocks away, then adds blocks. Names removed twice or stored twice count once."""
        held = self._held.setdefault(engine, set())
        for name in removed:
            if name in held:
                held.remove(name)
                self._drop(engine, name)
        for name in stored:
            held.add(name)
            self._holders.setdefault(name, set()).add(engine)

    def clear_engine(self, engine: EngineId) -> None:
        """Forgets everything an engine holds."""
        for name in self._held.pop(engine, ()):
            self._drop(engine, name)

    def replace_engine(self, engine: EngineId, names: Iterable[BlockName]) -> None:
        """Makes `names` exactly what the engine holds."""
        wanted = set(names)
        held = self._held.get(engine, set())
        self.apply(engine, held - wanted, wanted - held)

    def match(self, names: Sequence[BlockName]) -> dict[EngineId, int]:
        """How many blocks from the start of `names` each engine holds without a hole; engines with none are absent."""
        depths: dict[EngineId, int] = {}
        alive: set[EngineId] | None = None
        for depth, name in enumerate(names, start=1):
            holders = self._holders.get(name)
            if holders is None:
                break
            alive = holders if alive is None else alive & holders
            if not alive:
                break
            for engine in alive:
                depths[engine] = depth
        return depths

    def held(self, engine: EngineId) -> Collection[BlockName]:
        """What the engine holds; not to be changed."""
        return self._held.get(engine, set())

    def size(self, engine: EngineId) -> int:
        return len(self._held.get(engine, ()))

    def _drop(self, engine: EngineId, name: BlockName) -> None:
        holders = self._holders[name]
        holders.discard(engine)
        if not holders:
            del self._holders[name]
