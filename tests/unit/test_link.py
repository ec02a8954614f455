"""The engine's end of the link, against a bare ROUTER socket."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import pytest
import zmq

from vllm_llmd import wire
from vllm_llmd.errors import ConfigError
from vllm_llmd.kv_connector import link as link_module
from vllm_llmd.kv_connector import mirror
from vllm_llmd.kv_connector.link import Dialogue, EngineLink, LinkSettings, Say, merge_members
from vllm_llmd.names import BlockName, EngineId, Epoch

DEADLINE_S = 60.0

INFO = wire.EngineInfo(EngineId("a"), Epoch(7), "both", "http://h", ["m"], 16, 9, 9, "f", [])
OTHER = msgspec.structs.replace(INFO, id=EngineId("b"))


def names(*values: int) -> list[BlockName]:
    return [BlockName(value) for value in values]


def until(ask: Callable[[], bool]) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while not ask():
        assert time.monotonic() < give_up
        time.sleep(0.01)


class BareRouter:
    """A ROUTER socket that says what it is told to."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str = "tcp://127.0.0.1:0") -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        until(lambda: self._bound(endpoint))  # a port that was closed just now takes a moment
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.peer = b""

    def _bound(self, endpoint: str) -> bool:
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError:
            return False
        return True

    def receive(self) -> wire.LinkMessage:
        assert self.socket.poll(DEADLINE_S * 1000), "nothing came"
        self.peer, frame = self.socket.recv_multipart()
        return wire.decode_link(frame)

    def receive_a(self, kind: type) -> Any:
        give_up = time.monotonic() + DEADLINE_S
        while not isinstance(message := self.receive(), kind):
            assert time.monotonic() < give_up, f"no {kind.__name__}, but {message}"
        return message

    def send(self, message: wire.Message) -> None:
        self.send_raw(wire.encode(message))

    def send_raw(self, frame: bytes) -> None:
        self.socket.send_multipart([self.peer, frame])

    def welcome(self, life: str = "r") -> None:
        self.receive_a(wire.Hello)
        self.send(wire.Welcome(life, 20))

    def snapshot(self) -> tuple[int, set[int]]:
        self.send(wire.SnapshotWanted(INFO.epoch, "test"))
        first = self.receive_a(wire.Snapshot)
        parts = [first, *(self.receive_a(wire.Snapshot) for _ in range(first.parts - 1))]
        assert [part.part for part in parts] == list(range(first.parts)) and {part.seq for part in parts} == {first.seq}
        return first.seq, {name for part in parts for name in wire.unpack_names(part.names)}


Bare = Callable[..., BareRouter]


@pytest.fixture
def bare() -> Iterator[Bare]:
    routers: list[BareRouter] = []
    with zmq.Context() as context:

        def make(*endpoint: str) -> BareRouter:
            routers.append(BareRouter(context, *endpoint))
            return routers[-1]

        yield make
        for router in routers:
            router.socket.close()


@pytest.fixture
def router(bare: Bare) -> BareRouter:
    return bare()


@pytest.fixture
def start() -> Iterator[Callable[..., EngineLink]]:
    started: list[EngineLink] = []

    def start(*routers: str, **more: Any) -> EngineLink:
        link = EngineLink(LinkSettings(INFO, routers, more.pop("read_load", wire.Load), **more))
        link.start()
        started.append(link)
        return link

    yield start
    for link in started:
        link.close()


Start = Callable[..., EngineLink]


def test_hello_is_said_again_until_welcome_and_then_heartbeats_carry_the_load(router: BareRouter, start: Start) -> None:
    start(router.endpoint, read_load=lambda: wire.Load(waiting=3))
    assert router.receive() == wire.Hello(INFO)
    assert router.receive() == wire.Hello(INFO)
    router.send(wire.Welcome("r", 20))
    beats = [router.receive_a(wire.Heartbeat) for _ in range(3)]
    assert all(beat.load.waiting == 3 and (beat.seq, beat.blocks) == (0, 0) for beat in beats)


