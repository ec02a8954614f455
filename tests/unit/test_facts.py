"""What the connector makes of vLLM's configuration: who may join, whose blocks fit, and what to warn of."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_llmd.errors import ConfigError
from vllm_llmd.settings import EngineSettings
from vllm_llmd.wire import Geometry, GroupShape

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch deprecates as vLLM imports it is not ours to mend
    pytest.importorskip("vllm")
    from vllm_llmd.kv_connector import vllm_facts


class FullAttentionSpec(SimpleNamespace):
    """Named as vLLM's, since the name is what is looked at."""


class SlidingWindowSpec(SimpleNamespace):
    """Likewise."""


class MLAAttentionSpec(SimpleNamespace):
    """Likewise."""


class MambaSpec(SimpleNamespace):
    """Likewise."""


class UniformTypeKVCacheSpecs(SimpleNamespace):
    """Likewise."""


def spec(**changes: Any) -> FullAttentionSpec:
    facts = {"block_size": 32, "dtype": "f32", "num_kv_heads": 2, "head_size": 32, "page_size_bytes": 4096}
    return FullAttentionSpec(**{**facts, **changes})


def cache(*specs: Any) -> Any:
    groups = [
        SimpleNamespace(kv_cache_spec=each, layer_names=[f"layers.{n}.attn", f"layers.{n + 8}.attn"])
        for n, each in enumerate(specs or (spec(),), start=2)
    ]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=64, kv_cache_layout="NHD")


def config(
    model: str = "m",
    policy: str = "recompute",
    scheduling: str = "priority",
    role: str = "kv_both",
    caching: bool = True,
    kv_heads: int = 2,
    device: str = "cpu",
    scales: bool = False,
    **sizes: int,
) -> Any:
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, **sizes}
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(engine_id="e", kv_role=role, kv_load_failure_policy=policy),
        model_config=SimpleNamespace(
            model=model,
            revision=None,
            quantization=None,
            dtype="f32",
            served_model_name=["m"],
            max_model_len=99,
            get_total_num_kv_heads=lambda: kv_heads,
        ),
        parallel_config=SimpleNamespace(**parallel),
        device_config=SimpleNamespace(device_type=device),
        cache_config=SimpleNamespace(enable_prefix_caching=caching, calculate_kv_scales=scales),
        scheduler_config=SimpleNamespace(policy=scheduling, max_num_seqs=64),
    )


def fingerprint(settings: EngineSettings | None = None, kv_cache: Any = None, **changes: Any) -> str:
    facts = vllm_facts.read_facts(config(**changes), kv_cache or cache(), settings or EngineSettings())
    return facts.fingerprint


def test_equal_engines_have_equal_fingerprints() -> None:
    assert fingerprint() == fingerprint(role="kv_consumer")


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "other"},
        {"device": "cuda"},
        {"kv_cache": cache(spec(dtype="bf16"))},
        {"kv_cache": cache(spec(head_size=64))},
        {"kv_cache": cache(spec(), spec())},
        {"kv_cache": cache(SlidingWindowSpec(**vars(spec()), sliding_window=64))},
        {"kv_heads": 4},
    ],
)
def test_engines_whose_caches_hold_other_values_have_other_fingerprints(changed: dict[str, Any]) -> None:
    assert fingerprint(**changed) != fingerprint()


@pytest.mark.parametrize("changed", [{"tensor_parallel_size": 2}, {"kv_cache": cache(spec(block_size=64))}])
def test_engines_that_cut_the_same_values_up_otherwise_have_the_same_fingerprint(changed: dict[str, Any]) -> None:
    assert fingerprint(**changed) == fingerprint()


def geometry(kv_cache: Any, **changes: Any) -> Geometry:
    return vllm_facts.read_facts(config(**changes), kv_cache, EngineSettings()).geometry


def test_the_geometry_tells_how_the_cache_is_cut_up() -> None:
    window = SlidingWindowSpec(**vars(spec(block_size=16)), sliding_window=100)
    found = geometry(cache(spec(), window), tensor_parallel_size=2, kv_heads=8)
    assert (found.tp, found.kv_heads) == (2, 8)
    assert found.groups == [GroupShape(32, 2, 0), GroupShape(16, 2, 100)]


def test_a_latent_cache_is_held_by_every_rank() -> None:
    assert geometry(cache(MLAAttentionSpec(**vars(spec()))), tensor_parallel_size=4).kv_heads == 0


def test_on_gpus_a_block_is_made_of_cells_unless_it_is_packed() -> None:
    assert geometry(cache(), device="cuda").interior == "cuda cells"
    packed = spec(kv_quant_mode=SimpleNamespace(name="INT4_PER_TOKEN_HEAD"))
    assert geometry(cache(packed), device="cuda").interior == "opaque cuda"


def test_layers_stand_in_the_models_order_whatever_group_they_are_of() -> None:
    facts = vllm_facts.read_facts(config(), cache(spec(), spec()), EngineSettings())
    assert [(layer.name, layer.group) for layer in facts.layers] == [
        ("layers.2.attn", 0), ("layers.3.attn", 1), ("layers.10.attn", 0), ("layers.11.attn", 1)
    ]  # fmt: skip
    assert facts.layer_masks == (0b0101, 0b1010)


