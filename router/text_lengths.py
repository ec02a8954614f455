"""How many tokens a text has, as answers have told of others: it depends on the language and the tokenizer. Pure."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Final

from vllm_llmd.router.request import BYTES_PER_TOKEN, Facts

KEPT: Final = 1 - 1 / 64
"""Of what was told before, whenever an answer tells: traffic changes."""

PRIOR_BYTES: Final = 16_000
"""Text that the prior is worth: some prompts, soon outweighed."""

MOST_BYTES_PER_TOKEN: Final = 64
"""What is told of longer tokens is wrong, or of a prompt that was cut."""

MODELS_KEPT: Final = 256


@dataclass(slots=True)
class _Told:
    text_bytes: float = PRIOR_BYTES
    tokens: float = PRIOR_BYTES / BYTES_PER_TOKEN


class TextLengths:
    """By model. A token is at least a byte, and `MOST_BYTES_PER_TOKEN` at most."""

    def __init__(self) -> None:
        self._told: OrderedDict[str | None, _Told] = OrderedDict()

    def estimated(self, facts: Facts) -> Facts:
        """With as many prompt tokens as its text should have; as it is if the tokens are known."""
        known = self._told.get(facts.model)
        if facts.tokens is not None or known is None:
            return facts
        return replace(facts, prompt_tokens=round(len(facts.text) * known.tokens / known.text_bytes))

    def told(self, facts: Facts, prompt_tokens: int) -> None:
        """An answer has told of this prompt; of several in one request it tells the sum."""
        text_bytes = len(facts.text)
        if facts.tokens is not None or facts.prompts != 1:
            return
        if not text_bytes / MOST_BYTES_PER_TOKEN <= prompt_tokens <= text_bytes:
            return
        known = self._told.setdefault(facts.model, _Told())
        self._told.move_to_end(facts.model)
        known.text_bytes = KEPT * known.text_bytes + text_bytes
        known.tokens = KEPT * known.tokens + prompt_tokens
        if len(self._told) > MODELS_KEPT:
            self._told.popitem(last=False)
