"""Engines whose caches are cut up differently, and models with other caches than full attention's."""

from concurrent.futures import ThreadPoolExecutor

import pytest

LENGTHS = (1, 5, 16, 32, 33, 64, 65, 100, 257, 600, 1500)
BOTH_WAYS = [("one", "two"), ("two", "one"), ("two", "pair"), ("pair", "two"), ("one", "pair"), ("pair", "one")]


def tokens_are_the_same(lab, source: str, destination: str) -> None:
    """For prompts of every length, ordered and computed alone."""
    client = lab.engine(destination)
    for tokens in LENGTHS:
        prompt = lab.prompt(tokens)
        assert client.complete(prompt, source=source) == client.alone(prompt), f"{tokens} tokens"


@pytest.mark.parametrize(("source", "destination"), BOTH_WAYS)
def test_other_tensor_parallel_and_block_sizes_give_the_same_tokens(cuts, source: str, destination: str) -> None:
    gained = cuts.gained(cuts.engine(destination))
    tokens_are_the_same(cuts, source, destination)
    assert gained("orders") == len(LENGTHS) - 1
    assert gained("orders_failed") == 0


def test_every_byte_crosses_once_however_many_ranks_there_are(cuts) -> None:
    prompt, moved = cuts.prompt(640), {}
    for source, destination in (("one", "pair"), ("pair", "one")):
        gained = cuts.gained(cuts.engine(destination))
        cuts.engine(destination).complete(prompt, source=source, cache_salt=f"{source} {destination}")
        moved[source] = gained("kv_bytes_read")
    assert moved["one"] == moved["pair"] > 0


def test_engines_with_little_room_that_order_from_each_other_do_not_lock_up(cuts) -> None:
    prompts = [cuts.prompt(900) for _ in range(12)]
    one, pair = cuts.engine("one"), cuts.engine("pair")
    with ThreadPoolExecutor(12) as pool:
        there = pool.map(lambda prompt: one.complete(prompt, source="pair"), prompts[:6])
        back = pool.map(lambda prompt: pair.complete(prompt, source="one"), prompts[6:])
        answers = [*there, *back]
    assert answers == [one.alone(prompt) for prompt in prompts]


@pytest.mark.parametrize("tokens", LENGTHS)
def test_sliding_windows_give_the_same_tokens(windows, tokens: int) -> None:
    prompt = windows.prompt(tokens)
    assert windows.decode.complete(prompt, source="prefill-0") == windows.decode.alone(prompt)


def test_of_a_sliding_window_only_what_is_seen_crosses(windows) -> None:
    prompt, gained = windows.prompt(1500), windows.gained(windows.decode)
    windows.decode.complete(prompt, source="prefill-0")
    full, window = -(-1499 // 32), -(-96 // 32) + 1
    assert full < gained("kv_blocks_loaded") <= full + window


def test_layers_are_announced_while_the_last_chunk_is_computed(windows) -> None:
    prompt, gained = windows.prompt(256), windows.gained(windows.decode)
    assert windows.decode.complete(prompt, source="prefill-0") == windows.decode.alone(prompt)
    assert gained("kv_ranges_read") > 1, "one chunk came in one piece"


def test_a_source_of_sliding_windows_that_refuses_costs_nothing_but_time(windows) -> None:
    """With several cache groups vLLM hears of the request, not of blocks, and computes all of it."""
    prompt, gained = windows.prompt(600), windows.gained(windows.decode)
    hint = {"source": "prefill-0", "deadline_ms": 1}
    assert windows.decode.answer(prompt, hint).tokens == windows.decode.alone(prompt)
    assert gained("orders_failed") == 1


def test_a_cached_prefix_of_sliding_windows_is_added_to(windows) -> None:
    prompt = windows.prompt(1000)
    windows.decode.complete(prompt[:500])
    gained = windows.gained(windows.decode)
    assert windows.decode.complete(prompt, source="prefill-0") == windows.decode.alone(prompt)
    assert gained("orders_failed") == 0


@pytest.mark.parametrize(("source", "destination"), [("prefill-0", "decode-0"), ("decode-0", "prefill-0")])
def test_latent_attention_gives_the_same_tokens(latent, source: str, destination: str) -> None:
    gained = latent.gained(latent.engine(destination))
    tokens_are_the_same(latent, source, destination)
    assert gained("orders_failed") == 0


def test_a_latent_cache_is_read_once_by_each_rank(latent) -> None:
    prompt, moved = latent.prompt(640), {}
    for source, destination in (("prefill-0", "decode-0"), ("decode-0", "prefill-0")):
        gained = latent.gained(latent.engine(destination))
        latent.engine(destination).complete(prompt, source=source)
        moved[destination] = gained("kv_bytes_read")
    assert moved["decode-0"] == 2 * moved["prefill-0"] > 0
