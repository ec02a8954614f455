"""The real router's part of a simulation: its fleet, told by messages, and a policy that decides. Pure."""

from array import array
from dataclasses import replace

from vllm_llmd.clock import Clock
from vllm_llmd.router.decide import Decision, decide, placed
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.policy import Policy
from vllm_llmd.router.request import Facts
from vllm_llmd.router.seen import Measured
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.simulate.trace import Tokens
from vllm_llmd.wire import LinkMessage

_NOTHING = Facts(None, None, b"", b"", 0, None)


class Routing:
    """Does for a request what `router/dispatch.py` does, without HTTP."""

    def __init__(self, settings: RouterSettings, clock: Clock, policy: Policy) -> None:
        self.fleet = Fleet(settings, clock, "simulated")
        self._policy = policy
        self._no_text = self.fleet.cut(_NOTHING)

    def told(self, message: LinkMessage) -> None:
        """An engine says so. What the router owes it in return, a simulated engine does not need."""
        self.fleet.on_message(b"", message)

    def decide(self, request: str, prompt: Tokens, most_tokens: int | None = None) -> Decision | None:
        """Where a prompt of token ids goes, and from whom its KV comes; counted until `done`.

        The client may have set a bound on the answer, in tokens.

        Policies that look at text see four bytes for each token.
        """
        text = prompt.tobytes()
        facts = replace(
            _NOTHING, tokens=array("I", text), text=text, prompt_tokens=len(prompt), output_tokens=most_tokens
        )
        candidates = self.fleet.candidates(facts, self._no_text)
        decision = decide(facts, candidates, self._policy)
        if decision is not None:
            placed(decision, facts, candidates, self._policy)
            self.fleet.place(request, decision, facts, self._no_text)
        return decision

    def answering(self, request: str, decision: Decision) -> None:
        """The first token has come."""
        self.fleet.answering(request, decision)

    def done(self, request: str, decision: Decision) -> None:
        """The answer has ended."""
        self.fleet.done(request, decision)

    def answered(self, request: str, decision: Decision, measured: Measured) -> None:
        """What the answer tells of the engines' speed. To be told before `done`."""
        self.fleet.answered(request, decision, measured)
