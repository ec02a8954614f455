"""One real engine in this process, with publishing to a router switched on and off in turn. Runs where vLLM is.

Prints one JSON list: per round, the arm, its steps, and CPU and wall time per step in microseconds. Of the engine's
thread, what it spends where publishing happens, vLLM's block pool included, which records events only if asked to; and
what all other threads do, the link's and ZeroMQ's among them. What is there without publishing is in both arms.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from llvmlite.binding import ffi

from vllm_llmd.launch_spec import CPU_ENV

os.environ |= CPU_ENV | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}

from vllm import LLM, SamplingParams

REQUESTS = 48
PROMPT_TOKENS = 512
ANSWER_TOKENS = 32
CACHE_BLOCKS = 768
JOINED_WITHIN_S = 30.0


def without_dict(theirs: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """In one process with numba, vLLM takes any attribute of llvmlite's library for real, `__dict__` too."""

    def ours(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return theirs(self, name)

    return ours


class Meter:
    """CPU time of this thread that is spent in some functions."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self.calls = 0

    def over(self, owner: Any, name: str) -> None:
        """Measures a function from now on."""
        theirs = getattr(owner, name)

        @wraps(theirs)
        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return theirs(*args, **kwargs)
            finally:
                self.spent_s += time.thread_time() - began
                self.calls += 1

        setattr(owner, name, measured)

    def take(self) -> tuple[float, int]:
        taken = self.spent_s, self.calls
        self.spent_s, self.calls = 0.0, 0
        return taken


class Engine:
    """The engine, its connector's scheduler side, and what is measured there."""

    def __init__(self, model: str, router: str) -> None:
        ffi._lib_wrapper.__getattr__ = without_dict(ffi._lib_wrapper.__getattr__)
        extra = {"router": router, "http": "http://127.0.0.1:1"}
        connector = {"kv_connector": "LlmdConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
        self._llm = LLM(
            model=model,
            enforce_eager=True,
            block_size=32,
            dtype="float32",
            max_num_seqs=32,
            max_num_batched_tokens=1024,
            max_model_len=2048,
            num_gpu_blocks_override=CACHE_BLOCKS,
            disable_log_stats=True,
            kv_transfer_config=connector,
        )
        core = self._llm.llm_engine.engine_core.engine_core
        self._vocabulary = core.vllm_config.model_config.get_vocab_size()
        self._side = core.scheduler.connector._scheduler
        self._pool = core.scheduler.kv_cache_manager.block_pool
        self._link = self._side._link
        self._steps, self._publishing = Meter(), Meter()
        self._steps.over(core, "step_fn")
        for owner, name in (
            (self._pool, "cache_full_blocks"),
            (self._pool, "get_new_blocks"),
            (self._side, "_follow_pool"),
            (self._side, "_names_of"),
            (self._link, "seen"),
        ):
            self._publishing.over(owner, name)
        self._follow = self._side._follow_pool
        self._asked = 0

    def join(self) -> None:
        deadline = time.monotonic() + JOINED_WITHIN_S
        while not self._link._connections[0].dialogue.welcomed:
            assert time.monotonic() < deadline, "the router does not answer"
            time.sleep(0.05)

    def publish(self) -> None:
        self._pool.enable_kv_cache_events = True
        self._side._follow_pool = self._follow

    def keep_silent(self) -> None:
        self._pool.enable_kv_cache_events = False
        self._side._follow_pool = lambda: None

    def round(self, arm: str) -> dict[str, Any]:
        """Answers as many fresh prompts as make the cache turn over, with the engine full all the while."""
        (self.publish if arm == "on" else self.keep_silent)()
        self._llm.reset_prefix_cache()
        prompts = [
            {"prompt_token_ids": random.choices(range(self._vocabulary), k=PROMPT_TOKENS)} for _ in range(REQUESTS)
        ]
        self._steps.take()
        self._publishing.take()
        others_s, began = others_cpu_s(), time.perf_counter()
        self._llm.generate(prompts, [self._params(arm) for _ in prompts], use_tqdm=False)
        wall_s = time.perf_counter() - began
        steps_s, steps = self._steps.take()
        here_s = self._publishing.take()[0]
        there_s = others_cpu_s() - others_s
        return {
            "arm": arm,
            "steps": steps,
            "wall_us": wall_s / steps * 1e6,
            "cpu_us": steps_s / steps * 1e6,
            "engine_thread_us": here_s / steps * 1e6,
            "other_threads_us": there_s / steps * 1e6,
            "changes": self._link._mirror.seq,
        }

    def _params(self, arm: str) -> Any:
        self._asked += 1
        hint = {"kv_transfer_params": {"llmd": {"request": f"bench-{self._asked}"}}} if arm == "on" else None
        return SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True, temperature=0, extra_args=hint)


def others_cpu_s() -> float:
    """CPU time of all threads but this one: the link's and ZeroMQ's among them."""
    return time.process_time() - time.thread_time()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--router", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    args = parser.parse_args()
    engine = Engine(args.model, args.router)
    engine.join()
    for arm in ("on", "off"):
        engine.round(arm)
    found = [engine.round(arm) for _ in range(args.rounds) for arm in random.sample(("on", "off"), 2)]
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
