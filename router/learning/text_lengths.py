"""How many tokens a text has, as answers have told of others: it depends on the language and the tokenizer. Pure."""

from collections import OrderedDict
from dataclasses import replace
from typing import Final

from vllm_llmd.router.learning.averages import Ratio
from vllm_llmd.router.request import BYTES_PER_TOKEN, Facts

PRIOR_BYTES: Final = 16_000
"""Text that the prior is worth: some prompts, soon outweighed."""

MOST_BYTES_PER_TOKEN: Final = 64
"""What is told of longer tokens is wrong, or of a prompt that was cut."""

MODELS_KEPT: Final = 256


class TextLengths:
    """By model. A token is at least a byte, and `MOST_BYTES_PER_TOKEN` at most."""

    def __init__(self) -> None:
        self._tokens_per_byte: OrderedDict[str | None, Ratio] = OrderedDict()

    def estimated(self, facts: Facts) -> Facts:
        """With as many prompt tokens as its text should have; as it is if the tokens are known."""
        known = self._tokens_per_byte.get(facts.model)
        if facts.tokens is not None or known is None:
            return facts
        return replace(facts, prompt_tokens=round(len(facts.text) * known.value))

    def told(self, facts: Facts, text_bytes: int, prompt_tokens: int) -> None:
        """An answer has told of this prompt of so many bytes; of several in one request it tells the sum."""
        if facts.tokens is not None or facts.prompts != 1:
            return
        if not text_bytes / MOST_BYTES_PER_TOKEN <= prompt_tokens <= text_bytes:
            return
        known = self._tokens_per_byte.setdefault(facts.model, Ratio(PRIOR_BYTES / BYTES_PER_TOKEN, PRIOR_BYTES))
        self._tokens_per_byte.move_to_end(facts.model)
        known.told(prompt_tokens, text_bytes)
        if len(self._tokens_per_byte) > MODELS_KEPT:
            self._tokens_per_byte.popitem(last=False)
