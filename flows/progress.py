"""Progress bars in a terminal; one log line a stage where there is none."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from infra.build import Progress as Report
from infra.build import silent


@contextmanager
def reporter() -> Iterator[Report]:
    """A progress function that draws one bar a stage on stderr, or is silent without a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal or not sys.stderr.isatty():
        yield silent
        return
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[said]}", markup=False),
    )
    with Progress(*columns, console=console) as bars:
        known: dict[str, int] = {}

        def report(stage: str, done: int, total: int | None, said: str = "") -> None:
            if stage not in known:
                known[stage] = int(bars.add_task(stage, total=total, said=said))
            bars.update(known[stage], completed=done, total=total, said=said)  # type: ignore[arg-type]

        yield report
