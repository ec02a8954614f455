"""Who passes, waits, is let go or sent away, at given times: the state machine alone, without an event loop."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import Placed
from vllm_llmd.router.placement.prospects import Prospect, Wait
from vllm_llmd.router.placement.rosters import Wanted
from vllm_llmd.router.policy import Choice
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import NOTHING, Wish
from vllm_llmd.router.waiting.admission import (
    MARGIN_MS,
    RECONSIDERED_MS,
    TICK_MS,
    Admission,
    Event,
    Held,
    LetGo,
    Passed,
)
from vllm_llmd.router.waiting.flow import Arrival, Pool, Shed
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.wire import EngineInfo


@dataclass
class Place:
    """Engines a and b, each of which runs one request at a time; `saves_ms` is what waiting for a saves."""

    saves_ms: float = 0.0
    now_ms: float = 0.0
    queue: int = 100
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        made = RouterSettings(engine_queue=0, queue_requests=self.queue)
        self.fleet = Fleet(made, FakeClock(), "r")
        for name in "ab":
            info = EngineInfo(EngineId(name), Epoch(1), "both", "", ["m"], 16, 99, 999, "f", [], max_sequences=1)
            self.fleet.membership.join(info, 0.0)
            self.fleet.membership.index_exact(EngineId(name))
        self.a, self.b = self.fleet.membership.ready()
        self.core = Admission(made, self.fleet)

    def plan(self, request: str) -> Prospect:
        self.asked.append(request)
        choice = Choice(0)
        if not self.core.is_saturated(self.a, self.now_ms):
            return Prospect(choice, (self.a,))
        wait = Wait(self.a, 100, self.saves_ms) if self.saves_ms else None
        return Prospect(choice, (self.b,), wait)

    def ask(self, request: str, wish: Wish = NOTHING) -> list[Event]:
        arrival = Arrival(request, Pool(Wanted("m"), False), 100, None, 10, self.now_ms)
        return self.core.admit(arrival, wish, lambda: self.plan(request), self.now_ms)

    def until(self, now_ms: float) -> list[Event]:
        """All that happens by then if only time passes."""
        events: list[Event] = []
        while self.now_ms < now_ms:
            self.now_ms += TICK_MS
            events += self.core.tick(self.now_ms)
        return events


def busy(place: Place, *engines: str) -> None:
    for name in engines:
        {"a": place.a, "b": place.b}[name].place(f"on {name}", Placed(0.0, 0))


def test_who_finds_room_passes() -> None:
    place = Place()
    [event] = place.ask("x")
    assert isinstance(event, Passed) and event.item.id == "x"
    assert len(place.core) == 0


def test_who_finds_none_waits_and_is_let_go_when_an_engine_has_some() -> None:
    place = Place()
    busy(place, "a", "b")
    assert place.ask("x") == [] and len(place.core) == 1
    place.now_ms = 30.0
    place.b.ended("on b")
    [event] = place.core.look(place.b.info.id, place.now_ms)
    assert isinstance(event, LetGo) and (event.item.id, event.waited_ms) == ("x", 30.0)


def test_the_next_one_is_let_go_only_when_the_one_before_is_placed() -> None:
    place = Place()
    busy(place, "a", "b")
    assert place.ask("x") == place.ask("y") == []
    place.a.ended("on a")
    place.b.ended("on b")
    [event] = place.core.look(place.a.info.id, 0.0)
    assert isinstance(event, LetGo) and event.item.id == "x"
    assert place.core.look(place.b.info.id, 0.0) == place.core.tick(0.0) == []
    assert place.core.leave("x")
    place.a.place("x", Placed(0.0, 0))
    assert place.core.look(place.a.info.id, 0.0) == []
    [event] = place.core.tick(0.0)
    assert isinstance(event, LetGo) and event.item.id == "y"


def test_one_that_leaves_while_it_waits_is_never_let_go() -> None:
    place = Place()
    busy(place, "a", "b")
    place.ask("x")
    assert not place.core.leave("x")
    place.a.ended("on a")
    assert place.core.look(place.a.info.id, 0.0) == [] and len(place.core) == 0


def test_who_has_waited_too_long_is_sent_away() -> None:
    place = Place()
    busy(place, "a", "b")
    place.ask("x", Wish(ttl_ms=1000))
    [event] = place.until(2000)
    assert isinstance(event, Shed) and event.reason == "expired"


def test_who_makes_room_for_another_is_sent_away_in_the_same_moment() -> None:
    place = Place(queue=1)
    busy(place, "a", "b")
    assert place.ask("x", Wish(priority=-1)) == []
    [event] = place.ask("y")
    assert isinstance(event, Shed) and (event.item.id, event.reason) == ("x", "displaced")
    [event] = place.ask("z")
    assert isinstance(event, Shed) and (event.item.id, event.reason) == ("z", "queue-full")


def test_who_waits_for_one_engine_is_told_of_once_and_asked_again_every_so_often() -> None:
    place = Place(saves_ms=10_000)
    busy(place, "a")
    [event] = place.ask("x")
    assert isinstance(event, Held) and place.a.line_requests == 1
    place.asked.clear()
    assert place.until(2 * RECONSIDERED_MS + TICK_MS) == []
    assert place.asked == ["x", "x"]


def test_who_waits_for_one_engine_takes_the_other_before_it_would_be_late() -> None:
    place = Place(saves_ms=10_000)
    busy(place, "a")
    place.ask("x", Wish(ttft_ms=1000))
    [event] = place.until(5000)
    assert isinstance(event, LetGo) and event.waited_ms <= 1000 - MARGIN_MS + TICK_MS
    assert place.a.line_requests == place.a.line_tokens == 0


def test_a_router_that_stops_sends_everyone_away() -> None:
    place = Place()
    busy(place, "a", "b")
    place.ask("x")
    [event] = place.core.close()
    assert isinstance(event, Shed) and event.reason == "shutting-down" and len(place.core) == 0


@given(st.lists(st.sampled_from(["ask", "urgent", "tick", "look a", "look b", "end", "leave", "go on"]), max_size=60))
def test_nobody_has_two_ends_and_lines_count_who_is_in_them(steps: list[str]) -> None:
    place = Place(saves_ms=400, queue=4)
    busy(place, "a", "b")
    ended: list[str] = []
    waiting: set[str] = set()
    for number, step in enumerate(steps):
        events: list[Event] = []
        match step:
            case "ask" | "urgent":
                waiting.add(str(number))
                events = place.ask(str(number), Wish(priority=step == "urgent"))
            case "tick":
                place.now_ms += TICK_MS
                events = place.core.tick(place.now_ms)
            case "look a" | "look b":
                events = place.core.look(EngineId(step[-1]), place.now_ms)
            case "end":
                place.a.ended("on a")
            case "leave" if waiting:
                place.core.leave(waiting.pop())
            case "go on":
                for request in ended:
                    place.core.leave(request)
                events = place.core.go_on(place.now_ms)
        gone = [event.item.id for event in events if not isinstance(event, Held)]
        assert set(gone) <= waiting and len(gone) == len(set(gone))
        waiting -= set(gone)
        ended += gone
        assert len(place.core) == len(waiting)
        assert 0 <= place.a.line_requests + place.b.line_requests <= len(waiting)
