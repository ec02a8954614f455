"""One rank of a stock engine as the events thread sees it: two sockets, a sequence, a follower.

It listens to the live events, or to a replay and to nothing else meanwhile: ZeroMQ keeps what comes live. A gap that
the replay does not close empties what is known: an index that lacks blocks beats one that invents some.
"""

from dataclasses import dataclass, field
from typing import Final

import zmq

from vllm_llmd.kernels.frames_cpu import NUMBER_BYTES, Frames, frames_of
from vllm_llmd.kernels.kv_events_cpu import Follower
from vllm_llmd.kernels.kv_events_plain import Change
from vllm_llmd.router.stock.sequence import Sequence
from vllm_llmd.router.stock.settings import Rank
from vllm_llmd.router.zmq_receive import Receiver, Socket

REPLAY_PATIENCE_MS: Final = 5000
"""How long a replay may be silent."""
HIGH_WATER_MARK: Final = 100_000

Message = tuple[int, bytes]
"""A message's number and its payload."""


@dataclass
class Events:
    """What happened to one stream, since start. Counted by the events thread, read by any."""

    messages: int = 0
    misshapen: int = 0
    restarts: int = 0
    gaps_closed: int = 0
    gaps_cleared: int = 0


@dataclass
class Stream:
    """`sockets` are to be polled; whatever comes is taken in by `receive`."""

    rank: Rank
    context: zmq.Context[Socket]
    receiver: Receiver
    counts: Events = field(default_factory=Events)
    follower: Follower = field(default_factory=Follower)

    def __post_init__(self) -> None:
        self._sequence = Sequence()
        self._held: list[Message] = []
        self._replay: Socket | None = None
        self._replay_until_ms = 0.0
        self._live = self._open(zmq.SUB, self.rank.events)
        self._live.setsockopt(zmq.SUBSCRIBE, self.rank.topic.encode())

    @property
    def listening(self) -> Socket:
        """The socket that matters now."""
        return self._live if self._replay is None else self._replay

    def resync(self, now_ms: float) -> None:
        """Starts from an empty cache: everything is asked for again."""
        self.follower.forget()
        self._sequence.restart()
        self._held.clear()
        self._ask(now_ms)

    def receive(self, now_ms: float) -> list[Change]:
        """Takes in some of what has come: what it changes."""
        frames = self.receiver.receive(self.listening)
        self.counts.misshapen += frames.misshapen
        if not len(frames):
            return []
        return self._take_live(frames, now_ms) if self._replay is None else self._take_replayed(frames, now_ms)

    def tick(self, now_ms: float) -> list[Change]:
        """Gives a replay up that does not go on."""
        return self._end_replay(now_ms) if self._replay is not None and now_ms >= self._replay_until_ms else []

    def close(self) -> None:
        self._live.close(linger=0)
        self._hang_up()

    # --- live -------------------------------------------------------------------------------------------------------

    def _take_live(self, frames: Frames, now_ms: float) -> list[Change]:
        return self._followed(frames if self._sequence.live_run(frames.numbers) else self._next_of(frames, now_ms))

    def _next_of(self, frames: Frames, now_ms: float) -> Frames:
        """Those that follow what is known, one by one."""
        taken: list[int] = []
        for place, number in enumerate(frames.numbers.tolist()):
            standing = self._sequence.live(number)
            if standing == "restart":
                self.counts.restarts += 1
                self._forget(taken)
                self._sequence.restart()
                standing = self._sequence.live(number)
            if standing == "gap" and self.rank.replay is not None:
                self._held = [(int(frames.numbers[i]), frames.payload(i)) for i in range(place, len(frames))]
                self._ask(now_ms)
                break
            if standing == "gap":
                self._pass_over(number, taken)
                standing = self._sequence.live(number)
            if standing == "take":
                taken.append(place)
        return frames.only(taken)

    # --- replay -----------------------------------------------------------------------------------------------------

    def _ask(self, now_ms: float) -> None:
        if self.rank.replay is None:
            return
        self._hang_up()
        self._replay = self._open(zmq.DEALER, self.rank.replay)
        self._replay.send_multipart([b"", self._sequence.next.to_bytes(NUMBER_BYTES, "big")])
        self._replay_until_ms = now_ms + REPLAY_PATIENCE_MS

    def _take_replayed(self, frames: Frames, now_ms: float) -> list[Change]:
        self._replay_until_ms = now_ms + REPLAY_PATIENCE_MS
        taken: list[int] = []
        for place, number in enumerate(frames.numbers.tolist()):
            if number < 0:
                return [*self._followed(frames.only(taken)), *self._end_replay(now_ms)]
            standing = self._sequence.replayed(number)
            if standing == "hole":
                self._pass_over(number, taken)
                standing = self._sequence.replayed(number)
            if standing == "take":
                taken.append(place)
        return self._followed(frames.only(taken))

    def _end_replay(self, now_ms: float) -> list[Change]:
        """Goes on with what was held back."""
        self._hang_up()
        held, self._held = self._held, []
        if not held:
            return []
        if held[0][0] > self._sequence.next:
            self._pass_over(held[0][0], [])
        else:
            self.counts.gaps_closed += 1
        return self._take_live(frames_of(held), now_ms)

    def _hang_up(self) -> None:
        if self._replay is not None:
            self._replay.close(linger=0)
            self._replay = None

    # --- both -------------------------------------------------------------------------------------------------------

    def _pass_over(self, number: int, taken: list[int]) -> None:
        """The gap before this message stays open. Who knows nothing yet has lost nothing by it."""
        if self._sequence.next > 0:
            self.counts.gaps_cleared += 1
            self._forget(taken)
        self._sequence.pass_over(number)

    def _forget(self, taken: list[int]) -> None:
        taken.clear()
        self.follower.forget()

    def _followed(self, frames: Frames) -> list[Change]:
        self.counts.messages += len(frames)
        change = self.follower.follow_frames(frames)
        return [change] if change else []

    def _open(self, kind: int, endpoint: str) -> Socket:
        socket = self.context.socket(kind)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RCVHWM, HIGH_WATER_MARK),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 2000),
        ):
            socket.setsockopt(option, value)
        socket.connect(endpoint)
        return socket
