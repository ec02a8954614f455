"""One process of a fleet: started under a guard, logged into one file, signalled as a group, ended without remains."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_llmd.errors import LaunchError
from vllm_llmd.launch_guard import GRACE_S

_SPAWN_S = 60.0
_LOG_TAIL_BYTES = 64 << 10
_SHOWN_LINES = 5
_SPEAKER = re.compile(r"^\([^)]*pid=\d+\)\s+")
_LOG_PREFIX = re.compile(r"^(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ (?:\[[^\]]*\] )?")
_NAMES_AN_ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt)\b|(?:\S+: )?error:)")


@dataclass(frozen=True)
class Command:
    """What to run, under which name, with which environment, and which file its output is appended to."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path


class GuardedProcess:
    """A running command. `pid` leads the process group `pid`; its guard is `guard`."""

    def __init__(self, command: Command) -> None:
        """Raises LaunchError if the command cannot be run."""
        self.name, self.log = command.name, command.log
        self._launcher, theirs = socket.socketpair()
        with theirs, command.log.open("ab") as log:
            self._log_start = log.tell()
            argv = [sys.executable, "-m", "vllm_llmd.launch_guard", str(theirs.fileno()), "--", *command.argv]
            self.guard = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(command.env),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.pid = self._learn_pid()

    def _learn_pid(self) -> int:
        self._launcher.settimeout(_SPAWN_S)
        with self._launcher.makefile("rb") as lines:
            line = lines.readline()
        if not line:
            self._launcher.close()
            self.guard.wait()
            raise self.failure()
        return int(line)

    @property
    def pgid(self) -> int:
        return self.pid

    @property
    def running(self) -> bool:
        """Whether any of it is left; a stopped process is running."""
        return self.guard.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Signals the whole group. After SIGKILL, returns when nothing is left of it."""
        if self.running:
            with suppress(ProcessLookupError):
                os.killpg(self.pgid, number)
        if number == signal.SIGKILL:
            self.end()

    def ask_to_end(self) -> None:
        """Begins the end: SIGTERM, and SIGKILL after a grace."""
        self._launcher.close()

    def end(self) -> None:
        """Returns when nothing is left of it."""
        self.ask_to_end()
        try:
            self.guard.wait(GRACE_S + 10)
        except subprocess.TimeoutExpired:
            self.guard.kill()
            self.guard.wait()
        if self.guard.returncode < 0:  # the guard itself was killed, and could not see to its command
            with suppress(ProcessLookupError):
                os.killpg(self.pgid, signal.SIGKILL)

    def output(self) -> str:
        """The end of what this life of the process has written."""
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace")

    def failure(self) -> LaunchError:
        """An error for a process that should be running."""
        lines = "".join(f"\n  {line}" for line in meaningful(self.output()))
        return LaunchError(f"{self.name} has ended with {_ending(self.guard.poll())}; its log is {self.log}{lines}")


def meaningful(output: str) -> list[str]:
    """The few lines of a log that most likely say what went wrong: named errors if there are any, else the last."""
    lines = [bare(line) for line in output.splitlines()]
    lines = list(dict.fromkeys(line for line in lines if line))
    return [line for line in lines if _NAMES_AN_ERROR.match(line)][-_SHOWN_LINES:] or lines[-_SHOWN_LINES:]


def bare(line: str) -> str:
    """A line of a log without who wrote it, when, and at what level."""
    return _LOG_PREFIX.sub("", _SPEAKER.sub("", line)).strip()


def _ending(status: int | None) -> str:
    number = -status if status is not None and status < 0 else (status or 0) - 128
    if number > 0:
        with suppress(ValueError):
            return f"signal {signal.Signals(number).name}"
    return f"exit status {status}"


def reserve_port(host: str = "127.0.0.1") -> socket.socket:
    """A socket that keeps a free port from everyone but a server that sets SO_REUSEADDR, as they all do.

    It never listens. Its holder names the port to that server and closes it after the server's end.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((host, 0))
    return held
