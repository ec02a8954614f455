"""What the destination may conclude from answered renewals."""

from vllm_llmd.kv_connector.lease import LeaseView


def test_nothing_is_covered_before_a_renewal_is_answered() -> None:
    lease = LeaseView(1000)
    lease.renew(0)
    assert not lease.covers(0)


def test_an_answer_covers_from_when_its_renewal_was_sent_less_the_drift() -> None:
    lease = LeaseView(1000)
    n = lease.renew(100)
    lease.answered(n, held=True)
    assert lease.covers(100 + 900)
    assert not lease.covers(100 + 901)


def test_an_answer_without_blocks_covers_nothing() -> None:
    lease = LeaseView(1000)
    lease.answered(lease.renew(0), held=False)
    assert not lease.covers(0)


def test_a_late_answer_to_an_old_renewal_does_not_shorten_the_lease() -> None:
    lease = LeaseView(1000)
    first, second = lease.renew(0), lease.renew(500)
    lease.answered(second, held=True)
    lease.answered(first, held=True)
    assert lease.covers(1400)


def test_an_answer_to_a_renewal_never_sent_changes_nothing() -> None:
    lease = LeaseView(1000)
    lease.answered(7, held=True)
    assert not lease.covers(0)


def test_renewals_are_due_four_times_a_lease() -> None:
    lease = LeaseView(1000)
    assert lease.renewal_due(0)
    lease.renew(0)
    assert not lease.renewal_due(249)
    assert lease.renewal_due(250)
