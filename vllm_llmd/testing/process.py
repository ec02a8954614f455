"""A router or simulated engines as a process of their own, which can be killed and started again."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

END_S = 60.0


@dataclass
class ServerProcess:
    """`python -m MODULE FLAGS`, of a module that says in one line of JSON on stdout where it listens."""

    module: str
    flags: tuple[str, ...]
    log: Path
    said: Any = None
    _process: "subprocess.Popen[str] | None" = field(default=None, repr=False)

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self, *more: str) -> Any:
        """Returns what it said. Blocks until it listens; AssertionError with its log if it ends instead."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.flags, *more],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONSAFEPATH": "1"},
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.end(signal.SIGKILL)
            raise AssertionError(self.log.read_text())
        self.said = json.loads(line)
        return self.said

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status, once it has gone."""
        assert self._process is not None and self._process.stdout is not None
        self._process.send_signal(number)
        status = self._process.wait(timeout=END_S)
        self._process.stdout.close()
        self._process = None
        return status
