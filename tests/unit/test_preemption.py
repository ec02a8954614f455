"""Who is given up for whom, and that nobody is lost by it."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import Engine, Placed
from vllm_llmd.router.placement.rosters import Wanted
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import Wish
from vllm_llmd.router.waiting.admission import TICK_MS, Admission, Event, GiveUp, LetGo, Passed
from vllm_llmd.router.waiting.flow import Arrival, Item, Pool, Shed
from vllm_llmd.router.waiting.preemption import Running
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.wire import EngineInfo

TTL_MS = 60_000


@dataclass
class Place:
    """Engines by name, with their roles; each runs two requests at a time and may have 1,000 tokens to compute."""

    roles: dict[str, Role] = field(default_factory=lambda: {"a": "both"})
    queue: int = 100
    most: int = 2

    def __post_init__(self) -> None:
        made = RouterSettings(
            engine_queue=0, engine_prefill_tokens=1000, queue_requests=self.queue, queue_ttl_ms=TTL_MS,
            preemptions=self.most,
        )  # fmt: skip
        self.fleet = Fleet(made, FakeClock(), "r")
        self.now_ms = 0.0
        for name, role in self.roles.items():
            info = EngineInfo(EngineId(name), Epoch(1), role, "", ["m"], 16, 99, 999, "f", [], max_sequences=2)
            self.fleet.membership.join(info, 0.0)
            self.fleet.membership.index_exact(EngineId(name))
        self.core = Admission(made, self.fleet)

    def engine(self, name: str) -> Engine:
        found = self.fleet.membership.get(EngineId(name))
        assert found is not None
        return found

    def arrival(self, request: str, needs_source: bool = False) -> Arrival:
        return Arrival(request, Pool(Wanted("m"), needs_source), 100, None, 10, self.now_ms)

    def run(self, request: str, priority: int, *engines: str, tokens: int = 0, given_up: int = 0) -> None:
        """The request is placed there, now."""
        self.run_as(self.core.item(self.arrival(request), Wish(priority=priority)), engines, tokens, given_up)

    def run_as(self, item: Item, engines: tuple[str, ...], tokens: int = 0, given_up: int = 0) -> None:
        for name in engines:
            self.engine(name).place(item.id, Placed(self.now_ms, tokens))
        running = Running(item, tuple(map(EngineId, engines)), self.now_ms, given_up)
        self.core.preemption.began(running)
        self.now_ms += 1

    def end(self, request: str) -> None:
        self.core.preemption.ended(request)
        for name in self.roles:
            self.engine(name).ended(request)

    def ask(self, request: str, priority: int = 0, needs_source: bool = False) -> list[str]:
        """Who is given up for it."""
        arrival = self.arrival(request, needs_source)
        events = self.core.admit(arrival, Wish(priority=priority), lambda: None, self.now_ms)
        return given_up(events)


def given_up(events: list[Event]) -> list[str]:
    return [event.item.id for event in events if isinstance(event, GiveUp)]


def test_the_lowest_priority_goes_and_of_one_the_latest() -> None:
    place = Place({"a": "both", "b": "both"})
    for number, (priority, engine) in enumerate([(-1, "a"), (-2, "a"), (-2, "b"), (-1, "b")]):
        place.run(str(number), priority, engine)
    assert place.ask("x") == ["2"]


def test_nobody_goes_where_there_is_room() -> None:
    place = Place({"a": "both", "b": "both"})
    place.run("0", -1, "a")
    place.run("1", -1, "a")
    assert place.ask("x") == []
    assert len(place.core) == 0


@pytest.mark.parametrize("priority", [-1, -5])
def test_nobody_goes_for_best_effort(priority: int) -> None:
    place = Place()
    place.run("0", -9, "a")
    place.run("1", -9, "a")
    assert place.ask("x", priority) == []


def test_only_best_effort_that_was_not_given_up_too_often_goes() -> None:
    place = Place(most=2)
    place.run("0", 0, "a")
    place.run("1", -1, "a", given_up=2)
    assert place.ask("x", 1000) == []


def test_with_none_allowed_nobody_goes() -> None:
    place = Place(most=0)
    place.run("0", -1, "a")
    place.run("1", -1, "a")
    assert place.ask("x") == []


def test_who_has_begun_to_answer_stays() -> None:
    place = Place()
    place.run("0", -1, "a")
    place.run("1", -1, "a")
    place.core.preemption.ended("1")
    assert place.ask("x") == ["0"]


def test_who_has_used_half_of_its_time_stays() -> None:
    place = Place()
    place.run("0", -1, "a")
    place.run("1", -1, "a")
    place.now_ms = TTL_MS / 2 + 0.5
    assert place.ask("x") == ["1"]
    place.end("1")
    place.run("2", 0, "a")
    assert place.ask("y") == []


def test_nobody_goes_in_vain() -> None:
    place = Place()
    for number in range(3):  # one more than it runs, as when it has come down to two
        place.run(str(number), 0 if number else -1, "a")
    assert place.ask("x") == []


def test_as_many_go_as_it_takes_and_no_more() -> None:
    place = Place()
    place.run("small", -1, "a", tokens=100)
    place.run("large", -1, "a", tokens=1000)
    place.run("late", -1, "a", tokens=100)
    assert sorted(place.ask("x")) == ["large", "late"], "the last alone would leave too many tokens"


def test_a_request_that_needs_a_source_has_both_make_room() -> None:
    place = Place({"p": "prefill", "d": "decode"})
    for number in range(2):
        place.run(f"on p {number}", -1, "p")
        place.run(f"on d {number}", -1, "d")
    assert place.ask("short") == ["on d 1"]
    place.end("on d 1")
    place.core.leave("short")
    place.run("again", 0, "d")
    assert sorted(place.ask("long", needs_source=True)) == ["on d 0", "on p 1"]


def test_each_that_waits_has_room_of_its_own_made() -> None:
    place = Place()
    place.run("0", -1, "a")
    place.run("1", -1, "a")
    assert place.ask("x") == ["1"]
    assert place.ask("y") == ["0"], "what x is to have is not free"
    assert place.ask("z") == []
    assert place.core.tick(place.now_ms) == [], "those that go are still going"


def test_who_gives_way_in_vain_is_followed_by_another() -> None:
    place = Place()
    place.run("0", -1, "a")
    place.run("1", -1, "a")
    assert place.ask("x") == ["1"]
    place.end("1")
    place.run("others", 0, "a")
    assert given_up(place.core.tick(place.now_ms)) == ["0"]


def test_nobody_is_given_up_again_before_it_has_gone() -> None:
    place = Place()
    place.run("0", -1, "a")
    place.run("1", -1, "a")
    assert place.ask("x") == ["1"]
    assert place.core.leave("x") is False, "its client has gone"
    assert place.ask("y") == [], "there will be room for it"
    place.end("1")
    [gone] = place.core.look(EngineId("a"), place.now_ms)
    assert isinstance(gone, LetGo) and gone.item.id == "y"


def test_the_room_that_one_leaves_is_for_as_many_as_fit() -> None:
    place = Place({"a": "both", "b": "both"})
    place.run("0", -1, "b")
    place.run("1", -1, "b")
    place.run("large", -1, "a", tokens=1000)
    assert place.ask("x") == ["large"]
    assert place.ask("y") == []
    assert place.ask("z") == ["1"]


@given(st.lists(st.integers(-3, 1), min_size=2, max_size=12).filter(lambda priorities: len(priorities) % 2 == 0))
def test_of_all_that_engines_have_the_lowest_and_latest_goes(priorities: list[int]) -> None:
    names = [f"e{number}" for number in range(len(priorities) // 2)]
    place = Place(dict.fromkeys(names, "both"))
    for number, priority in enumerate(priorities):
        place.run(str(number), priority, names[number % len(names)])
    best_effort = [(priority, -number) for number, priority in enumerate(priorities) if priority < 0]
    assert place.ask("x") == ([str(-min(best_effort)[1])] if best_effort else [])


def test_nobody_goes_who_would_find_the_queue_full() -> None:
    place = Place(queue=2)
    place.run("0", -1, "a")
    place.run("1", -1, "a")
    assert place.ask("x") == ["1"]
    assert place.ask("y") == []


STEPS = st.lists(
    st.tuples(st.sampled_from(["best effort", "urgent", "end", "answer", "tick"]), st.integers(0, 9)), max_size=80
)


@dataclass
class World:
    """Whoever drives the rules: what is placed runs on one of two engines, what is given up asks again."""

    place: Place = field(default_factory=lambda: Place({"a": "both", "b": "both"}))
    waiting: dict[str, Item] = field(default_factory=dict)
    running: dict[str, Item] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    let_go: list[Item] = field(default_factory=list)

    def come(self, request: str, priority: int) -> None:
        arrival, wish = self.place.arrival(request), Wish(priority=priority)
        item = self.waiting[request] = self.place.core.item(arrival, wish)
        self.act(self.place.core.admit(arrival, wish, lambda: None, self.place.now_ms))
        assert request in self.waiting or request in self.running, item

    def act(self, events: list[Event]) -> None:
        for event in events:
            assert not isinstance(event, Shed), "there is room and time for all"
            if isinstance(event, GiveUp):
                self.give_up(event.item.id)
            elif isinstance(event, LetGo | Passed):
                self.begin(event)

    def begin(self, event: LetGo | Passed) -> None:
        request = event.item.id
        equals = [each for each in self.waiting.values() if each.priority == event.item.priority]
        assert isinstance(event, Passed) or event.item.arrived_ms == min(each.arrived_ms for each in equals)
        self.running[request] = self.waiting.pop(request)
        room = [name for name in "ab" if len(self.place.engine(name).occupancy) < 2]
        self.place.run_as(self.running[request], (room[0],), given_up=self.times.get(request, 0))
        if self.place.core.leave(request):
            self.act(self.place.core.go_on(self.place.now_ms))

    def give_up(self, request: str) -> None:
        item = self.waiting[request] = self.running.pop(request)
        assert item.priority < 0
        self.times[request] = self.times.get(request, 0) + 1
        self.leaves(request)
        arrival = Arrival(request, item.pool, 100, None, 10, item.arrived_ms)
        wish = Wish(priority=item.priority)
        self.act(self.place.core.readmit(arrival, wish, lambda: None, self.place.now_ms))

    def leaves(self, request: str) -> None:
        engine = next(name for name in "ab" if request in self.place.engine(name).occupancy._prefills)
        self.place.end(request)
        self.act(self.place.core.look(EngineId(engine), self.place.now_ms))

    def end(self, number: int) -> None:
        request = list(self.running)[number % len(self.running)]
        del self.running[request]
        self.leaves(request)


@given(STEPS)
def test_nobody_is_lost_given_up_too_often_or_overtaken_by_its_equals(steps: list[tuple[str, int]]) -> None:
    world, came = World(), 0
    for step, number in steps:
        match step:
            case "best effort" | "urgent":
                came += 1
                world.come(str(came), number if step == "urgent" else -1 - number % 2)
            case "end" if world.running:
                world.end(number)
            case "answer" if world.running:
                world.place.core.preemption.ended(list(world.running)[number % len(world.running)])
            case "tick":
                world.place.now_ms += TICK_MS
                world.act(world.place.core.tick(world.place.now_ms))
        assert max(world.times.values(), default=0) <= world.place.most
        assert len(world.place.core) == len(world.waiting)
        assert all(len(world.place.engine(name).occupancy) <= 2 for name in "ab")
    ends = 0
    while world.running:
        world.end(0)
        ends += 1
        world.act(world.place.core.tick(world.place.now_ms))
    assert not world.waiting and ends <= came
