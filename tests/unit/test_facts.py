"""What the connector makes of vLLM's configuration: who may join, whose blocks fit, and what to warn of."""

import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_llmd.errors import ConfigError
from vllm_llmd.settings import EngineSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch deprecates as vLLM imports it is not ours to mend
    pytest.importorskip("vllm")
    from vllm_llmd.kv_connector import vllm_compat


class FullAttentionSpec(SimpleNamespace):
    """Named as vLLM's, since the name is what is looked at."""


class SlidingWindowSpec(SimpleNamespace):
    """Likewise."""


def spec(**changes: Any) -> FullAttentionSpec:
    facts = {"block_size": 32, "dtype": "f32", "num_kv_heads": 2, "head_size": 32, "page_size_bytes": 4096}
    return FullAttentionSpec(**{**facts, **changes})


def cache(*specs: Any) -> Any:
    groups = [SimpleNamespace(kv_cache_spec=each, layer_names=["a", "b"]) for each in specs or (spec(),)]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=64, kv_cache_layout="NHD")


def config(
    model: str = "m", policy: str = "recompute", role: str = "kv_both", caching: bool = True, **sizes: int
) -> Any:
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, **sizes}
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(engine_id="e", kv_role=role, kv_load_failure_policy=policy),
        model_config=SimpleNamespace(
            model=model, revision=None, quantization=None, dtype="f32", served_model_name=["m"], max_model_len=99
        ),
        parallel_config=SimpleNamespace(**parallel),
        device_config=SimpleNamespace(device_type="cpu"),
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
    )


def fingerprint(settings: EngineSettings | None = None, kv_cache: Any = None, **changes: Any) -> str:
    facts = vllm_compat.read_facts(config(**changes), kv_cache or cache(), settings or EngineSettings())
    return facts.fingerprint


def test_equal_engines_have_equal_fingerprints() -> None:
    assert fingerprint() == fingerprint(role="kv_consumer")


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "other"},
        {"tensor_parallel_size": 2},
        {"kv_cache": cache(spec(block_size=64))},
        {"kv_cache": cache(spec(dtype="bf16"))},
        {"kv_cache": cache(spec(num_kv_heads=4))},
    ],
)
def test_engines_whose_blocks_differ_have_other_fingerprints(changed: dict[str, Any]) -> None:
    assert fingerprint(**changed) != fingerprint()


def test_a_model_id_makes_up_for_different_directories() -> None:
    here, there = (fingerprint(EngineSettings(model_id="weights"), model=path) for path in ("/a/m", "/b/m"))
    assert here == there


@pytest.mark.parametrize(("role", "ours"), [("kv_producer", "prefill"), ("kv_consumer", "decode"), ("kv_both", "both")])
def test_the_role_follows_vllms_unless_it_is_set(role: str, ours: str) -> None:
    assert vllm_compat.read_facts(config(role=role), cache(), EngineSettings()).role == ours
    assert vllm_compat.read_facts(config(role=role), cache(), EngineSettings(role="decode")).role == "decode"


def test_a_model_with_another_kind_of_cache_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"gemma has 2 of \['FullAttentionSpec', 'SlidingWindowSpec'\]"):
        vllm_compat.read_facts(config(model="gemma"), cache(spec(), SlidingWindowSpec()), EngineSettings())


@pytest.mark.parametrize("size", ["pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size"])
def test_parallelism_that_is_not_supported_is_refused_by_name(size: str) -> None:
    with pytest.raises(ConfigError, match=size):
        vllm_compat.read_facts(config(**{size: 2}), cache(), EngineSettings())


def test_a_policy_that_fails_requests_is_warned_of_with_what_to_write(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm_llmd").propagate = True
    vllm_compat.warn_of_what_should_differ(config(policy="fail"))
    assert '"kv_load_failure_policy":"recompute"' in caplog.text
    caplog.clear()
    vllm_compat.warn_of_what_should_differ(config())
    assert caplog.text == ""


def test_prefix_caching_that_is_off_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm_llmd").propagate = True
    vllm_compat.warn_of_what_should_differ(config(caching=False))
    assert "prefix caching is off" in caplog.text
