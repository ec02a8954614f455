"""How many tokens a text has, as answers have told of others: it depends on the language and the tokenizer. Pure.

Beside what its text has, each prompt has some tokens of its chat template: of short prompts most may be.
"""

from collections import OrderedDict
from dataclasses import replace
from typing import Final

from vllm_llmd.router.learning.least_squares import LeastSquares
from vllm_llmd.router.request import BYTES_PER_TOKEN, Facts

TEMPLATE_TOKENS: Final = 8.0
"""Prior: a role, and marks where a message begins and ends."""

PRIORS: Final = (1 / BYTES_PER_TOKEN, TEMPLATE_TOKENS)

SPREADS: Final = (4.0, 40.0)
"""Languages differ by less than templates do: what short prompts have more than expected is their template's."""

MOST_BYTES_PER_TOKEN: Final = 64
"""What is told of longer tokens is wrong, or of a prompt that was cut."""

MODELS_KEPT: Final = 256


class TextLengths:
    """By model. A token is at least a byte, and `MOST_BYTES_PER_TOKEN` at most.

    So a prompt that is shorter than its template teaches nothing.
    """

    def __init__(self) -> None:
        self._models: OrderedDict[str | None, LeastSquares] = OrderedDict()

    def estimated(self, facts: Facts) -> Facts:
        """With as many prompt tokens as its text should have; as it is if the tokens are known."""
        known = self._models.get(facts.model)
        if facts.tokens is not None or known is None:
            return facts
        return replace(facts, prompt_tokens=round(known.expected((len(facts.text), 1.0))))

    def told(self, facts: Facts, text_bytes: int, prompt_tokens: int) -> None:
        """An answer has told of this prompt of so many bytes; of several in one request it tells the sum."""
        if facts.tokens is not None or facts.prompts != 1:
            return
        if not text_bytes / MOST_BYTES_PER_TOKEN <= prompt_tokens <= text_bytes:
            return
        known = self._models.setdefault(facts.model, LeastSquares(PRIORS, SPREADS))
        self._models.move_to_end(facts.model)
        known.learn((text_bytes, 1.0), prompt_tokens)
        if len(self._models) > MODELS_KEPT:
            self._models.popitem(last=False)
