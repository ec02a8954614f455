"""The router in front of real engines: disaggregation, the index, and what clients may not say."""

import json
from argparse import Namespace

from vllm_llmd.kernels.hash_chain import ROOT, block_name, chain_names, salt_of
from vllm_llmd.router.index import verify

BLOCK = 32


def body(prompt: list[int], **more: object) -> dict[str, object]:
    return {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True, **more}


def answer(response: dict) -> list[int]:
    return response["choices"][0]["token_ids"]


def test_a_long_prompt_is_prefilled_on_one_engine_and_decoded_on_another(lab) -> None:
    prompt, gained = lab.prompt(1000), lab.gained(lab.decode)
    assert answer(lab.router.post("/v1/completions", body(prompt))) == lab.decode.alone(prompt, max_tokens=8)
    assert gained("orders") == 1
    assert gained("kv_blocks_loaded") == 32


def test_a_short_prompt_stays_where_it_is_decoded(lab) -> None:
    prompt, gained = lab.prompt(40), lab.gained(lab.decode)
    assert answer(lab.router.post("/v1/completions", body(prompt))) == lab.decode.alone(prompt, max_tokens=8)
    assert gained("orders") == 0


def test_a_chat_streams_through_the_router(lab) -> None:
    chat = {
        "model": "m",
        "messages": [{"role": "user", "content": "tell me " * 400}],
        "max_tokens": 8,
        "temperature": 0,
    }
    gained = lab.gained(lab.decode)
    direct = lab.decode.post("/v1/chat/completions", {**chat, "cache_salt": "direct"})
    with lab.router.open("/v1/chat/completions", {**chat, "stream": True}) as response:
        events = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(pieces) == (direct["choices"][0]["message"]["content"] or "")
    assert gained("orders") == 1


def test_the_index_holds_the_blocks_of_both_engines(lab) -> None:
    prompt = lab.prompt(1000)
    names = set(chain_names(prompt, BLOCK))
    lab.router.post("/v1/completions", body(prompt))
    lab.until(lambda: names <= lab.index("decode-0"), "decode-0's blocks are not indexed")
    lab.until(
        lambda: any(set(chain_names(prompt[:999], BLOCK)) <= lab.index(s) for s in ("prefill-0", "slow-0")),
        "the source's blocks are not indexed",
    )


def test_a_salted_prompt_has_the_names_that_the_router_expects(lab) -> None:
    prompt = lab.prompt(200)
    lab.router.post("/v1/completions", body(prompt, cache_salt="tenant"))
    names = [block_name(ROOT, prompt[:BLOCK], salt_of(["tenant"]))]
    for start in range(BLOCK, len(prompt) - BLOCK + 1, BLOCK):
        names.append(block_name(names[-1], prompt[start : start + BLOCK]))
    lab.until(lambda: set(names) <= lab.index("decode-0"), "the salted blocks are named otherwise")


def test_a_prompt_for_an_adapter_goes_through_the_router_and_has_the_names_that_it_expects(lab) -> None:
    prompt = lab.prompt(200)
    adapted = answer(lab.router.post("/v1/completions", body(prompt, model="law")))
    assert adapted == lab.decode.alone(prompt, model="law", max_tokens=8)
    names = set(chain_names(prompt, BLOCK, salt_of(["law"])))
    lab.until(lambda: names <= lab.index("decode-0"), "the adapter's blocks are named otherwise")
    assert not set(chain_names(prompt, BLOCK)) & lab.index("decode-0")
    assert "law" in {model["id"] for model in json.loads(lab.router.get("/v1/models"))["data"]}


def test_the_index_is_exact_and_the_command_line_proves_it(lab) -> None:
    for length in (100, 900):
        lab.router.post("/v1/completions", body(lab.prompt(length)))
    lab.until(lab.at_rest, "the requests go on")
    said: list[str] = []
    assert verify.run(Namespace(router=lab.fleet.router_http, engine=None, api_key=None), said.append) == 0
    assert len(said) == len(lab.engines())


def test_a_restarted_router_soon_holds_what_it_held(lab) -> None:
    prompts = [lab.prompt(200) for _ in range(3)]
    for prompt in prompts:
        lab.router.post("/v1/completions", body(prompt))
    expected = {name for prompt in prompts for name in chain_names(prompt, BLOCK)}
    lab.until(lambda: expected <= lab.index("decode-0"), "the index is not up to date")
    before = {engine_id: lab.index(engine_id) for engine_id in lab.all_blocks}
    lab.fleet.restart_router()
    lab.until(lambda: set(lab.all_blocks) <= set(lab.engines()), "the engines have not come back")
    lab.until(lambda: {e: lab.index(e) for e in lab.all_blocks} == before, "the index differs from what it was")
    assert answer(lab.router.post("/v1/completions", body(prompts[0]))) == lab.decode.alone(prompts[0], max_tokens=8)


def test_a_client_can_name_neither_source_nor_order(lab) -> None:
    prompt, gained = lab.prompt(1000), lab.gained(lab.decode)
    served = lab.engines()["slow-0"]["load"]["orders_served"]
    forged = {"llmd": {"source": "nobody", "request": "x"}, "llmd_order": {"order": "x"}}
    headers = {"x-llmd-source": "slow-0", "x-forwarded-for": "10.0.0.1", "X-Request-Id": "mine"}
    sent = body(prompt, kv_transfer_params=forged, vllm_xargs={"note": "kept"})
    assert answer(lab.router.post("/v1/completions", sent, headers)) == lab.decode.alone(prompt, max_tokens=8)
    assert gained("fallbacks unknown engine") == 0
    assert lab.engines()["slow-0"]["load"]["orders_served"] - served <= 1
    assert gained("orders") == 1


def test_hanging_up_on_the_router_frees_both_engines(lab) -> None:
    long = body(lab.prompt(5000), stream=True, max_tokens=3000, ignore_eos=True)
    connection = lab.router.send("/v1/completions", long)
    lab.until(lambda: lab.engines()["decode-0"]["load"]["running"] == 1, "the request does not run")
    connection.close()
    lab.until(lab.at_rest, "the request goes on")
