import io
import os
import pty
import subprocess
import sys
import time

import pytest

from varve.pipeline.progress import Lines, Progress

SHOW = """
import time
from varve.pipeline.progress import default_progress
progress = default_progress()
progress.message("begun [bold]as it is[/bold]")
with progress.bars(decode=(20, "clips")):
    for _ in range(20):
        time.sleep(0.02)
        progress.advance("decode", 1, 8)
print(type(progress).__name__)
"""


def test_a_log_gets_a_line_when_a_bar_is_full_and_no_more_than_requested():
    out = io.StringIO()
    lines = Lines(out, every_seconds=3600)
    with lines.bars(decode=(3, "clips"), write=(6, "cells")):
        lines.advance("decode", 2, 16)
        lines.advance("decode", 1, 8)
        lines.advance("write", 0)
        lines.advance("unknown", 1)
    (line,) = out.getvalue().splitlines()
    assert line.startswith("decode: 3/3 clips, ")
    assert line.endswith("frames/s")


def test_a_log_reports_the_remaining_time():
    out = io.StringIO()
    lines = Lines(out, every_seconds=0)
    with lines.bars(forward=(1000, "clips")):
        lines.advance("forward", 1)
    assert out.getvalue().rstrip().endswith("left")


def test_a_rate_is_of_the_time_since_the_work_started():
    """A task's bar comes with its first epoch, when that is done already."""
    out = io.StringIO()
    lines = Lines(out)
    with lines.bars(time.monotonic() - 10, task=(1, "epochs")):
        lines.advance("task", 1)
    assert out.getvalue().startswith("task: 1/1 epochs, 0.1 epochs/s")


def test_the_silent_watch_takes_everything():
    progress = Progress()
    with progress.bars(decode=(1, "clips")):
        progress.advance("decode", 1)
        progress.message("nothing")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_bars_and_a_pipe_gets_lines(terminal):
    command = [sys.executable, "-c", SHOW]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    if terminal:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        text = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:
                break
            if not chunk:
                break
            text += chunk
        os.close(ours)
        process.wait()
        shown = text.decode()
    else:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        shown = done.stdout + done.stderr
    assert "begun [bold]as it is[/bold]" in shown
    assert "20/20 clips" in shown
    assert ("Bars" in shown) == terminal
    assert ("━" in shown) == terminal
