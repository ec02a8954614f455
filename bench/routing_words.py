"""Text of a known length: words that are one token each in SmolLM2's vocabulary, at random. Pure."""

import random
from typing import Final

_LISTED: Final = (
    "system server engine model token cache prefix block router request answer question user network memory data time "
    "year people world house water food city country state group number problem point hand part place case week "
    "company program government night home room mother area money story fact month lot right study book eye job word "
    "business issue side kind head service friend father power hour game line end member law car community name "
    "president team minute idea kid body information school face others level office door health person art war "
    "history party result change morning reason research girl guy moment air teacher force education foot boy age "
    "policy music market sense nation plan college interest death experience effect use class control field "
    "development role effort rate heart drug show leader light voice wife police mind price report decision son view "
    "relationship town road arm difference value building action season society tax director position player record "
    "paper space ground form event official matter center couple site project activity star table need court oil "
    "situation cost industry figure street image phone quality nature lead"
)
WORDS: Final = tuple(_LISTED.split())


def text(rng: random.Random, tokens: int) -> str:
    """So many words; with a space before it, each is one token."""
    return " ".join(rng.choices(WORDS, k=tokens))
