"""Which engines a client wants, by their labels, as Kubernetes writes it: `gpu=h100,zone!=b,spot`. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from vllm_llmd.errors import LlmdError
from vllm_llmd.labels import KEY, VALUE

LONGEST: Final = 1024

_RULE: Final = re.compile(
    rf"\s*(?P<key>{KEY})\s*(?P<sign>==|=|!=)\s*(?P<value>{VALUE})\s*"
    rf"|\s*(?P<of>{KEY})\s+(?P<word>in|notin)\s*\((?P<values>\s*{VALUE}\s*(?:,\s*{VALUE}\s*)*)\)\s*"
    rf"|\s*(?P<absent>!?)\s*(?P<present>{KEY})\s*",
    re.ASCII,
)

Kind = Literal["in", "notin", "present", "absent"]


class SelectorError(LlmdError):
    """What should be a selector is none."""


class Rule(NamedTuple):
    """`in`: the label is there and has one of the values. `notin`: it is not there, or has another."""

    key: str
    kind: Kind
    values: frozenset[str] = frozenset()

    def holds(self, labels: Mapping[str, str]) -> bool:
        match self.kind:
            case "in":
                return self.key in labels and labels[self.key] in self.values
            case "notin":
                return self.key not in labels or labels[self.key] not in self.values
            case "present":
                return self.key in labels
            case "absent":
                return self.key not in labels


@dataclass(frozen=True)
class Selector:
    """All of the rules must hold."""

    rules: frozenset[Rule]

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(rule.holds(labels) for rule in self.rules)


def read_selector(text: str) -> Selector | None:
    """None for an empty one, which every engine matches. Raises SelectorError."""
    if not text.strip():
        return None
    if len(text) > LONGEST:
        raise SelectorError(f"must be at most {LONGEST} characters; got {len(text)}")
    rules, at = set(), 0
    while True:
        found = _RULE.match(text, at)
        if found is None or (found.end() < len(text) and text[found.end()] != ","):
            raise SelectorError(
                "must be rules such as gpu=h100, zone!=b, tier in (a,b), tier notin (a,b), spot or !spot, with commas "
                f"between them; it is not one at {text[at : at + 40].strip()!r}"
            )
        rules.add(_rule(found))
        if found.end() == len(text):
            return Selector(frozenset(rules))
        at = found.end() + 1


def _rule(found: "re.Match[str]") -> Rule:
    if found["sign"]:
        return Rule(found["key"], "notin" if found["sign"] == "!=" else "in", frozenset((found["value"],)))
    if found["word"]:
        values = frozenset(value.strip() for value in found["values"].split(","))
        return Rule(found["of"], "in" if found["word"] == "in" else "notin", values)
    return Rule(found["present"], "absent" if found["absent"] else "present")
