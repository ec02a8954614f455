"""Attempts at engines that have not begun to answer, each of which can be broken off. Event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vllm_llmd.errors import LlmdError
from vllm_llmd.router.waiting.preemption import Preemption, Running


class GivenUp(LlmdError):
    """The attempt was broken off for the sake of another request."""


class InFlight:
    """Tells `preemption` who is with engines, and breaks off whom it gives up."""

    def __init__(self, preemption: Preemption) -> None:
        self._preemption = preemption
        self._attempts: dict[str, asyncio.Timeout] = {}

    @asynccontextmanager
    async def until_answered(self, running: Running) -> AsyncIterator[None]:
        """While the request is with its engines and has no answer yet. Raises GivenUp if it is broken off."""
        request = running.item.id
        try:
            async with asyncio.timeout(None) as attempt:
                self._attempts[request] = attempt
                self._preemption.began(running)
                try:
                    yield
                finally:
                    self._preemption.ended(request)
                    del self._attempts[request]
        except TimeoutError:
            if not attempt.expired():
                raise
            raise GivenUp from None

    def give_up(self, request: str) -> None:
        """Its connection to the engine is closed as soon as the loop comes round."""
        self._attempts[request].reschedule(asyncio.get_running_loop().time())
