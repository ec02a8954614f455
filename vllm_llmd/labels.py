"""Labels of engines: keys and values in the shapes that Kubernetes gives them, so that selectors can name them."""

import re
from collections.abc import Mapping
from typing import Final

_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
KEY: Final = rf"(?:[a-z0-9](?:[a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_NAME}"
VALUE: Final = rf"(?:{_NAME})?"

MOST: Final = 64
"""Labels of one engine."""

_KEY: Final = re.compile(KEY, re.ASCII)
_VALUE: Final = re.compile(VALUE, re.ASCII)


def objection(labels: Mapping[str, str]) -> str | None:
    """What is wrong with an engine's labels, if anything is."""
    if len(labels) > MOST:
        return f"must be at most {MOST}; got {len(labels)}"
    for key, value in labels.items():
        if not _KEY.fullmatch(key):
            return f"must have keys such as 'zone' or 'example.com/zone', of at most 63 characters; got {key!r}"
        if not _VALUE.fullmatch(value):
            return (
                "must have values of at most 63 letters, digits, '-', '_' and '.', with a letter or digit at either "
                f"end; got {value!r} for {key!r}"
            )
    return None