def test_changes_come_in_order_with_a_number_each(router: BareRouter, start: Start) -> None:
    link = start(router.endpoint)
    router.welcome()
    router.receive_a(wire.Heartbeat)
    link.publish(False, [], names(1, 2))
    link.publish(False, [], [])
    link.publish(True, names(2), names(3))
    one, two = (router.receive_a(wire.BlocksChanged) for _ in range(2))
    assert (one.seq, one.cleared, wire.unpack_names(one.stored)) == (1, False, [1, 2])
    assert (two.seq, two.cleared, wire.unpack_names(two.removed), wire.unpack_names(two.stored)) == (2, True, [2], [3])
    link.publish(False, [], names(4))
    beat = next(beat for beat in iter(lambda: router.receive_a(wire.Heartbeat), None) if beat.seq == 3)
    assert beat.blocks == 2


def test_a_snapshot_comes_in_parts_and_agrees_with_its_number(
    router: BareRouter, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "NAMES_PER_PART", 3)
    link = start(router.endpoint)
    link.publish(False, [], names(*range(10)))
    link.publish(False, names(0), [])
    router.welcome()
    until(lambda: router.receive_a(wire.Heartbeat).seq == 2)
    assert router.snapshot() == (2, set(range(1, 10)))
    link.publish(True, [], [])
    until(lambda: router.receive_a(wire.Heartbeat).seq == 3)
    assert router.snapshot() == (3, set())


def test_what_a_request_held_is_told(router: BareRouter, start: Start) -> None:
    link = start(router.endpoint)
    router.welcome()
    router.receive_a(wire.Heartbeat)
    link.seen("r-1", 40, names(5, 6))
    assert router.receive_a(wire.RequestSeen) == wire.RequestSeen(
        INFO.id, INFO.epoch, "r-1", 40, wire.pack_names(names(5, 6))
    )


def test_what_was_seen_travels_before_the_change_that_follows_it(router: BareRouter, start: Start) -> None:
    link = start(router.endpoint)
    router.welcome()
    router.receive_a(wire.Heartbeat)
    link.seen("r-1", 40, names(5))
    link.publish(False, [], names(5))
    told = router.receive()
    while isinstance(told, wire.Heartbeat):
        told = router.receive()
    assert isinstance(told, wire.RequestSeen)
    assert router.receive_a(wire.BlocksChanged).seq == 1


def test_a_router_that_starts_late_or_again_gets_a_hello(bare: Bare, start: Start) -> None:
    first = bare()
    endpoint = first.endpoint
    first.socket.close()
    link = start(endpoint)
    link.publish(False, [], names(1))
    for life in ("one", "two"):
        router = bare(endpoint)
        if life == "two":
            router.receive_a(wire.Heartbeat)
            router.send(wire.HelloWanted(life))
        router.welcome(life)
        assert router.snapshot() == (1, {1})
        router.socket.close()


def test_members_of_all_routers_and_static_peers_come_together(bare: Bare, start: Start) -> None:
    one, two = bare(), bare()
    told: list[Mapping[EngineId, wire.EngineInfo]] = []
    static = msgspec.structs.replace(INFO, id=EngineId("static"))
    link = start(one.endpoint, two.endpoint, peers=(static,), on_members=told.append)
    assert set(link.members()) == {"static"}
    one.welcome()
    two.welcome()
    one.send(wire.Members([INFO, OTHER]))
    until(lambda: set(link.members()) == {"static", "a", "b"})
    later = msgspec.structs.replace(OTHER, epoch=Epoch(8))
    two.send(wire.Members([later]))
    until(lambda: link.members()[OTHER.id] == later)
    one.send(wire.Members([]))
    until(lambda: set(told[-1]) == {"static", "b"})
    assert dict(told[-1]) == dict(link.members())


