"""Labels of engines and selectors: what Kubernetes' users write means here what it means there."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd import labels
from vllm_llmd.router.members.selector import LONGEST, SelectorError, read_selector
from vllm_llmd.router.request import RequestError
from vllm_llmd.router.slo import LABELS, read_wish

ENGINE = {"gpu": "h100", "zone": "a", "example.com/tier": "gold", "spot": ""}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("gpu=h100", True),
        ("gpu==h100", True),
        ("gpu=a100", False),
        ("rack=h100", False),
        ("zone!=b", True),
        ("zone!=a", False),
        ("rack!=b", True),
        ("zone in (a, b)", True),
        ("zone in (b,c)", False),
        ("rack in (b)", False),
        ("zone notin (b,c)", True),
        ("zone notin (a)", False),
        ("rack notin (a)", True),
        ("spot", True),
        ("spot=", True),
        ("rack", False),
        ("!rack", True),
        ("! spot", False),
        ("example.com/tier=gold", True),
        (" gpu = h100 , zone != b ", True),
        ("gpu=h100,zone=b", False),
        ("in in (in)", False),
    ],
)
def test_a_selector_means_what_it_means_to_kubernetes(text: str, matches: bool) -> None:
    selector = read_selector(text)
    assert selector is not None and selector.matches(ENGINE) is matches


def test_an_empty_selector_is_none() -> None:
    assert read_selector("  ") is None


def test_the_order_of_rules_does_not_make_another_selector() -> None:
    assert read_selector("a=b,c!=d, e in (f,g)") == read_selector("e in (g,f),c!=d,a==b")


@pytest.mark.parametrize(
    "text",
    ["=", "a=b,", ",a", "a,,b", "a=b c", "a in b", "!a=b", "a=b!=c", "a in (b", "ü=1", "a=" + "b" * 64, "a/b/c", "-a"],
)
def test_what_is_no_selector_is_refused_with_examples(text: str) -> None:
    with pytest.raises(SelectorError, match=re.escape("gpu=h100, zone!=b")):
        read_selector(text)


def test_a_selector_without_end_is_refused() -> None:
    with pytest.raises(SelectorError, match=str(LONGEST)):
        read_selector("a" * (LONGEST + 1))


@given(st.text())
def test_any_text_is_a_selector_or_an_error(text: str) -> None:
    try:
        selector = read_selector(text)
    except SelectorError:
        return
    assert selector is None or selector.matches(ENGINE) in (True, False)


@given(st.text(alphabet="ab=!,() in\t", max_size=30))
def test_whatever_looks_like_a_selector_is_one_or_an_error(text: str) -> None:
    try:
        read_selector(text)
    except SelectorError:
        return


def test_the_header_is_read_and_a_mistake_named_with_it() -> None:
    assert read_wish([("X-Llmd-Engine-Labels", "gpu=h100")], {}).selector == read_selector("gpu=h100")
    with pytest.raises(RequestError, match=LABELS) as raised:
        read_wish([(LABELS, "gpu="), (LABELS, "zone=b")], {})
    assert raised.value.param == LABELS
    with pytest.raises(RequestError, match=LABELS):
        read_wish([(LABELS, "gpu>1")], {})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"": "a"}, "keys"),
        ({"a b": "c"}, "keys"),
        ({"k" * 64: "c"}, "keys"),
        ({"a": "b c"}, "values"),
        ({"a": "-"}, "values"),
        ({"a": "v" * 64}, "values"),
        ({str(number): "" for number in range(labels.MOST + 1)}, "at most"),
    ],
)
def test_labels_that_no_selector_could_name_are_refused(wrong: dict[str, str], named: str) -> None:
    objection = labels.objection(wrong)
    assert objection is not None and named in objection
    assert labels.objection(ENGINE) is None
