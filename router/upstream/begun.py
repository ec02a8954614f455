"""An answer that has begun to reach its client, whichever engine goes on with it."""

from dataclasses import dataclass

from aiohttp import web

from vllm_llmd.router.upstream import rewrite
from vllm_llmd.router.upstream.attempt import Answer
from vllm_llmd.router.upstream.told import Told
from vllm_llmd.router.upstream.usage import Meter, Unasked


@dataclass(frozen=True)
class Begun:
    """An answer on its way to the client. `told` is None where no other engine could go on with it."""

    response: web.StreamResponse
    meter: Meter
    told: Told | None
    fingerprint: str
    is_stream: bool

    def feed(self, chunk: bytes) -> bytes:
        """What to pass on now that the chunk has come."""
        return self.meter.feed(chunk if self.told is None else self.told.feed(chunk))

    @property
    def says_why(self) -> bool:
        """Whether what is left of the answer tells the client that the engine has failed."""
        return self.told is not None and self.told.says_why

    def end(self) -> bytes:
        """What is left to pass on when nothing more comes."""
        return (b"" if self.told is None else self.meter.feed(self.told.end())) + self.meter.end()


def begin(answer: Answer, meter: Meter, told: Told | None, fingerprint: str) -> Begun:
    """What the client gets of an answer whose first bytes are here; what may change on its way has no length."""
    response = web.StreamResponse(status=answer.status)
    changes = told is not None or isinstance(meter, Unasked)
    for name, value in rewrite.unsized(answer.headers) if changes else answer.headers:
        response.headers.add(name, value)
    return Begun(response, meter, told, fingerprint, answer.is_stream)
