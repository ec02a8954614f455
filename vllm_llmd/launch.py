"""`vllm-llmd up`: a router and vLLM engines on this machine, until Ctrl-C, SIGTERM or the end of one of them."""

import argparse
import json
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from vllm_llmd.clock import MonotonicClock
from vllm_llmd.errors import ConfigError
from vllm_llmd.fleet import Fleet
from vllm_llmd.launch_progress import shown_on
from vllm_llmd.launch_spec import FleetSpec, engines_by_role


class ToldToStop(BaseException):
    """A signal asked this process to end. Not an Exception: nothing on the way to the fleet's end may catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Within the block the first SIGINT, SIGTERM or SIGHUP raises ToldToStop; guards see to the rest after a second."""

    def told(number: int, _frame: FrameType | None) -> None:
        for each in former:
            signal.signal(each, signal.SIG_DFL)
        raise ToldToStop(number)

    former = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `up`; what follows `--` on the command line is not among them."""
    parser.add_argument("--model", type=Path, required=True, help="directory of a model, as `vllm-llmd model` makes")
    parser.add_argument("--prefill", type=int, default=0, metavar="N", help="engines that prefill for others")
    parser.add_argument("--decode", type=int, default=0, metavar="N", help="engines that answer")
    parser.add_argument("--engines", type=int, default=0, metavar="N", help="engines that do both")
    parser.add_argument("--router-port", type=int, default=0, metavar="P", help="default: a free one")
    parser.add_argument(
        "--log-dir", type=Path, default=Path(".logs/up"), help="one file per process (default: %(default)s)"
    )


def spec_from_args(args: argparse.Namespace, engine_flags: Sequence[str]) -> FleetSpec:
    """The fleet that parsed flags ask for. Raises ConfigError for counts that make no fleet."""
    if min(args.prefill, args.decode, args.engines) < 0:
        raise ConfigError("--prefill, --decode and --engines must not be negative")
    if not args.decode + args.engines:
        raise ConfigError("nobody would answer: say --prefill N --decode N, or --engines N")
    return FleetSpec(
        model=args.model,
        engines=engines_by_role(args.prefill, args.decode, args.engines),
        log_dir=args.log_dir,
        router_flags=("--port", str(args.router_port)) if args.router_port else (),
        engine_flags=tuple(engine_flags),
    )


def run(spec: FleetSpec, console: Console) -> int:
    """Serves until told to stop; returns the exit status. Raises LaunchError if a process ends before that."""
    up = False
    try:
        with signals_as_exceptions():
            names = ", ".join(engine.id for engine in spec.engines)
            console.print(f"Starting router, {names}; logs in {spec.log_dir}", highlight=False)
            with ExitStack() as screen, Fleet(spec, screen.enter_context(shown_on(console, MonotonicClock()))) as fleet:
                screen.close()
                up = True
                console.print(_how_to_try(fleet), highlight=False, soft_wrap=True, markup=False)
                fleet.wait()
    except ToldToStop as told:
        console.print(f"{told}: everything has been stopped", highlight=False)
        return 0 if up else told.status
    return 1


def _how_to_try(fleet: Fleet) -> str:
    body = {"model": fleet.models()[0], "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    url = f"{fleet.router_http}/v1/chat/completions"
    curl = f"curl {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    return f"\nReady. Try it:\n\n{curl}\n\nCtrl-C stops everything."
