import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.errors import ConfigError
from vllm_llmd.router.request import Facts, RequestError
from vllm_llmd.router.slo import (
    LONGEST_TENANT,
    MOST_MS,
    MOST_URGENT,
    NOTHING,
    Wish,
    begun,
    read_objectives,
    read_weights,
    read_wish,
    still_due,
    with_wish,
)

NAMES = (
    "x-llmd-slo-ttft-ms",
    "x-slo-tpot-ms",
    "x-llmd-priority",
    "x-llm-d-inference-objective",
    "x-llmd-tenant",
    "x-llmd-ttl-ms",
    "x-llm-d-inference-ttl",
)


def wish(**headers: str) -> Wish:
    return read_wish([(name.replace("_", "-"), value) for name, value in headers.items()], {"urgent": 7, "batch": -1})


def test_who_asks_for_nothing_gets_nothing() -> None:
    assert wish(accept="*/*", x_llmd_explain="1") is NOTHING


def test_every_header_is_read_whatever_its_case() -> None:
    read = wish(
        X_LLMD_SLO_TTFT_MS="250",
        x_llmd_slo_tpot_ms=" 12.5 ",
        X_Llmd_Priority="-3",
        x_llmd_tenant="team a",
        x_llmd_ttl_ms="9000",
    )
    assert read == Wish(ttft_ms=250, tpot_ms=12.5, priority=-3, tenant="team a", ttl_ms=9000)


@pytest.mark.parametrize("prefix", ["x_llm_d_", "x_"])
def test_objectives_are_read_under_both_of_llm_ds_names(prefix: str) -> None:
    read = wish(**{f"{prefix}slo_ttft_ms": "250", f"{prefix}slo_tpot_ms": "20"})
    assert read == Wish(ttft_ms=250, tpot_ms=20)


@pytest.mark.parametrize("prefix", ["x_llm_d_", "x_gateway_"])
def test_tenant_and_priority_are_read_under_both_of_llm_ds_names(prefix: str) -> None:
    read = wish(**{f"{prefix}inference_fairness_id": "t", f"{prefix}inference_objective": "urgent"})
    assert read == Wish(priority=7, tenant="t")


def test_an_objective_that_nobody_has_set_counts_as_none() -> None:
    assert wish(x_llm_d_inference_objective="unheard of").priority == 0


def test_our_own_name_counts_before_llm_ds() -> None:
    read = wish(
        x_llm_d_slo_ttft_ms="1", x_llmd_slo_ttft_ms="2", x_llm_d_inference_objective="urgent", x_llmd_priority="1"
    )
    assert (read.ttft_ms, read.priority) == (2, 1)


@pytest.mark.parametrize(
    ("text", "ms"), [("1500ms", 1500), ("2s", 2000), ("1m30s", 90_000), ("0.5h", 1_800_000), ("1s500000us", 1500)]
)
def test_llm_ds_time_to_live_is_a_duration(text: str, ms: float) -> None:
    assert wish(x_llm_d_inference_ttl=text).ttl_ms == ms


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-llmd-slo-ttft-ms", ""),
        ("x-llmd-slo-ttft-ms", "0"),
        ("x-llmd-slo-ttft-ms", "-5"),
        ("x-llmd-slo-ttft-ms", "nan"),
        ("x-llmd-slo-ttft-ms", "inf"),
        ("x-llmd-slo-ttft-ms", "1e3"),
        ("x-llmd-slo-ttft-ms", "١٢"),
        ("x-llmd-slo-tpot-ms", "9" * 400),
        ("x-llm-d-slo-tpot-ms", str(MOST_MS + 1)),
        ("x-slo-tpot-ms", "fast"),
        ("x-llmd-priority", "high"),
        ("x-llmd-priority", "1.5"),
        ("x-llmd-priority", str(MOST_URGENT + 1)),
        ("x-llmd-priority", "-" + "9" * 100),
        ("x-llmd-tenant", "x" * (LONGEST_TENANT + 1)),
        ("x-gateway-inference-fairness-id", "a\x00b"),
        ("x-llmd-ttl-ms", "5s"),
        ("x-llm-d-inference-ttl", "5"),
        ("x-llm-d-inference-ttl", "-1s"),
        ("x-llm-d-inference-ttl", "soon"),
        ("x-llm-d-inference-ttl", "0s"),
        ("x-llm-d-inference-ttl", "999999999h"),
    ],
)
def test_a_malformed_value_is_refused_by_the_name_of_its_header(name: str, value: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be ") as refusal:
        read_wish([(name, value)], {})
    assert refusal.value.param == name and len(str(refusal.value)) < 200


def test_a_header_that_is_there_twice_must_agree_with_itself() -> None:
    assert read_wish([("x-llmd-priority", "1"), ("X-LLMD-Priority", "1")], {}).priority == 1
    with pytest.raises(RequestError, match="send it once"):
        read_wish([("x-llmd-priority", "1"), ("X-LLMD-Priority", "2")], {})


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.text(max_size=12) | st.floats().map(str) | st.integers().map(str)))
)
def test_whatever_comes_is_refused_or_within_bounds(headers: list[tuple[str, str]]) -> None:
    try:
        read = read_wish(headers, {})
    except RequestError:
        return
    assert abs(read.priority) <= MOST_URGENT and len(read.tenant) <= LONGEST_TENANT
    for ms in (read.ttft_ms, read.tpot_ms, read.ttl_ms):
        assert ms is None or 1 <= ms <= MOST_MS


def test_objectives_and_weights_are_read_by_name() -> None:
    assert read_objectives(["batch=-10", "a=b=3"]) == {"batch": -10, "a=b": 3}
    assert read_weights(["gold=2.5", "free=0.1"]) == {"gold": 2.5, "free": 0.1}


@pytest.mark.parametrize("text", ["", "a", "a=", "=1", "a=x", "a=1001", "a=1.5"])
def test_an_objective_without_a_priority_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^objective must look like NAME=PRIORITY"):
        read_objectives([text])


@pytest.mark.parametrize("text", ["", "a", "a=", "=1", "a=x", "a=0", "a=-1", "a=nan", "a=1001"])
def test_a_weight_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^tenant_weight must look like TENANT=WEIGHT"):
        read_weights([text])


def test_the_first_token_is_due_sooner_after_a_wait_and_not_any_more_once_it_has_come() -> None:
    facts = with_wish(Facts("m", None, b"", b"", 1, None), Wish(ttft_ms=250, tpot_ms=20))
    assert (still_due(facts, 100).ttft_ms, still_due(facts, 300).ttft_ms, begun(facts).ttft_ms) == (150, -50, None)
    assert still_due(facts, 100).tpot_ms == begun(facts).tpot_ms == 20
    unhurried = Facts("m", None, b"", b"", 1, None)
    assert still_due(unhurried, 100) is unhurried is begun(unhurried)