def test_blocks_are_named_by_the_group_that_keeps_all_of_the_past() -> None:
    window = SlidingWindowSpec(**vars(spec(block_size=16)), sliding_window=100)
    facts = vllm_facts.read_facts(config(), cache(window, spec()), EngineSettings())
    assert (facts.naming_group, facts.block_size) == (1, 32)


@pytest.mark.parametrize(
    ("blocks", "asked_for", "said", "hashed"),
    [((48, 32), None, None, 16), ((64, 32), 8, None, 8), ((64,), 8, None, 64), ((64, 32), 8, 32, 32)],
)
def test_how_many_tokens_vllm_hashes_is_known_whether_it_says_so_or_not(
    blocks: tuple[int, ...], asked_for: int | None, said: int | None, hashed: int
) -> None:
    settings, kv_cache = config(), cache(*(spec(block_size=size) for size in blocks))
    settings.cache_config.prefix_match_unit = asked_for
    kv_cache.hash_block_size = said
    assert vllm_facts.read_facts(settings, kv_cache, EngineSettings()).hash_tokens == hashed


def test_a_model_id_makes_up_for_different_directories() -> None:
    here, there = (fingerprint(EngineSettings(model_id="weights"), model=path) for path in ("/a/m", "/b/m"))
    assert here == there


@pytest.mark.parametrize(("role", "ours"), [("kv_producer", "prefill"), ("kv_consumer", "decode"), ("kv_both", "both")])
def test_the_role_follows_vllms_unless_it_is_set(role: str, ours: str) -> None:
    assert vllm_facts.read_facts(config(role=role), cache(), EngineSettings()).role == ours
    assert vllm_facts.read_facts(config(role=role), cache(), EngineSettings(role="decode")).role == "decode"


@pytest.mark.parametrize(
    ("kv_cache", "words"),
    [
        (cache(spec(), MambaSpec(**vars(spec()))), "layers of MambaSpec"),
        (cache(spec(tokens_per_state=4)), "one state per 4 tokens"),
        (
            cache(UniformTypeKVCacheSpecs(**vars(spec()), kv_cache_specs={"a": MambaSpec(**vars(spec()))})),
            "layers of MambaSpec",
        ),
    ],
)
def test_a_model_with_another_kind_of_cache_is_refused_by_name(kv_cache: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"KV cache of jamba: it .*{words}"):
        vllm_facts.read_facts(config(model="jamba"), kv_cache, EngineSettings())


def test_scales_that_each_engine_measures_for_itself_are_refused() -> None:
    with pytest.raises(ConfigError, match="--calculate-kv-scales"):
        vllm_facts.read_facts(config(scales=True), cache(), EngineSettings())


@pytest.mark.parametrize("size", ["pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size"])
def test_parallelism_that_is_not_supported_is_refused_by_name(size: str) -> None:
    with pytest.raises(ConfigError, match=size):
        vllm_facts.read_facts(config(**{size: 2}), cache(), EngineSettings())


def test_a_policy_that_fails_requests_is_warned_of_with_what_to_write(log: pytest.LogCaptureFixture) -> None:
    vllm_facts.warn_of_what_should_differ(config(policy="fail"))
    assert '"kv_load_failure_policy":"recompute"' in log.text
    log.clear()
    vllm_facts.warn_of_what_should_differ(config())
    assert log.text == ""


def warned(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, version: str) -> str:
    """What is said of a release."""
    monkeypatch.setattr(vllm_facts.vllm, "__version__", version)
    vllm_facts.warn_of_what_should_differ(config())
    return log.text


@pytest.mark.parametrize("version", ["0.28.1", "0.33.0", "0.3.2", "1.0.0rc1", "0.1.dev20000+g0123abc"])
def test_a_release_that_is_not_tested_is_warned_of_and_not_refused(
    version: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    assert f"tested with vLLM 0.29 to 0.32; this is {version}" in warned(monkeypatch, log, version)
    assert fingerprint()


@pytest.mark.parametrize("version", ["0.29.0", "0.32.1", "0.30.0+cpu", "0.31.0rc2"])
def test_a_release_that_is_tested_is_not_warned_of(
    version: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    assert warned(monkeypatch, log, version) == ""


def test_prefix_caching_that_is_off_is_warned_of(log: pytest.LogCaptureFixture) -> None:
    vllm_facts.warn_of_what_should_differ(config(caching=False))
    assert "prefix caching is off" in log.text


def test_serving_in_order_of_arrival_is_warned_of(log: pytest.LogCaptureFixture) -> None:
    vllm_facts.warn_of_what_should_differ(config(scheduling="fcfs"))
    assert "--scheduling-policy priority" in log.text


def test_an_engine_says_how_many_requests_it_runs_at_a_time() -> None:
    assert vllm_facts.read_facts(config(), cache(), EngineSettings()).max_sequences == 64
