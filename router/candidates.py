"""The engines that a request could go to, as columns: one engine, one place of every array. Pure.

A roster is what does not depend on the request; it is made once for as long as the fleet stays the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from vllm_llmd.names import EngineId
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.wire import EngineInfo

Places = npt.NDArray[np.intp]
"""Where engines stand in the columns, shape (n,)."""
Counts = npt.NDArray[np.int64]
"""One count per engine, shape (engines,)."""
Column = npt.NDArray[np.float64]
"""One number per engine, shape (engines,)."""
Milliseconds = Column
Rows = npt.NDArray[np.void]
"""One record per engine, shape (engines,)."""
Shape = tuple[int, str | None]

OUTPUT_TOKENS: Final = 128.0
"""Prior for the length of an answer: some paragraphs, the mean of chats in published traces within a factor of two."""

REUSE: Final = 0.1
"""Prior for the share of cached blocks that are wanted again: most of what is evicted was used once."""


class Coming(NamedTuple):
    """Of a prompt, `tokens` will be in an engine's cache before long: it computes them for others, or they are on their
    way to it. In the latter case `source` has been asked for all up to token `supplied`.
    """

    tokens: int
    source: EngineId | None = None
    supplied: int = 0


@dataclass(frozen=True, eq=False)
class Remotes:
    """Engines with a link to us whose caches hold the same values: each may read what another of them has."""

    decoders: Places
    prefillers: Places
    everyone: Places


ROSTER_ROW: Final = np.dtype([(name, np.float64) for name in ("block_sizes", "num_blocks", "helped", "decodes")])


@dataclass(frozen=True, eq=False)
class Roster:
    """`decoders` may decode: who has a role for it, or everyone if nobody has. `prefillers` prefill for others.

    `kinds` are equal where fingerprints are. `remotes` may give KV to each other. `decodes` is 1 for the decoders and 0
    for the rest; so is `helped` for who only decodes and has others to compute long prompts for it. `shapes` are the
    ways in which the engines name the prompt's blocks: by blocks of so many tokens, for their base model or for an
    adapter of this name; and who does so.
    """

    engines: tuple[Engine, ...]
    decoders: Places
    prefillers: Places
    kinds: Counts
    block_sizes: Counts
    num_blocks: Counts
    helped: Column
    decodes: Column
    remotes: tuple["Remotes", ...]
    shapes: tuple[tuple[Shape, Places], ...]

    @classmethod
    def of(cls, engines: Sequence[Engine], model: str | None) -> "Roster":
        """`model` is what is asked for; None stands for each engine's base model."""
        prefills = np.array([engine.info.role == "prefill" for engine in engines], bool)
        decodes = ~prefills if not prefills.all() else ~np.zeros_like(prefills)
        kinds: dict[str, int] = {}
        shapes: dict[Shape, list[int]] = {}
        for place, engine in enumerate(engines):
            shapes.setdefault(_shape(engine, model), []).append(place)
        kind_of = np.array([kinds.setdefault(engine.info.fingerprint, len(kinds)) for engine in engines], np.int64)
        remote = np.array([engine.stock is None for engine in engines], bool)
        decodes_only = np.array([engine.info.role == "decode" for engine in engines], bool)
        of_kind = [remote & (kind_of == kind) for kind in kinds.values()]
        remotes = tuple(Remotes(*map(np.flatnonzero, (of & decodes, of & prefills, of))) for of in of_kind)
        helped = decodes & decodes_only & remote & np.isin(kind_of, kind_of[prefills & remote])
        return cls(
            engines=tuple(engines),
            decoders=np.flatnonzero(decodes),
            prefillers=np.flatnonzero(prefills),
            kinds=kind_of,
            block_sizes=np.array([engine.info.block_size for engine in engines], np.int64),
            num_blocks=np.array([max(engine.info.num_blocks, 1) for engine in engines], np.int64),
            helped=helped.astype(np.float64),
            decodes=decodes.astype(np.float64),
            remotes=remotes,
            shapes=tuple((shape, np.array(places, np.intp)) for shape, places in shapes.items()),
        )

    @cached_property
    def place_of(self) -> dict[EngineId, int]:
        return {engine.info.id: place for place, engine in enumerate(self.engines)}

    @cached_property
    def decoding(self) -> Mapping[EngineId, Engine]:
        """The decoders by name."""
        return self._named(self.decoders)

    @cached_property
    def prefilling(self) -> Mapping[EngineId, Engine]:
        """The prefillers by name."""
        return self._named(self.prefillers)

    def _named(self, places: Places) -> dict[EngineId, Engine]:
        return {self.engines[place].info.id: self.engines[place] for place in places}

    def coming(self, under_way: Mapping[EngineId, Coming], held: Counts) -> Counts | None:
        """Blocks after those held, of those that will be in caches; None if there are none."""
        places = [(self.place_of[each], coming.tokens) for each, coming in under_way.items() if each in self.place_of]
        if not places:
            return None
        coming = np.zeros(len(self.engines), np.int64)
        for place, each in places:
            coming[place] = max(each // int(self.block_sizes[place]) - int(held[place]), 0)
        return coming

    @cached_property
    def computing(self) -> Column:
        """The share that each has in an average of those who compute prompts."""
        computes = 1 - self.helped
        shares: Column = computes / max(computes.sum(), 1.0)
        return shares

    @cached_property
    def rows(self) -> Rows:
        """What prices depend on, engine by engine."""
        rows = np.empty(len(self.engines), ROSTER_ROW)
        for name in ROSTER_ROW.names or ():
            rows[name] = getattr(self, name)
        return rows

    @cached_property
    def parted(self) -> tuple[Places, npt.NDArray[np.int64]]:
        """`remotes` as two arrays: all their places, one after the other, and where each begins; and the end of all."""
        parts = [part for each in self.remotes for part in (each.decoders, each.prefillers, each.everyone)]
        places = np.concatenate([*parts, np.empty(0, np.intp)])
        return places, np.cumsum([0, *map(len, parts)], dtype=np.int64)

    @cached_property
    def entries(self) -> Places:
        """Where a fleet's ledger has the engines."""
        return np.array([engine.entry.number for engine in self.engines if engine.entry is not None], np.intp)

    def id(self, place: int) -> EngineId:
        return self.engines[place].info.id


def _shape(engine: Engine, model: str | None) -> Shape:
    return engine.info.block_size, adapter_of(engine.info, model)


def adapter_of(info: EngineInfo, model: str | None) -> str | None:
    """The adapter that a request for `model` takes, which is part of its blocks' names; None for the base model."""
    return model if model in info.adapters and model not in info.models else None


class ColumnOf:
    """A column of a table, as an attribute of the same name."""

    def __set_name__(self, table: "type[Table]", name: str) -> None:
        self._name = name

    def __get__(self, table: "Table", of: object = None) -> Column:
        column: Column = table.rows[self._name]
        return column


class Table:
    """One number per engine and column. `rows` are the same, engine by engine, shape (engines,)."""

    ROW: ClassVar[np.dtype[np.void]]

    def __init_subclass__(cls) -> None:
        cls.ROW = np.dtype([(name, np.float64) for name, each in vars(cls).items() if isinstance(each, ColumnOf)])

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @classmethod
    def packed(cls, rows: bytearray | npt.NDArray[np.float64]) -> Self:
        """From a row per engine, one after the other, of float64 in the order of the columns."""
        return cls(np.frombuffer(rows, cls.ROW))


class Loads(Table):
    """What every engine has to do. `requests` and `tokens` to prefill count what it has not reported yet, too.

    `running` and `waiting` are requests as it has reported them; of its GPU's blocks `free_blocks` are not in use, and
    `cached_blocks` hold something that may be found again. `batch` are requests that run, or will as soon as they
    arrive, of which `decoding` have begun to answer; `unplaced` prompt tokens have no block yet.
    """

    requests = ColumnOf()
    tokens = ColumnOf()
    running = ColumnOf()
    waiting = ColumnOf()
    free_blocks = ColumnOf()
    cached_blocks = ColumnOf()
    step_ms = ColumnOf()
    batch = ColumnOf()
    unplaced = ColumnOf()
    decoding = ColumnOf()

    @classmethod
    def of(cls, engines: Iterable[Engine]) -> "Loads":
        return cls.packed(bytearray().join([engine.row for engine in engines]))


class RateColumns(Table):
    """`rates.Rates` of every engine."""

    base_ms = ColumnOf()
    token_ms = ColumnOf()
    context_ms = ColumnOf()
    running_ms = ColumnOf()
    waiting_ms = ColumnOf()
    step_ms = ColumnOf()
    step_running_ms = ColumnOf()
    transfer_ms = ColumnOf()
    transfer_token_ms = ColumnOf()
    reload_token_ms = ColumnOf()
    cold_ms = ColumnOf()

    @classmethod
    def of(cls, engines: Iterable[Engine]) -> "RateColumns":
        return cls.packed(bytearray().join([engine.rates for engine in engines]))


@dataclass(frozen=True, eq=False)
class Candidates:
    """The engines of a roster and what concerns one request: how much of the prompt each has cached, and its load.

    `offloaded_blocks` of the `prefix_blocks` are not on the GPU: they come after the last that is. The last
    `coming_blocks` are being computed for others, and there by the end of the queue; None if there are none. They come
    of what is `under_way`.
    `prefix_blocks` are as many as are to be counted on, `claimed_blocks` what the index says. Of answers,
    `output_tokens` are expected; `reuse` is the share of evicted blocks that are wanted again. Predictions are off by
    the factor `doubt` until the first byte, by `step_doubt` for each token after it.
    """

    roster: Roster
    prefix_blocks: Counts
    offloaded_blocks: Counts
    claimed_blocks: Counts
    loads: Loads
    rates: RateColumns
    output_tokens: float = OUTPUT_TOKENS
    reuse: float = REUSE
    coming_blocks: Counts | None = None
    doubt: float = 1.0
    step_doubt: float = 1.0
    under_way: Mapping[EngineId, Coming] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.roster.engines)

    @property
    def coming(self) -> Counts:
        """As a column."""
        return np.zeros_like(self.prefix_blocks) if self.coming_blocks is None else self.coming_blocks

    @property
    def prefix_tokens(self) -> Counts:
        return self.prefix_blocks * self.roster.block_sizes
