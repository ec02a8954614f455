"""Which engines of a real router a request may go to, by what it asks for and how long it is."""

import pytest

from vllm_llmd.testing.site import COMPLETIONS, Site, chat

LABELS = "x-llmd-engine-labels"


async def zones(site: Site) -> None:
    engines = [await site.engine(zone, labels=(("zone", zone), ("gpu", "h100"))) for zone in "abc"]
    await site.ready(*engines)


@pytest.mark.parametrize(("selector", "takers"), [("zone=b", {"b"}), ("gpu=h100,zone!=a, zone notin (c)", {"b"})])
async def test_a_request_goes_to_an_engine_with_the_labels_that_it_asks_for(
    site: Site, selector: str, takers: set[str]
) -> None:
    await zones(site)
    for number in range(6):
        async with site.post(chat(f"hello {number}"), headers={LABELS: selector}) as response:
            assert response.headers["X-Fake-Engine"] in takers
    assert not [each for engine in site.engines for each in engine.requests if LABELS in each.headers]
    assert {engine["id"]: engine["labels"]["zone"] for engine in await site.admin_engines()} == {
        zone: zone for zone in "abc"
    }


async def test_labels_that_no_engine_has_are_503_and_say_so(site: Site) -> None:
    await zones(site)
    async with site.post(chat("hello"), headers={LABELS: "zone=d"}) as response:
        assert response.status == 503 and response.headers["x-llmd-reason"] == "no-engine-matches"
        error = (await response.json())["error"]
        assert error["code"] == "no_engine_matches" and "labels" in error["message"]


@pytest.mark.parametrize("selector", ["zone=", "zone=a,", "zone>a", "zone in a", "a" * 5000])
async def test_a_malformed_selector_is_400_and_names_its_header(site: Site, selector: str) -> None:
    await zones(site)
    async with site.post(chat("hello"), headers={LABELS: selector}) as response:
        if selector == "zone=":  # a label that is empty, which none of these is
            assert response.status == 503
            return
        assert response.status == 400
        assert (await response.json())["error"]["param"] == LABELS


async def test_a_long_prompt_goes_to_an_engine_that_is_long_enough_or_is_refused(site: Site) -> None:
    short, long = await site.engine("short", max_model_len=100), await site.engine("long", max_model_len=1000)
    await site.ready(short, long)
    for number in range(6):
        async with site.post({"model": "fake", "prompt": [number] * 500}, COMPLETIONS) as response:
            assert response.headers["X-Fake-Engine"] == "long"
    async with site.post({"model": "fake", "prompt": [7] * 1001}, COMPLETIONS) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
        assert "maximum context length is 1000 tokens" in error["message"]
    async with site.post({"model": "fake", "prompt": "word " * 5000}, COMPLETIONS) as response:
        assert response.status == 200, "a text is only estimated: let the engine say"
