"""Text as a simulated engine knows it: a tokenizer without a vocabulary, a chat template, and answers. Pure.

A token is four bytes of UTF-8, its id their value, little endian; the last token of a piece of text is filled up with
zeros. A word of an answer is three letters and a space: one token. So an answer that comes back in the next turn of a
chat has the tokens that it was made of, and a prompt that ends within an answer is answered with the rest of it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

TOKEN_BYTES: Final = 4
WORD_LETTERS: Final = b"abcdefghijklmnopqrstuvwxyz"

WORDS: Final = len(WORD_LETTERS) ** 3
_STEP: Final = 4213
_SHIFT: Final = 7919
"""Every word follows every other in the end: `WORDS` is 2**3 * 13**3, `_STEP` one more than a multiple of 52, `_SHIFT`
odd and no multiple of 13."""

Tokens = npt.NDArray[np.uint32]
"""Token ids, shape (n,)."""


def tokenize(*pieces: str) -> Tokens:
    """Each piece begins with a token of its own."""
    filled = bytearray()
    for piece in pieces:
        filled += piece.encode("utf-8", "surrogatepass")
        filled += bytes(-len(filled) % TOKEN_BYTES)
    return np.frombuffer(bytes(filled), "<u4").astype(np.uint32)


def detokenize(tokens: Tokens) -> str:
    return tokens.astype("<u4").tobytes().replace(b"\0", b"").decode("utf-8", "replace")


def chat_pieces(messages: Sequence[Mapping[str, Any]], tools: Any) -> list[str]:
    """What the template makes of a chat: tools, messages, and the beginning of the answer."""
    pieces = [] if not tools else ["<|tools|>", json.dumps(tools, sort_keys=True)]
    for message in messages:
        pieces += [f"<|{message.get('role')}|>", _content(message), "<|end|>"]
    return [*pieces, "<|assistant|>"]


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str) and len(message) == 2:
        return content
    return json.dumps({key: value for key, value in message.items() if key != "role"}, sort_keys=True)


def answer_words(prompt: Tokens, most: int) -> Tokens:
    """The first `most` tokens of the one answer to this prompt."""
    numbers = np.empty(most, np.int64)
    number = _first_word(prompt)
    for at in range(most):
        numbers[at] = number
        number = (number * _STEP + _SHIFT) % WORDS
    words = np.full((most, TOKEN_BYTES), ord(" "), np.uint8)
    for letter in range(3):
        words[:, letter] = np.frombuffer(WORD_LETTERS, np.uint8)[
            numbers // len(WORD_LETTERS) ** letter % len(WORD_LETTERS)
        ]
    return words.view("<u4").reshape(most).astype(np.uint32)


def _first_word(prompt: Tokens) -> int:
    """The number of the word that follows the prompt: after a word the one that comes after it in every answer."""
    last = int(prompt[-1]).to_bytes(TOKEN_BYTES, "little")
    if last[3] == ord(" ") and all(letter in WORD_LETTERS for letter in last[:3]):
        low, middle, high = (letter - WORD_LETTERS[0] for letter in last[:3])
        number = low + len(WORD_LETTERS) * (middle + len(WORD_LETTERS) * high)
        return (number * _STEP + _SHIFT) % WORDS
    return int.from_bytes(hashlib.blake2b(prompt.tobytes(), digest_size=8).digest(), "little") % WORDS


def answer_length(prompt: Tokens, mean: int) -> int:
    """After how many tokens the answer to this prompt comes to its end: 1 to twice `mean`, less one."""
    digest = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % (2 * mean - 1)
