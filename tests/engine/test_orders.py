"""What travels with an order, and orders for parts of a prompt: from one source or several."""

import secrets
from concurrent.futures import ThreadPoolExecutor

BLOCK = 32


def test_an_adapter_travels_by_its_name(lab) -> None:
    prompt, gained = lab.prompt(300), lab.gained(lab.decode)
    answer = lab.decode.complete(prompt, source="prefill-0", model="law")
    assert answer == lab.decode.alone(prompt, model="law")
    assert answer != lab.decode.alone(prompt), "the adapter changes nothing"
    assert gained("orders") == 1
    assert gained("orders_failed") == 0


def test_an_adapter_of_the_same_name_and_other_weights_is_refused(lab) -> None:
    prompt, gained, refused = lab.prompt(300), lab.gained(lab.decode), lab.gained(lab.slow)
    assert lab.decode.complete(prompt, source="slow-0", model="law") == lab.decode.alone(prompt, model="law")
    assert gained("fallbacks refused") == 1
    assert refused("orders_refused adapter differs") == 1


def test_a_priority_travels(lab) -> None:
    prompt, gained = lab.prompt(300), lab.gained(lab.decode)
    assert lab.decode.complete(prompt, source="prefill-0", priority=3) == lab.decode.alone(prompt)
    assert (gained("orders"), gained("orders_failed")) == (1, 0)


def test_an_order_is_given_up_at_its_deadline_and_what_has_arrived_is_kept(lab) -> None:
    prompt, gained = lab.prompt(4000), lab.gained(lab.decode)
    answer = lab.decode.answer(prompt, {"source": "slow-0", "deadline_ms": 700}).tokens
    assert answer == lab.decode.alone(prompt)
    assert gained("fallbacks deadline passed") == 1
    assert gained("kv_blocks_salvaged") > 0
    assert gained("kv_blocks_missing") > 0


def test_the_spans_of_order_and_source_join_the_requests_trace(lab, collector) -> None:
    trace, prompt = secrets.token_hex(16), lab.prompt(700)
    parent = f"00-{trace}-{secrets.token_hex(8)}-01"
    lab.decode.answer(prompt, {"source": "prefill-0"}, headers={"traceparent": parent})

    def named(name: str) -> list:
        return [span for span in collector.of_trace(trace) if span.name == name]

    lab.until(lambda: named("llmd.order") and len(named("llm_request")) == 2, "the spans have not come")
    (order,) = named("llmd.order")
    facts = {attribute.key: attribute.value for attribute in order.attributes}
    assert facts["llmd.source"].string_value == "prefill-0"
    assert facts["llmd.end_token"].int_value == 699
    assert [event.name for event in order.events].count("range read") == 3
    assert order.span_id in {span.parent_span_id for span in named("llm_request")}, "the source's is below the order's"


def test_a_prefix_is_fetched_and_the_rest_computed_here(lab) -> None:
    prompt = lab.prompt(1000)
    lab.prefill.complete(prompt[:700])
    gained, served = lab.gained(lab.decode), lab.gained(lab.prefill)
    hint = {"sources": [{"engine": "prefill-0", "until": 650}]}
    assert lab.decode.answer(prompt, hint).tokens == lab.decode.alone(prompt)
    assert gained("kv_blocks_loaded") == 650 // BLOCK
    assert gained("orders_failed") == 0
    assert served("orders") == 0


def test_two_sources_supply_one_prompt(lab) -> None:
    prompt, gained = lab.prompt(1000), lab.gained(lab.decode)
    served = {name: lab.engines()[name]["load"]["orders_served"] for name in ("prefill-0", "slow-0")}
    lab.slow.complete(prompt)
    hint = {"sources": [{"engine": "prefill-0", "until": 512}, {"engine": "slow-0"}]}
    assert lab.decode.answer(prompt, hint).tokens == lab.decode.alone(prompt)
    lab.until(lambda: gained("orders") == 1, "the delivery has not ended")
    assert gained("kv_blocks_loaded") == -(-999 // BLOCK)
    for name, before in served.items():
        lab.until(lambda n=name, b=before: lab.engines()[n]["load"]["orders_served"] == b + 1, f"{name} served nothing")


def test_a_prefix_that_is_on_its_way_is_not_ordered_twice(lab) -> None:
    shared = lab.prompt(3000)
    first, second = shared + lab.prompt(40), shared + lab.prompt(50)
    served, gained = lab.engines()["slow-0"]["load"]["orders_served"], lab.gained(lab.decode)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(lab.decode.answer, first, {"source": "slow-0"})
        lab.until(lambda: gained("kv_bytes_read") > 0, "nothing arrives")
        other = pool.submit(lab.decode.answer, second, {})
        assert one.result().tokens == lab.decode.alone(first)
        assert other.result().tokens == lab.decode.alone(second)
    assert other.result().cached == 3000 // BLOCK * BLOCK, "the second used what the first had ordered"
    assert lab.engines()["slow-0"]["load"]["orders_served"] == served + 1
