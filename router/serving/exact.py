"""Token ids for prompts given as text, computed beside the event loop where `--tokenizer` says how. Otherwise nothing.

Whatever goes wrong, or takes too long, leaves a request to what is learned, and is counted.
"""

import asyncio
import logging
from array import array
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from vllm_llmd.errors import ConfigError
from vllm_llmd.router.index.agreement import Agreement
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.request import Facts, Kind, Unsupported, parse_body, with_tokens
from vllm_llmd.router.settings import RouterSettings

log = logging.getLogger(__name__)

THREADS: Final = 2
MOST_AT_ONCE: Final = 32

Tokenize = Callable[[Kind, Mapping[str, Any]], "array[int]"]


class Exact:
    """Tokenizers by model; under no name, one for every model that has none of its own."""

    def __init__(self, settings: RouterSettings, agreement: Agreement, metrics: Metrics) -> None:
        """Loads what the settings name. Raises ConfigError."""
        self._tokenizers = load(settings.tokenizer) if settings.tokenizer else {}
        self._wait_s = settings.tokenizer_wait_ms / 1000
        self._agreement = agreement
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(THREADS, "tokenizing")
        self._at_once = 0

    async def facts(self, facts: Facts, kind: Kind, raw: bytes) -> Facts:
        """With token ids, if they can be told in time."""
        tokenize = self._tokenizers.get(facts.model or "", self._tokenizers.get(""))
        is_text = facts.tokens is None and facts.prompts == 1 and facts.text
        if tokenize is None or not is_text or not self._agreement.trusted(facts.model):
            return facts
        if self._at_once >= MOST_AT_ONCE:
            return self._without(facts, "late")
        try:
            return with_tokens(facts, await self._in_time(tokenize, kind, raw))
        except TimeoutError:
            return self._without(facts, "late")
        except Unsupported as why:
            log.debug("not tokenized: %s", why)
            return self._without(facts, "unsupported")
        except Exception:  # a model's own template or tokenizer must not cost the request
            log.exception("tokenizing failed")
            return self._without(facts, "failed")

    async def _in_time(self, tokenize: Tokenize, kind: Kind, raw: bytes) -> "array[int]":
        running = asyncio.get_running_loop().run_in_executor(self._pool, lambda: tokenize(kind, parse_body(raw)))
        self._at_once += 1
        running.add_done_callback(self._ended)
        tokens = await asyncio.wait_for(asyncio.shield(running), self._wait_s)
        self._metrics.exact_prompts.labels("tokenized").inc()
        return tokens

    def _ended(self, running: "asyncio.Future[array[int]]") -> None:
        self._at_once -= 1
        if not running.cancelled():
            running.exception()  # whoever stopped waiting for it does not want to hear of it

    def _without(self, facts: Facts, result: str) -> Facts:
        self._metrics.exact_prompts.labels(result).inc()
        return facts


def load(setting: str) -> dict[str, Tokenize]:
    """`DIR`, or `MODEL=DIR,MODEL=DIR`. Raises ConfigError."""
    try:
        from vllm_llmd.router.serving.tokenizing import ModelTokenizer
    except ModuleNotFoundError as error:
        raise ConfigError(f"tokenizer needs {error.name}: pip install 'vllm-llmd[exact]'") from None
    pairs = (each.rpartition("=")[::2] for each in setting.split(","))
    return {model.strip(): ModelTokenizer(Path(directory.strip())).tokens for model, directory in pairs}
