"""The order of a run: which engines are up together, when, and how long the rest may take. Pure.

A block is a set of engines that are alive together. Every block has its turn, then every block again: what drifts on
the machine spreads over all arms.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from pd_values import Finished, Load, Part, Settings, Transport

BLOCK_OF_ARM = {
    "chunk": "ours",
    "layer": "ours",
    "pull": "pull",
    "push": "push",
    "pull_quiet": "pull_quiet",
    "push_quiet": "push_quiet",
}
"""Every arm but `one`, which is in every block."""

IDLE_BLOCKS = ("ours", "pull", "push")
IDLE_ROUNDS = 2
"""In each turn; more would take long and say no more."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One block's turn. Raw reads have no model and no engines; idle engines use no transport.

    `loads` are those of each round.
    """

    part: Part
    turn: int
    loads: tuple[tuple[Load, ...], ...]
    block: str
    transport: Transport
    model: str = ""

    @property
    def rounds(self) -> int:
        return len(self.loads)

    @property
    def kind(self) -> str:
        """What tasks that take equally long have in common."""
        return " ".join(filter(None, (self.part, self.model, self.transport, self.block)))

    @property
    def key(self) -> str:
        return f"{self.kind} turn {self.turn}"


def blocks_of(arms: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(BLOCK_OF_ARM[arm] for arm in arms))


def plan(settings: Settings) -> list[Task]:
    """All tasks, in order. Within a turn the blocks begin with another one each time."""
    tasks: list[Task] = []
    for turn in range(settings.turns):
        loads = loads_of(settings, turn)
        if "ttft" in settings.parts:
            tasks += [
                Task(part="ttft", turn=turn, loads=loads, block=block, transport=transport, model=model)
                for model in settings.models
                for transport in settings.transports
                for block in _rotated(blocks_of(settings.arms), turn)
            ]
        if "idle" in settings.parts:
            # What an idle engine costs does not depend on the model: the last named, thought to be the smallest.
            model = settings.models[-1]
            tasks += [
                Task(part="idle", turn=turn, loads=loads[:IDLE_ROUNDS], block=block, transport="shm", model=model)
                for block in IDLE_BLOCKS
                if block in blocks_of(settings.arms)
            ]
        if "raw" in settings.parts:
            tasks += [
                Task(part="raw", turn=turn, loads=loads, block="reads", transport=transport)
                for transport in settings.transports
            ]
    return tasks


def loads_of(settings: Settings, turn: int) -> tuple[tuple[Load, ...], ...]:
    """The loads of each round of a turn; a load with fewer rounds than others still has its share in every turn."""
    loads = [Load.parse(length) for length in settings.lengths]
    rounds = _share(settings.rounds, settings.turns, turn)
    own = [_share(min(load.at_most or settings.rounds, settings.rounds), settings.turns, turn) for load in loads]
    return tuple(tuple(load for load, its in zip(loads, own, strict=True) if number < its) for number in range(rounds))


def remaining_s(tasks: Iterable[Task], finished: Sequence[Finished]) -> float | None:
    """How long these tasks may take, judged by finished ones of the same kind, or else by the others of that part.

    None before anything is known.
    """
    if not finished:
        return None
    return sum(_likely_s(task, finished) for task in tasks)


def _likely_s(task: Task, finished: Sequence[Finished]) -> float:
    for alike in (task.kind, f"{task.part} {task.model}".rstrip(), task.part):
        known = [each.seconds for each in finished if each.key.startswith(f"{alike} ")]
        if known:
            return fmean(known)
    return fmean(each.seconds for each in finished)


def _share(rounds: int, turns: int, turn: int) -> int:
    """So that the turns' rounds add up."""
    return rounds * (turn + 1) // turns - rounds * turn // turns


def _rotated(blocks: list[str], by: int) -> list[str]:
    by %= max(len(blocks), 1)
    return blocks[by:] + blocks[:by]
