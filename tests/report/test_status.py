"""`grades-hf status`: the view at several widths, and real runs followed by real processes in a real terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from grades_hf import History
from grades_hf.report.status import BARS, STATES, View, show, sparkline
from grades_hf.report.summary import seconds_per_step, sentence
from grades_hf.tools.cli import main

from .histories import changed, history, look, looked, make

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "grades_hf.tools.cli", "status"]
SYMBOLS = {symbol for symbol, _, _ in STATES.values()}


def running() -> History:
    """Step 10 of 12: q froze at step 8 in layer 0, up is near its tau of 2, k far above its tau of 1."""
    run = history(layers=2, projections=("q", "k", "up"), frozen=0.0, steps=10, planned=12)
    levels = {"q": 1.5, "k": 5.0, "up": 3.0}
    ends = {name: 8 if name == "None.0.q.0" else 10 for name in run.values}
    run = changed(run, values={name: [levels[name.split(".")[2]]] * end for name, end in ends.items()})
    run.events = [{"step": 8, "name": "None.0.q.0", "value": 1.5, "tau": 2.0}]
    run.logs = [
        {"step": step, "seconds": seconds, "frozen": int(step >= 8), "loss": loss}
        for step, seconds, loss in ((4, 10.0, 3.0), (8, 18.0, 2.5), (10, 22.0, 2.25))
    ]
    run.savings = {
        "steps": 10, "full": 200.0, "used": 190.0, "weight_gradient": 10.0, "input_gradient": 0.0, "adapter": 0.0,
        "planned": 240.0,
    }  # fmt: skip
    return run


def text(run: History, width: int, age: float | None = None, **options: object) -> str:
    console = Console(width=width, file=io.StringIO(), **options)
    console.print(View(run, age))
    return console.file.getvalue()


def cells(view: str) -> str:
    """The map's cells in reading order, without the legend."""
    lines = view.split("freezing from")[1].split("█ frozen")[0].splitlines()
    return "".join(c for line in lines for c in line.partition(" ")[2] if c in SYMBOLS)


def test_the_sentence():
    run = running()
    assert sentence(run) == (
        "Step 10 of 12: 1 of 6 components are frozen (17% of their parameters), 5.0% of the compute so far saved, "
        "loss 2.25, 2.2 s a step, at most 4 s left."
    )
    run.ended = "converged"
    assert sentence(run) == (
        "Ended by GradES at step 10 of 12: 1 of 6 components are frozen (17% of their parameters), "
        "5.0% of the compute of these steps saved and 20.8% of the planned, loss 2.25, 2.2 s a step."
    )
    run.logs, run.savings, run.ended = [], None, "stopped"
    assert sentence(run) == "Stopped at step 10 of 12: 1 of 6 components are frozen (17% of their parameters)."
    nothing = make(config={}, total_steps=5, t_grace=3, components=[], steps=[], values={}, events=[])
    assert sentence(nothing) == "Step 0 of 5: no look so far."
    nothing.ended = "completed"
    assert sentence(nothing).startswith("Ended after all 5 steps: ")


def test_the_pace_is_that_of_the_last_logs_while_the_run_goes_on():
    run = running()
    run.logs = [{"step": 10 * i, "seconds": 100.0 + i, "frozen": 0} for i in range(1, 21)]
    assert seconds_per_step(run) == pytest.approx(0.1)
    run.ended = "completed"
    assert seconds_per_step(run) == pytest.approx(120 / 200)


def test_each_place_has_the_symbol_of_its_state():
    view = text(running(), 80)
    assert re.search(r"^ +0\nq +█░\nk +··\nup +░░\n", view, re.MULTILINE)
    assert re.search(r"attention +1/4 +5 +5 ", view)
    assert re.search(r"mlp +0/2 +3 +1\.5 ", view)
    assert "gradient_norm, tau 1 to 2, freezing from step 7 of 12 on." in view


