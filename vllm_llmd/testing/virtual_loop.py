"""An event loop whose time is made up: while everyone waits, it jumps to when the first of them is due."""

import asyncio
import selectors
from selectors import SelectorKey
from typing import Final

A_LITTLE_S: Final = 1e-9
"""By so much it comes too late, or rounding may have it come too early, again and again."""


class _Selector(selectors.DefaultSelector):
    """Never waits for time to pass: `now_s` moves instead."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout is not None:
            self.now_s += timeout + A_LITTLE_S
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Code that asks the loop for the time runs at once, and every time the same."""

    def __init__(self) -> None:
        self._made_up = _Selector()
        super().__init__(self._made_up)

    def time(self) -> float:
        return self._made_up.now_s
