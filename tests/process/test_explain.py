"""Decisions of a real router process: explained in headers, listed, looked up."""

import json
from typing import Any

import pytest

from vllm_llmd.testing.fake_engine import Behaviour
from vllm_llmd.testing.site import COMPLETIONS, Site, chat, until

EXPLAIN = {"x-llmd-explain": "1"}
PROMPT = {"model": "fake", "prompt": list(range(400))}


async def decision(site: Site, name: str) -> dict[str, Any]:
    """Once what has become of it is known."""
    found: dict[str, Any] = await until(lambda: site.get_json(f"/admin/decisions/{name}"), lambda it: it["outcome"])
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_explained_has_the_same_bytes(site: Site, stream: bool) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    asked = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    async with site.post(chat("hello", **asked), headers=EXPLAIN) as response:
        assert response.status == 200
        assert await response.read() == engine.answers[0]
        summary = json.loads(response.headers["x-llmd-explain"])
    assert summary["destination"] == "a" and summary["policy"] == "cost" and summary["candidates"] == 1
    assert summary["terms"]["prefill_ms"] > 0
    assert "x-llmd-explain" not in engine.requests[0].headers


async def test_nobody_is_told_who_has_not_asked(site: Site) -> None:
    await site.ready(await site.engine("a"))
    async with site.post(chat("hello"), headers={"x-llmd-explain": "0"}) as response:
        assert response.status == 200
        assert not [name for name in response.headers if name.lower().startswith("x-llmd")]


async def test_what_is_neither_yes_nor_no_is_an_error(site: Site) -> None:
    await site.ready(await site.engine("a"))
    async with site.post(chat("hello"), headers={"x-llmd-explain": "please"}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "x-llmd-explain"


async def test_the_whole_explanation_is_found_by_the_id_in_the_answer(site: Site) -> None:
    one, two = await site.engine("a"), await site.engine("b", models=("other",))
    await site.ready(one, two)
    async with site.post(PROMPT, COMPLETIONS, headers=EXPLAIN) as response:
        await response.read()
        name = response.headers["x-llmd-decision"]
    found = await decision(site, name)
    assert name == one.requests[0].headers["x-request-id"]
    assert (found["destination"], found["prompt_tokens"], found["matched_by"]) == ("a", 400, "tokens")
    [candidate] = found["candidates"]
    assert candidate["engine"] == "a" and candidate["role"] == "both" and candidate["decodes"]
    assert candidate["total_ms"] == pytest.approx(sum(candidate["prices"].values()), abs=0.01)
    assert candidate["total_ms"] == pytest.approx(found["predicted_ms"], abs=0.01)
    assert found["barred"] == [{"engine": "b", "why": "other model"}]
    assert found["outcome"]["status"] == 200 and found["outcome"]["first_byte_ms"] <= found["outcome"]["ttft_ms"]
    assert found["outcome"]["prompt_tokens"] == 400 and found["outcome"]["failure"] is None


async def test_every_decision_is_listed_newest_first(site: Site) -> None:
    await site.ready(await site.engine("a"), await site.engine("b"))
    for _ in range(5):
        async with site.post(PROMPT, COMPLETIONS) as response:
            assert response.status == 200 and await response.read()
    listed = await site.get_json("/admin/decisions")
    numbers = [int(each["request"].rpartition("-")[2]) for each in listed["decisions"]]
    assert numbers == [5, 4, 3, 2, 1] and listed["kept"] == 5
    assert not any(each["explained"] for each in listed["decisions"])
    assert len((await site.get_json("/admin/decisions?limit=2"))["decisions"]) == 2
    of_a = (await site.get_json("/admin/decisions?engine=a"))["decisions"]
    assert len(of_a) == len([each for each in listed["decisions"] if each["destination"] == "a"])


async def test_a_limit_that_is_no_number_and_an_unknown_decision_are_errors(site: Site) -> None:
    for path, status, code in (
        ("?limit=many", 400, "invalid_request"),
        ("?limit=-1", 400, "invalid_request"),
        ("/nothing", 404, "decision_not_found"),
    ):
        async with site.client.get(site.router.http + "/admin/decisions" + path) as response:
            assert response.status == status
            assert (await response.json())["error"]["code"] == code


async def test_a_retry_is_a_decision_of_its_own_and_says_who_was_tried(site: Site) -> None:
    one, two = await site.engine("a"), await site.engine("b")
    await site.ready(one, two)
    one.behaviour = Behaviour.FAIL
    for number in range(50):
        prompt = {"model": "fake", "prompt": list(range(1000 * number, 1000 * number + 400))}
        async with site.post(prompt, COMPLETIONS, headers=EXPLAIN) as response:
            assert response.status == 200 and await response.read()
            name = response.headers["x-llmd-decision"]
        if name.endswith(".2"):
            break
    second = await decision(site, name)
    first = await decision(site, name.removesuffix(".2"))
    assert first["destination"] == "a" and first["outcome"]["failure"] == "status 500"
    assert second["destination"] == "b" and second["outcome"]["failure"] is None
    assert second["barred"] == [{"engine": "a", "why": "tried before"}]


async def test_a_request_that_nobody_can_take_is_explained(site: Site) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    async with site.client.post(site.router.http + "/admin/engines/a/drain"):
        pass
    async with site.post(PROMPT, COMPLETIONS, headers=EXPLAIN) as response:
        assert response.status == 503
        assert json.loads(response.headers["x-llmd-explain"])["barred"] == {"draining": 1}
        found = await site.get_json("/admin/decisions/" + response.headers["x-llmd-decision"])
    assert found["destination"] is None and found["candidates"] == []


async def test_a_stream_that_breaks_and_goes_on_elsewhere_is_two_decisions(site: Site) -> None:
    one, two = await site.engine("a"), await site.engine("b")
    await site.ready(one, two)
    one.behaviour = two.behaviour = Behaviour.DIE_MIDWAY
    async with site.post({**PROMPT, "stream": True}, COMPLETIONS, headers=EXPLAIN) as response:
        await response.read()
        name = response.headers["x-llmd-decision"]
    assert (await decision(site, name))["outcome"]["failure"].startswith("midway: ")


@pytest.mark.parametrize("site", [("--decisions", "2")], indirect=True)
async def test_no_more_are_kept_than_were_asked_for(site: Site) -> None:
    await site.ready(await site.engine("a"))
    for _ in range(4):
        async with site.post(PROMPT, COMPLETIONS) as response:
            assert response.status == 200
    assert len((await site.get_json("/admin/decisions"))["decisions"]) == 2