def test_messages_that_cannot_be_used_cost_one_log_line_each_kind_and_no_more(
    router: BareRouter, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    start(router.endpoint)
    router.welcome()
    for _ in range(5):
        router.send_raw(bytes((wire.MAJOR + 1, 0)) + b"x")
        router.send_raw(b"x")
    router.send(wire.SnapshotWanted(INFO.epoch, "still there"))
    router.receive_a(wire.Snapshot)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "same major version" in lines[0] and "3 bytes" in lines[1]


def test_close_says_goodbye_and_ends_the_thread(
    router: BareRouter, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "GOODBYE_LINGER_MS", 60_000)
    link = start(router.endpoint)
    router.welcome()
    router.receive_a(wire.Heartbeat)
    link.close()
    assert router.receive_a(wire.Goodbye) == wire.Goodbye(INFO.id, INFO.epoch)
    assert "llmd-link" not in {thread.name for thread in threading.enumerate()}
    link.close()
    link.publish(False, [], names(1))


def test_an_engine_about_to_leave_says_so_at_once_and_goes_on_saying_so(router: BareRouter, start: Start) -> None:
    link = start(router.endpoint)
    router.receive_a(wire.Hello)
    router.send(wire.Welcome("r", 60_000))
    assert router.receive_a(wire.Heartbeat).draining is False
    link.drain()
    assert router.receive_a(wire.Heartbeat).draining is True
    router.send(wire.Welcome("r", 20))
    assert router.receive_a(wire.Heartbeat).draining is True
    assert router.receive_a(wire.Heartbeat).draining is True


def test_without_a_router_nothing_blocks_and_static_peers_are_members(start: Start) -> None:
    link = start(peers=(OTHER,))
    for number in range(1000):
        link.publish(False, [], names(number))
    assert set(link.members()) == {"b"}
    link.close()


def test_an_endpoint_that_is_none_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'nonsense'"):
        EngineLink(LinkSettings(INFO, ("nonsense",), wire.Load))


# --- pure -------------------------------------------------------------------------------------------------------


def test_a_dialogue_repeats_hello_until_welcome_and_then_beats() -> None:
    dialogue = Dialogue(INFO)
    assert dialogue.due(0) == {Say.HELLO}
    assert dialogue.due(999) == set()
    assert dialogue.due(1000) == {Say.HELLO}
    assert dialogue.on(wire.Welcome("r", 500), 1100) == set()
    assert dialogue.due(1100) == {Say.HEARTBEAT} and dialogue.due(1599) == set()
    assert dialogue.due(1600) == {Say.HEARTBEAT}


def test_a_router_that_forgot_the_engine_gets_hello_at_once() -> None:
    dialogue = Dialogue(INFO)
    dialogue.on(wire.Welcome("r", 500), 0)
    assert dialogue.on(wire.HelloWanted("s"), 100) == {Say.HELLO} and not dialogue.welcomed
    assert dialogue.due(1099) == set() and dialogue.due(1100) == {Say.HELLO}


def test_a_snapshot_is_owed_to_this_life_only() -> None:
    dialogue = Dialogue(INFO)
    assert dialogue.on(wire.SnapshotWanted(Epoch(7), ""), 0) == {Say.SNAPSHOT}
    assert dialogue.on(wire.SnapshotWanted(Epoch(6), ""), 0) == set()


def test_after_a_refusal_hello_is_said_more_rarely() -> None:
    dialogue = Dialogue(INFO)
    dialogue.due(0)
    dialogue.on(wire.Refused("former life"), 10)
    assert dialogue.due(link_module.REFUSED_HELLO_EVERY_MS) == set()
    assert dialogue.due(link_module.REFUSED_HELLO_EVERY_MS + 10) == {Say.HELLO}


def test_of_lists_that_disagree_the_later_counts() -> None:
    later = msgspec.structs.replace(OTHER, epoch=Epoch(9))
    assert dict(merge_members([OTHER], [[INFO], [later]])) == {INFO.id: INFO, OTHER.id: later}
