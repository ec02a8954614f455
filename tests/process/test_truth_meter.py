"""The truth meter in a real router process: what clients see of it, and what becomes of an engine that lies."""

from typing import Any

import pytest

from vllm_llmd.router.learning import truth
from vllm_llmd.testing.fake_engine import Behaviour, FakeEngine
from vllm_llmd.testing.site import CHAT, COMPLETIONS, Site, chat, until

UNTIL_WRONG = 11
"""So many predictions in a row that are all wrong make an engine suspect."""


def completion(prompt: list[int], **more: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": prompt, **more}


async def from_the_engine(site: Site, engine: FakeEngine, path: str, body: dict[str, Any]) -> bytes:
    """What a client gets that asks the engine itself."""
    async with site.client.post(engine.info.http + path, json=body) as response:
        said: bytes = await response.read()
        return said


async def through_the_router(site: Site, path: str, body: dict[str, Any]) -> bytes:
    async with site.post(body, path) as response:
        assert response.status == 200
        said: bytes = await response.read()
        return said


async def predictions(site: Site, engine: FakeEngine) -> dict[str, Any]:
    [shown] = [each for each in await site.admin_engines() if each["id"] == engine.settings.id]
    found: dict[str, Any] = shown["predictions"]
    return found


async def errors(site: Site, engine: str, up_to: float, by: str = "tokens") -> float:
    """How many predictions were in excess by at most so many tokens."""
    return await site.metric(f'vllm_llmd_prediction_error_tokens_bucket{{by="{by}",engine="{engine}",le="{up_to}"}}')


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat("hello", stream=True)),
        (CHAT, chat("hello", stream=True, stream_options=None)),
        (CHAT, chat("hello", stream=True, stream_options={"include_usage": False})),
        (CHAT, chat("hello", stream=True, stream_options={"include_usage": True})),
        (CHAT, chat("hello")),
        (COMPLETIONS, completion(list(range(100)), stream=True)),
        (COMPLETIONS, completion(list(range(100)), n=2)),
    ],
)
async def test_a_client_gets_what_the_engine_would_give_it_without_the_meter(
    site: Site, path: str, body: dict[str, Any]
) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    await from_the_engine(site, engine, path, body)
    plain = await from_the_engine(site, engine, path, body)
    for _ in range(3):
        assert await through_the_router(site, path, body) == plain
    asked = [b'"include_usage": true' in received.raw for received in engine.requests[2:]]
    assert asked == [body.get("stream", False)] * 3


async def test_an_engine_that_knows_no_stream_options_is_not_asked_again(site: Site) -> None:
    engine = await site.engine("a")
    engine.behaviour = Behaviour.REFUSE_STREAM_OPTIONS
    await site.ready(engine)
    for _ in range(2):
        assert b"[DONE]" in await through_the_router(site, CHAT, chat("hello", stream=True))
    assert ["stream_options" in received.body for received in engine.requests] == [True, False, False]
    async with site.post(chat("hello", stream=True, stream_options={"include_usage": True})) as response:
        assert response.status == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_predicted_is_compared_with_what_was_cached(site: Site, stream: bool) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    tokens = list(range(160))
    await through_the_router(site, COMPLETIONS, completion(tokens, stream=stream))
    await site.index_equals_truth(engine)
    await through_the_router(site, COMPLETIONS, completion(tokens, stream=stream))
    assert await errors(site, "a", -1.0) == 0
    assert await errors(site, "a", 0.0) == 2
    assert await predictions(site, engine) == {"trust": "trusted", "kept": 1.0, "compared": 2, "untold": 0}


async def test_a_prompt_given_as_text_is_compared_too(site: Site) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    text = "a text that nobody has seen yet. " * 20
    await from_the_engine(site, engine, CHAT, chat(text))
    await through_the_router(site, CHAT, chat(text))  # found without having been predicted
    await until(lambda: site.metric("vllm_llmd_text_chunks"), lambda count: count > 0)
    await through_the_router(site, CHAT, chat(text))
    assert await errors(site, "a", -256.0, by="text") == 1
    assert await errors(site, "a", 0.0, by="text") == 2


async def test_an_engine_that_does_not_tell_is_neither_judged_nor_blamed(site: Site) -> None:
    engine = await site.engine("a")
    engine.details = False
    await site.ready(engine)
    for _ in range(3):
        await through_the_router(site, COMPLETIONS, completion(list(range(100))))
    assert await predictions(site, engine) == {"trust": "trusted", "kept": 1.0, "compared": 0, "untold": 3}
    assert await site.metric('vllm_llmd_answers_without_cached_tokens_total{engine="a"}') == 3


async def test_a_liar_is_resynced_then_scored_by_observation_and_loses_its_traffic_to_an_honest_engine(
    site: Site,
) -> None:
    liar, honest = await site.engine("liar"), await site.engine("honest")
    liar.honest_share = 0.0
    tokens = list(range(320))
    liar.publish(stored=liar.names(tokens))
    honest.publish(stored=honest.names(tokens[:160]))
    await site.ready(liar, honest)
    for engine in (liar, honest):
        await site.index_equals_truth(engine)
    asked = 'vllm_llmd_snapshots_asked_total{reason="predictions wrong"}'
    for _ in range(UNTIL_WRONG):
        await through_the_router(site, COMPLETIONS, completion(tokens))
    assert (len(liar.requests), len(honest.requests)) == (UNTIL_WRONG, 0)
    await until(lambda: site.metric(asked), lambda count: count == 1)
    await until(lambda: site.get_json("/admin/index/liar"), lambda index: index["exact"])
    assert (await predictions(site, liar))["trust"] == "suspect"
    for _ in range(truth.PROBATION):
        await through_the_router(site, COMPLETIONS, completion(tokens))
    assert await predictions(site, liar) == {
        "trust": "observed", "kept": 0.0, "compared": UNTIL_WRONG + truth.PROBATION, "untold": 0
    }  # fmt: skip
    assert await site.metric('vllm_llmd_index_trusted{engine="liar"}') == 0
    for _ in range(3):
        await through_the_router(site, COMPLETIONS, completion(tokens))
        await site.index_equals_truth(honest)
    assert (len(liar.requests), len(honest.requests)) == (UNTIL_WRONG + truth.PROBATION, 3)
    assert await errors(site, "liar", 64.0) == 0
    assert (await errors(site, "honest", -1.0), await errors(site, "honest", 0.0)) == (0, 3)
