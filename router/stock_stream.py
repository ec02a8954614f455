"""One rank of a stock engine as the events thread sees it: two sockets, a sequence, a follower.

It listens to the live events, or to a replay and to nothing else meanwhile: ZeroMQ keeps what comes live. A gap that
the replay does not close empties what is known: an index that lacks blocks beats one that invents some.
"""

from dataclasses import dataclass, field
from typing import Final

import zmq

from vllm_llmd.kernels.kv_events_cpu import Follower
from vllm_llmd.kernels.kv_events_plain import Change
from vllm_llmd.router.stock_sequence import Sequence
from vllm_llmd.router.stock_settings import Rank

REPLAY_PATIENCE_MS: Final = 2000
"""How long a replay may be silent."""
MESSAGES_PER_TURN: Final = 256
BYTES_PER_TURN: Final = 4 << 20
NUMBER_BYTES: Final = 8
LAST_OF_REPLAY: Final = (-1).to_bytes(NUMBER_BYTES, "big", signed=True)
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
    context: zmq.Context[zmq.Socket[bytes]]
    counts: Events = field(default_factory=Events)
    follower: Follower = field(default_factory=Follower)

    def __post_init__(self) -> None:
        self._sequence = Sequence()
        self._held: list[Message] = []
        self._replay: zmq.Socket[bytes] | None = None
        self._replay_until_ms = 0.0
        self._live = self._open(zmq.SUB, self.rank.events)
        self._live.setsockopt(zmq.SUBSCRIBE, self.rank.topic.encode())

    @property
    def listening(self) -> zmq.Socket[bytes]:
        """The socket that matters now."""
        return self._live if self._replay is None else self._replay

    def resync(self, now_ms: float) -> None:
        """Starts from an empty cache: everything is asked for again."""
        self.follower.forget()
        self._sequence.restart()
        self._held.clear()
        self._ask(now_ms)

    def receive(self, now_ms: float) -> Change | None:
        """Takes in some of what has come. None if it changes nothing."""
        if self._replay is None:
            payloads = self._take_live(self._some(self._live), now_ms)
        else:
            payloads = self._take_replayed(self._replay, now_ms)
        return self._followed(payloads)

    def tick(self, now_ms: float) -> Change | None:
        """Gives a replay up that does not go on."""
        if self._replay is None or now_ms < self._replay_until_ms:
            return None
        return self._followed(self._end_replay(now_ms))

    def close(self) -> None:
        self._live.close(linger=0)
        self._hang_up()

    # --- live -------------------------------------------------------------------------------------------------------

    def _take_live(self, messages: list[Message], now_ms: float) -> list[bytes]:
        payloads: list[bytes] = []
        for place, (number, payload) in enumerate(messages):
            standing = self._sequence.live(number)
            if standing == "restart":
                self.counts.restarts += 1
                self._forget(payloads)
                self._sequence.restart()
                standing = self._sequence.live(number)
            if standing == "gap" and self.rank.replay is not None:
                self._held = messages[place:]
                self._ask(now_ms)
                break
            if standing == "gap":
                self._pass_over(number, payloads)
                standing = self._sequence.live(number)
            if standing == "take":
                payloads.append(payload)
        return payloads

    # --- replay -----------------------------------------------------------------------------------------------------

    def _ask(self, now_ms: float) -> None:
        if self.rank.replay is None:
            return
        self._hang_up()
        self._replay = self._open(zmq.DEALER, self.rank.replay)
        self._replay.send_multipart([b"", self._sequence.next.to_bytes(NUMBER_BYTES, "big")])
        self._replay_until_ms = now_ms + REPLAY_PATIENCE_MS

    def _take_replayed(self, replay: zmq.Socket[bytes], now_ms: float) -> list[bytes]:
        payloads: list[bytes] = []
        for number, payload in self._some(replay):
            self._replay_until_ms = now_ms + REPLAY_PATIENCE_MS
            if number < 0:
                return [*payloads, *self._end_replay(now_ms)]
            standing = self._sequence.replayed(number)
            if standing == "hole":
                self._pass_over(number, payloads)
                standing = self._sequence.replayed(number)
            if standing == "take":
                payloads.append(payload)
        return payloads

    def _end_replay(self, now_ms: float) -> list[bytes]:
        """Goes on with what was held back."""
        self._hang_up()
        held, self._held = self._held, []
        if not held:
            return []
        payloads: list[bytes] = []
        if held[0][0] > self._sequence.next:
            self._pass_over(held[0][0], payloads)
        else:
            self.counts.gaps_closed += 1
        return [*payloads, *self._take_live(held, now_ms)]

    def _hang_up(self) -> None:
        if self._replay is not None:
            self._replay.close(linger=0)
            self._replay = None

    # --- both -------------------------------------------------------------------------------------------------------

    def _pass_over(self, number: int, payloads: list[bytes]) -> None:
        """The gap before this message stays open. Who knows nothing yet has lost nothing by it."""
        if self._sequence.next > 0:
            self.counts.gaps_cleared += 1
            self._forget(payloads)
        self._sequence.pass_over(number)

    def _forget(self, payloads: list[bytes]) -> None:
        payloads.clear()
        self.follower.forget()

    def _followed(self, payloads: list[bytes]) -> Change | None:
        self.counts.messages += len(payloads)
        change = self.follower.follow(payloads)
        return change if change.cleared or len(change.removed) or len(change.stored) else None

    def _open(self, kind: int, endpoint: str) -> zmq.Socket[bytes]:
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

    def _some(self, socket: zmq.Socket[bytes]) -> list[Message]:
        """What is there, up to a bound. The last two frames of a message are its number and its payload."""
        messages: list[Message] = []
        size = 0
        while len(messages) < MESSAGES_PER_TURN and size < BYTES_PER_TURN:
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            if len(frames) < 2 or len(frames[-2]) != NUMBER_BYTES:
                self.counts.misshapen += 1
                continue
            size += len(frames[-1])
            messages.append((int.from_bytes(frames[-2], "big", signed=True), frames[-1]))
        return messages
