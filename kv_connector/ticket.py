"""Pure: the ticket of an order, which travels over HTTP with the request that is to compute it."""

from typing import Annotated, Final

import msgspec

from vllm_llmd.names import EngineId, Epoch, OrderId
from vllm_llmd.wire import MAJOR

_SENDABLE: Final = r"\A[^\ud800-\udfff]*\Z"
_Id = msgspec.Meta(max_length=256, pattern=_SENDABLE)
_Text = msgspec.Meta(pattern=_SENDABLE)
_Int = msgspec.Meta(ge=-(2**63), le=2**63 - 1)
"""JSON knows half characters and integers of any length, which nothing of ours can pass on; ids are remembered."""


class Ticket(msgspec.Struct, frozen=True):
    """What makes a one-token request an order; it travels as JSON in the request's `kv_transfer_params`.

    The KV of prompt tokens `first_token` to `end_token` (exclusive) is wanted by the destination's `destination_tp`
    ranks. `adapter` is a digest of the adapter's weights, empty without one. `deadline_ms` is how long the order is
    worth serving, 0 for ever. `request` is the destination's name for what it is serving. `mac` as in Greet.
    """

    order: Annotated[OrderId, _Id]
    source: Annotated[EngineId, _Id]
    source_epoch: Annotated[Epoch, _Int]
    destination: Annotated[EngineId, _Id]
    destination_epoch: Annotated[Epoch, _Int]
    destination_tp: Annotated[int, _Int]
    fingerprint: Annotated[str, _Text]
    first_token: Annotated[int, _Int]
    end_token: Annotated[int, _Int]
    lease_ms: Annotated[int, _Int]
    request: Annotated[str, _Text] = ""
    adapter: Annotated[str, _Text] = ""
    deadline_ms: Annotated[int, _Int] = 0
    version: Annotated[int, _Int] = MAJOR
    mac: Annotated[str, _Text] = ""


def ticket_text(ticket: Ticket) -> str:
    """What a ticket's `mac` signs."""
    unsigned = msgspec.structs.replace(ticket, mac="")
    return "ticket " + msgspec.json.encode(unsigned).decode()
