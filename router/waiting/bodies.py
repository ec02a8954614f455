"""How many bytes of request bodies the router holds, and who finds room for how many more. Pure.

A body counts from when its length is told, or as it is read, until the answer has begun and no other engine may have to
be asked. Large ones leave a share to small ones, so that a few giants do not keep everybody out.
"""

from typing import Final

from vllm_llmd.errors import LlmdError

SMALL_BYTES: Final = 1 << 20
SMALL_SHARE: Final = 8
"""One part in so many is for small bodies only."""
SMALL_PARTS: Final = 8
"""At least so many small bodies have room there."""


class BodyTooLarge(LlmdError):
    """The body would find no room though there were no others."""


class NoRoomForBody(LlmdError):
    """The body would find room if there were fewer others."""


class Bodies:
    """Room for `most_bytes` of bodies together, of which none may have more than `largest_bytes`."""

    def __init__(self, most_bytes: int, largest_bytes: int) -> None:
        self._most = most_bytes
        self._for_small = most_bytes // SMALL_SHARE
        self._small = min(SMALL_BYTES, self._for_small // SMALL_PARTS)
        self.largest_bytes = min(largest_bytes, most_bytes - self._for_small)
        self.size_bytes = 0

    def hold(self) -> "Hold":
        """Room for one more body, of no length yet."""
        return Hold(self)

    def grow(self, size_bytes: int, more_bytes: int) -> None:
        """A body of `size_bytes` becomes longer. Raises BodyTooLarge or NoRoomForBody, and then counts no more."""
        grown = size_bytes + more_bytes
        if grown > self.largest_bytes:
            raise BodyTooLarge(f"a body may have {self.largest_bytes} bytes at most")
        most = self._most if grown <= self._small else self._most - self._for_small
        if self.size_bytes + more_bytes > most:
            raise NoRoomForBody(f"{self.size_bytes} bytes of bodies are held; {more_bytes} more are too many")
        self.size_bytes += more_bytes

    def shrink(self, less_bytes: int) -> None:
        """So many are held no longer."""
        self.size_bytes -= less_bytes


class Hold:
    """What one body takes, until `let_go`. A context manager that lets go at its end."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._size = 0

    @property
    def largest_bytes(self) -> int:
        """What a body can have at most."""
        return self._bodies.largest_bytes

    def reach(self, size_bytes: int) -> None:
        """The body has so many bytes, or more. Raises BodyTooLarge or NoRoomForBody."""
        if size_bytes > self._size:
            self._bodies.grow(self._size, size_bytes - self._size)
            self._size = size_bytes

    def let_go(self) -> None:
        """Nobody needs the body any more. To be said as often as one likes."""
        self._bodies.shrink(self._size)
        self._size = 0

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
