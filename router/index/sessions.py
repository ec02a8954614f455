"""Where each session's latest request went, for clients that name their sessions in a header. Pure.

The index knows where KV is; a session only helps where the index cannot tell yet: a text whose blocks no engine has
told, or an engine that tells none.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.candidates import Counts, Roster

HEADERS: Final = ("x-llmd-session", "x-llm-d-session-id", "x-session-id")
"""The first that is there counts."""

LONGEST_NAME: Final = 256
SESSIONS_KEPT: Final = 100_000


@dataclass(frozen=True)
class Last:
    """A session's latest request: the life of an engine that it went to, and the tokens of its prompt."""

    engine: EngineId
    epoch: Epoch
    prompt_tokens: int


def read_session(headers: Iterable[tuple[str, str]]) -> str | None:
    """The session that a client names; None for none, and for a name that is too long to be one."""
    said = {name.lower(): value.strip() for name, value in headers if name.lower() in HEADERS}
    name = next((said[header] for header in HEADERS if said.get(header)), None)
    return name if name is not None and len(name) <= LONGEST_NAME else None


class Sessions:
    """The sessions that were used last."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, Last] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def went(self, session: str, last: Last) -> None:
        """A request of the session was answered."""
        self._last[session] = last
        self._last.move_to_end(session)
        if len(self._last) > SESSIONS_KEPT:
            self._last.popitem(last=False)

    def supposed(self, session: str, roster: Roster, prompt_tokens: int, prefix_blocks: Counts) -> Counts:
        """The cached prefixes, with the session's latest prompt supposed to be cached where it went."""
        last = self._last.get(session)
        if last is None:
            return prefix_blocks
        for place, engine in enumerate(roster.engines):
            if engine.info.id == last.engine and engine.info.epoch == last.epoch:
                blocks = min(last.prompt_tokens, prompt_tokens) // engine.info.block_size
                if blocks > prefix_blocks[place]:
                    prefix_blocks = prefix_blocks.copy()
                    prefix_blocks[place] = blocks
        return prefix_blocks
