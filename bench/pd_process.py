"""Starts processes in the benchmark's own session; they end with it all the same.

The launcher gives every engine a session of its own, and Linux then schedules sessions against each other
(`sched_autogroup`). Engines of vLLM's own connectors yield in a loop while they wait, and with Linux 6.18 a session of
theirs was seen to get no time at all for half a minute while another one yielded. In one session all is well.
"""

import socket
import subprocess
import sys

from vllm_llmd.launch_process import Command, GuardedProcess


class SessionProcess(GuardedProcess):
    """As its base, in the session of whoever starts it. Still leads a process group of its own."""

    def __init__(self, command: Command) -> None:
        """Raises LaunchError if the command cannot be run."""
        self.name, self.log = command.name, command.log
        self._launcher, theirs = socket.socketpair()
        with theirs, command.log.open("ab") as log:
            self._log_start = log.tell()
            self.guard = subprocess.Popen(
                [sys.executable, "-m", "vllm_llmd.launch_guard", str(theirs.fileno()), "--", *command.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(command.env),
                pass_fds=[theirs.fileno()],
                process_group=0,  # out of reach of the terminal's Ctrl-C: we end them in order
            )
        self.pid = self._learn_pid()
