import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.router.pairs import FIRST, MOST, Matrix, Pair, Sides, cheapest

prices = st.integers(0, 30).map(float)


def search(priced: Matrix, slack: Matrix, bound_ms: float = np.inf) -> tuple[Pair | None, int]:
    """The cheapest pair of a matrix by bounds below its rows and columns; and how many pairs were priced."""
    rows, columns = priced.shape
    looked_at = 0

    def price(destinations: np.ndarray, sources: np.ndarray) -> Matrix:
        nonlocal looked_at
        looked_at += len(destinations) * len(sources)
        return priced[np.ix_(destinations, sources - 100)]

    lowest = np.where(np.isinf(priced), 1e6, priced)
    sides = Sides(
        np.arange(rows), 100 + np.arange(columns), lowest.min(1) - slack[:, 0], lowest.min(0) - slack[0, :], bound_ms
    )
    return cheapest(sides, price), looked_at


@settings(deadline=None)
@given(st.data(), st.integers(1, MOST), st.integers(1, MOST))
def test_the_cheapest_pair_is_found_however_loose_the_bounds(data: st.DataObject, rows: int, columns: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    priced = rng.integers(0, data.draw(st.sampled_from([2, 30, 10_000])), (rows, columns)).astype(float)
    priced[rng.random((rows, columns)) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))] = np.inf
    slack = rng.random((rows, columns)) * data.draw(st.sampled_from([0, 5, 1000]))
    found, _ = search(priced, slack)
    if np.isinf(priced).all():
        assert found is None
    else:
        assert found is not None and found.ms == priced.min() == priced[found.destination, found.source - 100]


def test_of_many_engines_few_pairs_are_priced_if_the_bounds_are_tight() -> None:
    priced = np.add.outer(np.arange(256.0), np.arange(256.0))
    found, looked_at = search(priced, np.zeros((256, 256)))
    assert found == Pair(0, 100, 0.0) and looked_at == FIRST * FIRST


@pytest.mark.parametrize(("bound_ms", "useful"), [(7.0, False), (7.5, True)])
def test_a_pair_that_is_not_below_the_bound_is_of_no_use(bound_ms: float, useful: bool) -> None:
    found, _ = search(np.full((3, 3), 7.0), np.zeros((3, 3)), bound_ms)
    assert (found is not None) == useful