def test_a_run_without_a_tau_shows_votes_and_looks():
    view = text(looked(), 100)
    assert "votes ▁▂▃▄▅▆▆▇██ 100% at the last; a look is due at 50%" in view
    assert re.search(r"^ +12 +4 of 6 +128 +2\.5200 +2\.5000 +\+0\.0200 ± 0\.0100 +go on", view, re.MULTILINE)
    assert re.search(r"^ +20 +6 of 6 +128 +2\.4000 +-0\.1200 +2\.6000 +-0\.2000 ± 0\.0100 +end", view, re.MULTILINE)
    assert "its change since the last look" in " ".join(view.split())
    assert "tau" not in view
    assert "frozen" not in view
    assert re.search(r"attention +4 +[\d.]+ +[▁-█]", view)
    going = looked(None)
    for row in going.logs:
        del row["votes"]
    assert "No votes were recorded." in text(going, 80)
    going.looks = [look(12, 2.5, 2.4, False, error=float("inf"))]
    assert "-0.1000 " in text(going, 80)


def test_strange_names_are_shown_and_not_obeyed():
    run = history(layers=1, projections=("q",), frozen=0.0)
    strange = "[red]x[/red]\x1b[2J\x07[/]"
    run.components[0] |= {"projection": strange, "group": strange, "tower": strange, "monitor": strange}
    for tau in (1.0, None):
        run.components[0]["tau"] = tau
        view = text(run, 200)
        assert "\x1b" not in view
        assert "\x07" not in view
        assert "[red]x[/red]\\x1b[2J\\x07[/]" in view


def test_large_models_and_narrow_terminals_show_every_place_once():
    big = history(layers=60, projections=("q", "k", "v", "o", "gate", "up", "down"), frozen=0.4)
    for width in (200, 80, 40, 20):
        view = text(big, width)
        assert max(map(len, view.splitlines())) <= width
        assert len(cells(view)) == 420
        assert cells(view).count("█") == len(big.frozen)
    assert "over the checks" in text(big, 80)
    assert "by tau" in text(big, 40)
    assert "over the checks" not in text(big, 40)


def test_places_with_several_components_and_what_is_outside_of_layers():
    view = text(history(towers=("vision", "language"), layers=2, experts=4, outside=True, frozen=0.5), 80)
    assert len(cells(view)) == 2 * 3 * len({"q", "k", "v", "o", "gate", "up", "down"})
    assert cells(view).count("▄") > 3
    assert view.count("outside of the layers") == 2
    assert {"vision", "language"} <= set(view.splitlines())


def test_without_unicode_and_without_colour():
    plain = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80)
    plain.print(View(running()))
    plain.file.seek(0)
    assert re.search(r"^q +#o\nk +\.\.\nup +oo\n", plain.file.read(), re.MULTILINE)
    coloured = text(running(), 80, force_terminal=True, color_system="standard")
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text(running(), 80)


def test_sparkline():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.0]) == "▁▁"


def test_old_news_is_told_unless_the_run_has_ended():
    run = running()
    assert "Written 2 h 0 min ago: if nothing trains there any more" in text(run, 80, age=7200.0)
    assert "Written" not in text(run, 80, age=5.0)
    run.ended = "completed"
    assert "Written" not in text(run, 80, age=7200.0)


