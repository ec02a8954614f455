"""Loads and rates of a fleet's engines as they are read at once: those that the engines have themselves."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.candidates import Loads, RateColumns, Roster
from vllm_llmd.router.members.ledger import FIRST, Ledger
from vllm_llmd.router.members.membership import Membership, Placed
from vllm_llmd.router.members.rates import Rates, packed
from vllm_llmd.wire import EngineInfo, Load


def info(engine: int, epoch: int) -> EngineInfo:
    return EngineInfo(EngineId(f"e{engine}"), Epoch(epoch), "both", "", ["m"], 16, 100, 1000, "f", [])


events = st.tuples(
    st.sampled_from(["join", "again", "leave", "load", "place", "rate", "late"]), st.integers(0, 4), st.integers(1, 99)
)


@given(st.lists(events, max_size=40))
def test_what_is_read_is_what_each_engine_says_of_itself_whoever_has_come_and_gone(
    happened: list[tuple[str, int, int]],
) -> None:
    membership, epoch, former = Membership(100, 1000), 0, []
    for what, number, value in happened:
        known = membership.get(EngineId(f"e{number}"))
        if what == "join" or (what == "again" and known is not None):
            epoch += 1
            former += [] if known is None else [known]
            membership.join(info(number, epoch), 0.0)
        elif what == "late":
            for each in former:
                each.reported(Load(running=value), 1.0)
                each.rated(packed(Rates(base_ms=value)))
        elif known is None:
            continue
        elif what == "leave":
            former.append(known)
            membership.left(known.info.id)
        elif what == "load":
            known.reported(Load(running=value, prefill_tokens=7 * value), 1.0)
        elif what == "place":
            known.place(f"r{value}", Placed(2.0, value))
        else:
            known.rated(packed(Rates(token_ms=value)))
    roster = Roster.of(membership.all(), "m")
    loads, rates = membership.ledger.read(roster.entries)
    assert Loads.packed(loads).rows.tolist() == Loads.of(roster.engines).rows.tolist()
    assert RateColumns.packed(rates).rows.tolist() == RateColumns.of(roster.engines).rows.tolist()


def test_rows_are_kept_when_there_are_more_engines_than_before_and_given_away_when_one_has_gone() -> None:
    ledger = Ledger(1, 1)
    entries = [ledger.entry() for _ in range(3 * FIRST)]
    for value, entry in enumerate(entries):
        entry.write_load(np.float64(value).tobytes())
    assert sorted(ledger.read(np.array([entry.number for entry in entries]))[0].ravel()) == list(range(3 * FIRST))
    spare = [ledger.entry() for _ in range(FIRST)]
    spare[7].close()
    spare[7].close()
    assert ledger.entry().number == spare[7].number and ledger.entry().number not in {each.number for each in spare}
