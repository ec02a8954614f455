"""What a stock engine says over HTTP."""

from typing import Any

import pytest

from vllm_llmd.router.stock.report import Models, read_metrics, read_models

VLLM = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="1",num_gpu_blocks="200"} 1.0
process_start_time_seconds 1.7e+09
"""
SGLANG = """sglang:num_running_reqs{model_name="m"} 5.0
sglang:num_queue_reqs{model_name="m"} 6.0
sglang:token_usage{model_name="m"} 0.1
"""


def test_the_load_of_a_rank_is_its_own() -> None:
    scrape = read_metrics(VLLM)
    loads = [scrape.load(rank) for rank in (0, 1)]
    assert [(load.running, load.waiting, load.free_blocks) for load in loads] == [(3, 1, 50), (4, 0, 150)]
    assert (scrape.num_blocks(1), scrape.block_size(1), scrape.started_s) == (200, 16, 1.7e9)


def test_the_load_of_an_engine_is_that_of_all_its_ranks() -> None:
    load = read_metrics(VLLM).load(None)
    assert (load.running, load.waiting) == (7, 1)


def test_sglangs_names_are_known_too() -> None:
    load = read_metrics(SGLANG).load(None)
    assert (load.running, load.waiting) == (5, 6)


@pytest.mark.parametrize("text", ["", "nonsense\n", "vllm:num_requests_running many\n", VLLM.replace("3.0", "NaN")])
def test_what_makes_no_sense_counts_for_nothing(text: str) -> None:
    assert read_metrics(text).load(0).running == 0


def test_the_base_model_comes_before_its_adapters() -> None:
    listed = [
        {"id": "poet", "parent": "m", "max_model_len": None},
        {"id": "m", "parent": None, "max_model_len": 4096},
        {"id": "alias", "max_model_len": 4096},
    ]
    assert read_models({"data": listed}) == Models(("m", "alias"), ("poet",), 4096)


@pytest.mark.parametrize("body", [None, [], {}, {"data": None}, {"data": []}, {"data": [7, {"id": 7}]}])
def test_an_answer_without_models_is_none(body: Any) -> None:
    assert read_models(body) is None
