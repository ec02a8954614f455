"""What every long-running command of ours has in common: where it logs, how it says where it listens, how it ends."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from vllm_llmd.errors import ConfigError


def log_to_stderr() -> None:
    """One line per event; stdout is for what another program reads."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def http_url(address: tuple[str, int]) -> str:
    """The base URL of a server that listens there."""
    host, port = address
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def write_file(path: str | None, content: bytes, flag: str = "") -> None:
    """A report for the user, if one is wanted. Raises ConfigError, which names the `flag` that said where."""
    if path is None:
        return
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{flag}{path} cannot be written ({error.strerror})") from None


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> int:
    """Runs a command line; returns its exit status. What the user can mend is one line."""
    args = parser.parse_args()
    try:
        return run(args)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
