"""Runs one command so that nothing of it outlives its launcher: `python -m vllm_llmd.launch_guard FD -- COMMAND`.

FD is one end of a socket pair whose other end the launcher alone holds. The guard writes the command's pid there;
end of file there, however it came about, ends the command. The command leads a process group of its own, so that the
guard lives on while that group is stopped or killed. The guard ends last, with the command's exit status.
"""

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

GRACE_S = 5.0
"""Between asking a command to end and killing it."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def guard(launcher: socket.socket, command: Sequence[str]) -> int:
    """Runs the command to its end, or to the launcher's; returns its exit status, 128 + N if signal N killed it."""

    def asked_to_end(_number: int, _frame: FrameType | None) -> None:
        launcher.shutdown(socket.SHUT_RD)  # reads as end of file from now on

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, asked_to_end)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the command leaves behind becomes our child
    try:
        child = subprocess.Popen(command, process_group=0, preexec_fn=_die_with_the_guard)  # noqa: PLW1509 (one thread)
    except OSError as error:
        sys.stderr.write(f"error: cannot run {command[0]}: {error}\n")
        return 127
    try:
        with suppress(OSError):  # the launcher is gone already: the next read says so
            launcher.sendall(f"{child.pid}\n".encode())
        _wait_for_either(child, launcher)
        status = _ask_to_end(child)
    finally:
        _kill_everything(child.pid)
    return status if status >= 0 else 128 - status


def _wait_for_either(child: "subprocess.Popen[bytes]", launcher: socket.socket) -> None:
    pidfd = os.pidfd_open(child.pid)
    try:
        select.select([launcher.fileno(), pidfd], [], [])
    finally:
        os.close(pidfd)


def _ask_to_end(child: "subprocess.Popen[bytes]") -> int:
    """The exit status; a command that runs on is terminated, and after the grace killed."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        os.killpg(child.pid, signal.SIGCONT)  # a stopped group would not hear the first
        with suppress(subprocess.TimeoutExpired):
            return child.wait(GRACE_S)
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def _kill_everything(group: int) -> None:
    """Returns when no descendant is left, in the command's group or out of it."""
    while True:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        for pid in _children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in listed.read_text().split()] if listed.exists() else []


def _die_with_the_guard() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def main() -> int:
    _, number, _, *command = sys.argv
    os.set_inheritable(int(number), False)
    with socket.socket(fileno=int(number)) as launcher:
        return guard(launcher, command)


if __name__ == "__main__":
    sys.exit(main())
