"""Shows a person how a fleet's engines come up: a live table on a terminal, one line per change elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_llmd.clock import Clock
from vllm_llmd.fleet import Progress, Status

_COLOURS = {"loading": "yellow", "ready": "green", "ended": "red"}


@contextmanager
def shown_on(console: Console, clock: Clock) -> Iterator[Progress]:
    """A Progress for a Fleet; what it shows stays when the block is left."""
    began_ms = clock.now_ms()
    if not console.is_terminal:
        yield _Lines(console, clock, began_ms)
        return
    with Live(console=console, refresh_per_second=8) as live:
        yield lambda statuses: live.update(_table(statuses, (clock.now_ms() - began_ms) / 1000))


class _Lines:
    """Says each engine's stage once."""

    def __init__(self, console: Console, clock: Clock, began_ms: float) -> None:
        self._console = console
        self._clock = clock
        self._began_ms = began_ms
        self._said: dict[str, str] = {}

    def __call__(self, statuses: Sequence[Status]) -> None:
        for status in statuses:
            if self._said.get(status.id) != status.stage:
                self._said[status.id] = status.stage
                seconds = (self._clock.now_ms() - self._began_ms) / 1000
                self._console.print(f"{status.id} ({status.role}): {status.stage}, {seconds:.0f} s", highlight=False)


def _table(statuses: Sequence[Status], seconds: float) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for texts in ([each.id for each in statuses], [each.role for each in statuses], ["loading"]):
        table.add_column(no_wrap=True, min_width=max(map(len, texts)))
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1, style="dim")
    for status in statuses:
        stage = Text(status.stage, style=_COLOURS[status.stage])
        note = Text("" if status.stage == "ready" else status.note)
        table.add_row(Text(status.id), Text(status.role), stage, note)
    table.add_row("", "", f"{seconds:.0f} s", "")
    return table
