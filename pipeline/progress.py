"""Progress of a long operation: bars in a terminal or notebook, lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from varve.pipeline.units import clock

LINE_SECONDS = 10.0


class Progress:
    """Receive progress and show nothing. The subclasses show it.

    A bar has a name ("decode"), a total and a unit ("clips"); `advance` adds to it.
    """

    def message(self, line: str) -> None:
        """Show a sentence about the present step."""

    @contextmanager
    def bars(self, began: float | None = None, **totals: tuple[int, str]) -> Iterator[None]:
        """Show a bar for each name while the block runs: `bars(decode=(1494, "clips"))`.

        Args:
            began: Start of the work, by `time.monotonic`, in seconds; by default now.
            totals: The total and the unit of each bar.
        """
        yield

    def advance(self, name: str, count: int, frames: int = 0) -> None:
        """Add `count` units and a number of frames to a bar."""


@dataclass
class _Bar:
    total: int
    unit: str
    began: float
    done: int = 0
    frames: int = 0

    def rate(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-9)
        text = f"{self.done / seconds:.1f} {self.unit}/s"
        return text + (f", {self.frames / seconds:.1f} frames/s" if self.frames else "")


class Lines(Progress):
    """Print plain lines for a log: each bar at most every ten seconds, and when it is full."""

    def __init__(self, out: TextIO | None = None, every_seconds: float = LINE_SECONDS) -> None:
        self.out, self.every_seconds = out or sys.stderr, every_seconds
        self._bars: dict[str, _Bar] = {}
        self._last: dict[str, float] = {}

    def message(self, line: str) -> None:
        print(line, file=self.out, flush=True)

    @contextmanager
    def bars(self, began: float | None = None, **totals: tuple[int, str]) -> Iterator[None]:
        began = time.monotonic() if began is None else began
        self._bars = {n: _Bar(total, unit, began) for n, (total, unit) in totals.items()}
        self._last = dict.fromkeys(totals, time.monotonic())
        yield
        self._bars = {}

    def advance(self, name: str, count: int, frames: int = 0) -> None:
        bar = self._bars.get(name)
        if bar is None or not count:
            return
        bar.done, bar.frames = bar.done + count, bar.frames + frames
        now = time.monotonic()
        if bar.done < bar.total and now - self._last[name] < self.every_seconds:
            return
        self._last[name] = now
        left = (now - bar.began) / bar.done * (bar.total - bar.done)
        rest = f", {clock(left)} left" if left > 0 else ""
        self.message(f"{name}: {bar.done}/{bar.total} {bar.unit}, {bar.rate()}{rest}")


class Bars(Progress):
    """Show live bars with rates and time left, in a terminal or in Jupyter."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        self._bars: dict[str, _Bar] = {}

    def message(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    @contextmanager
    def bars(self, began: float | None = None, **totals: tuple[int, str]) -> Iterator[None]:
        from rich import progress as rich_progress

        columns = (
            rich_progress.TextColumn("{task.description:>8}"),
            rich_progress.BarColumn(),
            rich_progress.TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            rich_progress.TextColumn("{task.fields[rate]}"),
            rich_progress.TimeRemainingColumn(),
        )
        began = time.monotonic() if began is None else began
        with rich_progress.Progress(*columns, console=self._console) as shown:
            self._progress = shown
            for name, (total, unit) in totals.items():
                self._bars[name] = _Bar(total, unit, began)
                self._tasks[name] = shown.add_task(name, total=total, unit=unit, rate="")
            try:
                yield
            finally:
                self._progress, self._tasks, self._bars = None, {}, {}

    def advance(self, name: str, count: int, frames: int = 0) -> None:
        if name not in self._tasks:
            return
        bar = self._bars[name]
        bar.done, bar.frames = bar.done + count, bar.frames + frames
        self._progress.update(self._tasks[name], advance=count, rate=bar.rate())


def default_progress() -> Progress:
    """Return bars where a terminal or a notebook shows them, else lines."""
    from rich.console import Console

    console = Console(stderr=True)
    return Bars() if console.is_terminal or console.is_jupyter else Lines()
