import numpy as np

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.candidates import Roster
from vllm_llmd.router.index.sessions import LONGEST_NAME, SESSIONS_KEPT, Last, Sessions, read_session
from vllm_llmd.router.members.membership import Engine, State
from vllm_llmd.wire import EngineInfo


def roster(*epochs: int) -> Roster:
    infos = [
        EngineInfo(EngineId("ab"[at]), Epoch(epoch), "both", "", ["m"], 16, 1, 1, "f", [])
        for at, epoch in enumerate(epochs)
    ]
    return Roster.of([Engine(info, State.READY, 0.0) for info in infos], "m")


def supposed(
    sessions: Sessions, session: str, prompt_tokens: int = 1000, prefix: tuple[int, int] = (0, 0)
) -> list[int]:
    given = np.array(prefix, np.int64)
    got = sessions.supposed(session, roster(1, 2), prompt_tokens, given)
    assert given.tolist() == list(prefix), "what was given is left as it is"
    return got.tolist()


def test_a_sessions_latest_prompt_is_supposed_to_be_cached_where_it_went() -> None:
    sessions = Sessions()
    assert supposed(sessions, "s") == [0, 0]
    sessions.went("s", Last(EngineId("b"), Epoch(2), 100))
    assert supposed(sessions, "s") == [0, 6]
    assert supposed(sessions, "other") == [0, 0]
    assert supposed(sessions, "s", prompt_tokens=40) == [0, 2]
    assert supposed(sessions, "s", prefix=(9, 3)) == [9, 6]
    assert supposed(sessions, "s", prefix=(9, 8)) == [9, 8]
    sessions.went("s", Last(EngineId("a"), Epoch(1), 200))
    assert supposed(sessions, "s") == [12, 0]


def test_another_life_of_the_engine_has_nothing_of_the_session() -> None:
    sessions = Sessions()
    sessions.went("s", Last(EngineId("a"), Epoch(7), 100))
    sessions.went("t", Last(EngineId("gone"), Epoch(1), 100))
    assert supposed(sessions, "s") == supposed(sessions, "t") == [0, 0]


def test_the_sessions_used_longest_ago_are_forgotten() -> None:
    sessions = Sessions()
    for number in range(SESSIONS_KEPT + 10):
        sessions.went(str(number), Last(EngineId("a"), Epoch(1), 100))
        sessions.went("0", Last(EngineId("a"), Epoch(1), 100))
    assert len(sessions) == SESSIONS_KEPT
    assert supposed(sessions, "0") == [6, 0] and supposed(sessions, "5") == [0, 0]


def test_a_session_is_named_by_a_header_in_any_case_and_ours_counts_first() -> None:
    assert read_session([("X-Session-Id", " one "), ("other", "x")]) == "one"
    assert read_session([("x-session-id", "one"), ("X-LLMD-Session", "two")]) == "two"
    assert read_session([("x-llmd-session", ""), ("x-session-id", "one")]) == "one"
    assert read_session([("x-llmd-session", "x" * (LONGEST_NAME + 1))]) is None
    assert read_session([]) is None