def test_a_missing_or_damaged_record_is_an_error(tmp_path, capsys):
    for damage, message in ((None, "holds no record of GradES; --follow waits"), ("{", "is damaged")):
        if damage:
            (tmp_path / "grades_history.json").write_text(damage)
        with pytest.raises(SystemExit) as ended:
            main(["status", str(tmp_path)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_following_into_a_pipe_gives_a_line_per_change(tmp_path, monkeypatch):
    run, file = running(), tmp_path / "grades_history.json"
    states = [sentence(run)]

    def next_state(seconds: float) -> None:
        if not file.exists():
            run.save(file)
        elif run.ended is None:
            run.ended = "completed"
            run.save(file)
            states.append(sentence(run))

    monkeypatch.setattr("grades_hf.report.status.time.sleep", next_state)
    console = Console(file=io.StringIO(), width=60)
    show(tmp_path, follow=True, console=console)
    lines = console.file.getvalue().splitlines()
    assert lines[:3] == [f"Waiting for a record of GradES in {tmp_path} ...", *states]
    assert "\x1b" not in console.file.getvalue()
    assert len(cells("\n".join(lines))) == 6


# --- real processes ------------------------------------------------------------------------------------------------

TRAIN = """
import sys, time
from transformers import TrainerCallback
from grades_hf import GradESCallback
from tests import small
from tests.small import llama

class Slow(TrainerCallback):
    def on_step_end(self, *_, **__):
        time.sleep(0.4)

callback = GradESCallback(tau={"q": 1e9, ".*": 1e-30}, alpha=0.5)
small.trainer(llama(), sys.argv[1], [callback, Slow()]).train()
"""


class Terminal:
    """A process on a terminal of its own, and what it has written there."""

    def __init__(self, command: list[str], columns: int, rows: int = 30) -> None:
        self.end, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, env=environment(), cwd=ROOT, start_new_session=True
        )
        signal.signal(signal.SIGINT, before)
        os.close(child)
        self.raw = b""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self.end, 65536)
            except OSError:  # EIO: how Linux says that the other end is closed
                return
            self.raw += part

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace")).replace("\r", "")

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < end, f"no {pattern!r} in:\n{self.text[-3000:]}"
            assert self.process.poll() is None or re.search(pattern, self.text), self.text[-3000:]
            time.sleep(0.05)

    def close(self) -> int:
        code = self.process.wait(60)
        self.reader.join(10)
        os.close(self.end)
        return code


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    return kept | {"PYTHONPATH": path, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def training(tmp_path):
    """Starts a run of 12 steps of 0.4 s in `<tmp_path>/run`."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", TRAIN, str(tmp_path / "run")]
        started.append(subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_following_a_run_from_before_its_start_to_its_end(training, tmp_path):
    terminal = Terminal([*COMMAND, str(tmp_path / "run"), "--follow"], columns=60)
    terminal.wait_for(r"Waiting for .*")
    process = training()
    terminal.wait_for(r"Step \d+ of 12: \d+ of 14 components are\s+frozen")
    assert process.poll() is None
    terminal.wait_for(r"2\s+of\s+14\s+components\s+are\s+frozen")
    terminal.wait_for(r"s a step, at most\s+\d+ s left")
    assert process.wait(60) == 0
    assert terminal.close() == 0
    last = terminal.text.split("Ended after all 12 steps")[-1]
    assert "2 of 14 components are frozen" in re.sub(r"\s+", " ", last)
    assert re.search(r"q +██\n", last)
    assert len(cells(last)) == 14
    assert b"\x1b[" in terminal.raw
    assert max(map(len, last.splitlines())) <= 60


@pytest.mark.slow
def test_ctrl_c_ends_following_and_not_the_run(training, tmp_path):
    terminal = Terminal([*COMMAND, str(tmp_path / "run"), "--follow"], columns=80)
    terminal.wait_for(r"Waiting for .*")
    process = training()
    terminal.wait_for(r"Step \d+ of 12")
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.close() == 130
    assert "Traceback" not in terminal.text
    assert b"\x1b[?25h" in terminal.raw, "the cursor is shown again"
    assert process.poll() is None


@pytest.mark.slow
def test_status_into_a_pipe_has_no_control_codes_and_80_columns(tmp_path):
    running().save(tmp_path / "grades_history.json")
    done = subprocess.run([*COMMAND, str(tmp_path)], env=environment(), cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout
    assert done.stdout.decode() == text(running(), 80)
    (tmp_path / "grades_history.json").unlink()
    missing = subprocess.run([*COMMAND, str(tmp_path)], env=environment(), cwd=ROOT, capture_output=True, timeout=120)
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].startswith(b"grades-hf status: error: RUN_DIR=")


def test_bars_of_values_below_0_are_the_lowest():
    assert sparkline([-5.0, -0.5, 0.0, 2.0, 4.0]) == BARS[0] * 3 + BARS[len(BARS) // 2] + BARS[-1]
