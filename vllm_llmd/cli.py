"""`vllm-llmd`: one command with the subcommands up, model, router, sim-engine, simulate, replay, index.

Errors are one line; exit status 1 or 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from rich.console import Console

import vllm_llmd
from vllm_llmd import launch, model
from vllm_llmd.errors import ConfigError, LlmdError
from vllm_llmd.router import settings as router_settings
from vllm_llmd.router.audit import replay_command
from vllm_llmd.router.index import verify
from vllm_llmd.sim import settings as sim_settings
from vllm_llmd.simulate import settings as simulate_settings


def parser() -> argparse.ArgumentParser:
    """Every subcommand with its flags."""
    whole = argparse.ArgumentParser(prog="vllm-llmd", description=vllm_llmd.__doc__)
    whole.add_argument("--version", action="version", version=f"vllm-llmd {vllm_llmd.__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    launch.add_arguments(
        commands.add_parser(
            "up",
            help="a router and vLLM engines on this machine",
            description="Start a router and vLLM engines on this machine, until Ctrl-C.",
            usage="vllm-llmd up --model DIR (--prefill N --decode N | --engines N) [options] [-- vLLM flags]",
        )
    )
    model.add_arguments(commands.add_parser("model", help="make a small model directory to try things with"))
    router_settings.add_arguments(commands.add_parser("router", help="OpenAI front door that knows the KV cache"))
    sim_settings.add_arguments(
        commands.add_parser("sim-engine", help="engines without a model or a GPU, to try a fleet")
    )
    simulate_settings.add_arguments(
        commands.add_parser("simulate", help="play a trace against modelled engines and compare policies")
    )
    replay_command.add_arguments(
        commands.add_parser("replay", help="put a router's recorded decisions to other policies")
    )
    index = commands.add_parser("index", help="look at a router's prefix index").add_subparsers(
        dest="index_command", required=True, metavar="COMMAND"
    )
    verify.add_arguments(index.add_parser("verify", help="compare it with what every engine holds, block by block"))
    return whole


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; returns its exit status. Raises LlmdError."""
    ours, engine_flags = _split(arguments)
    args = parser().parse_args(ours)
    if engine_flags and args.command != "up":
        raise ConfigError(f"only `up` passes flags on to vLLM; got {' '.join(engine_flags)}")
    if args.command == "up":
        return launch.run(launch.spec_from_args(args, engine_flags), Console())
    if args.command == "model":
        return model.run(args, lambda line: Console().print(line, highlight=False))
    if args.command == "index":
        return verify.run(args, lambda line: Console().print(line, highlight=False, soft_wrap=True))
    if args.command == "replay":
        return replay_command.run(args, lambda line: Console().print(line, highlight=False, soft_wrap=True))
    if args.command == "sim-engine":
        from vllm_llmd.sim import main as sim_main

        return sim_main.run(sim_settings.from_args(args, os.environ))
    if args.command == "simulate":
        from vllm_llmd.simulate import main as simulate_main

        return simulate_main.run(
            simulate_settings.from_args(args), lambda line: Console().print(line, highlight=False, soft_wrap=True)
        )
    from vllm_llmd.router import main as router_main

    return router_main.run(router_settings.from_args(args, os.environ))


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and after it."""
    here = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:here]), list(arguments[here + 1 :])


def main() -> int:
    try:
        return run(sys.argv[1:])
    except LlmdError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
