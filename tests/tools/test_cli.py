"""The command `grades-hf`: it answers at once, names the nearest command and option, and never ends in a traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grades_hf import GradESConfig, __version__
from grades_hf.tools import cli
from tests.report.histories import history, looked

HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "altair"}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = history(frozen=0.0, steps=24)
    run.config = GradESConfig(tau=1e-30).to_dict()
    run.shares = dict.fromkeys(run.values, 0.01)
    run.save(tmp_path / "grades_history.json")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [["--help"], ["--version"], ["options"], ["status", "RUN"], ["suggest", "RUN", "--target-compute", "0.7"]],
    ids=lambda command: command[0],
)
def test_what_is_asked_for_often_imports_little(command: list[str], folder: Path) -> None:
    """That is what makes it fast; time itself depends on the machine."""
    code = (
        "import sys\nfrom grades_hf.tools.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"found = {sorted(HEAVY)!r}\n"
        "sys.exit(', '.join(name for name in found if name in sys.modules) or 0)"
    )
    argv = [str(folder) if word == "RUN" else word for word in command]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"imports {done.stderr}"
    assert done.stderr == "", "nothing has anything to say"
    assert done.stdout


def test_a_report_imports_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; from grades_hf.tools.cli import main; main(sys.argv[1:]); "
        "sys.exit(bool({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, "report", str(folder), "-o", str(folder / "page.html")]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["statsu", "x"], "unknown command statsu; did you mean status?"),
        (["xyzzy"], "unknown command xyzzy; there are status, report, suggest, inspect, options."),
        (["status", "x", "--folow"], "unknown option --folow; did you mean --follow?"),
        (["status", "x", "--folow=1"], "unknown option --folow=1; did you mean --follow?"),
        (["report", "x", "--outptu", "y"], "unknown option --outptu; did you mean --output?"),
        (["status", "a", "b"], "b is too much"),
        (["status"], "required: RUN_DIR"),
        (["options", "alhpa"], "GradESConfig has no option alhpa; did you mean alpha?"),
        (["status", "/nowhere\x1b[2J"], "/nowhere"),
    ],
)
def test_what_is_misspelt_is_named_with_the_nearest(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(argv, capsys)
    assert message in line
    assert line.startswith("grades-hf")
    assert "\x1b" not in line


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"grades-hf {__version__}\n"


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["options"]) == 0
    text = capsys.readouterr().out
    assert all(f"{option.name}  (default: {option.default!r})" in text for option in dataclasses.fields(GradESConfig))
    assert max(map(len, text.splitlines())) <= 100
    assert cli.main(["options", "tau"]) == 0
    assert capsys.readouterr().out.startswith("tau  (default: None)\n    Threshold on the statistic")


# --- files from elsewhere ----------------------------------------------------------------------------------------

SAVINGS = ("steps", "full", "used", "weight_gradient", "input_gradient", "adapter", "planned")
COMMANDS = (["status", "RUN"], ["suggest", "RUN", "--target-compute", "0.7"], ["report", "RUN", "-o", "OUT"])


def change(data: dict[str, Any], path: str, value: Any) -> None:
    *parts, last = path.split(".")
    at: Any = data
    for part in parts:
        at = at[int(part) if isinstance(at, list) else part]
    at[int(last) if isinstance(at, list) else last] = value


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("components.0.projection", "\x1b[2J<script>alert(1)</script>[bold]"),
        ("components.0.group", "\x1b[2J<script>alert(1)</script>[/]"),
        ("components.0.tower", "\x1b]0;x\x07"),
        ("components.0.monitor", "\x1b[31m"),
        ("config", {"tau": 1.0, "\x1b[2J": "<script>alert(1)</script>"}),
        ("versions", {"\x1b[2J": "<script>alert(1)</script>"}),
        ("total_steps", 1),
        ("savings", dict.fromkeys(SAVINGS, 0.0)),
        ("components.0.numel", 0),
        ("logs", [{"step": 3, "seconds": 9.0, "frozen": 0, "loss": None}, {"step": 3, "seconds": 1.0, "frozen": 0}]),
        ("shares", {}),
    ],
)  # fmt: skip
def test_strange_records_do_no_harm(
    path: str, value: Any, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    if command[0] == "report":
        import vl_convert

        monkeypatch.setattr(vl_convert, "javascript_bundle", lambda snippet: "")
    run = history(layers=1, projections=("q", "up"), frozen=0.0, steps=24)
    run.config = GradESConfig(tau=1e-30).to_dict()
    run.shares = dict.fromkeys(run.values, 0.01)
    data = run.to_dict()
    change(data, path, value)
    (tmp_path / "grades_history.json").write_text(json.dumps(data), encoding="utf-8")
    names = {"RUN": str(tmp_path), "OUT": str(tmp_path / "page.html")}
    with contextlib.suppress(SystemExit):
        assert cli.main([names.get(word, word) for word in command]) == 0
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) <= 1
    page = (tmp_path / "page.html").read_text(encoding="utf-8") if (tmp_path / "page.html").exists() else ""
    assert not {"\x1b", "\x07"} & set(captured.out + captured.err + page)
    assert "<script>alert" not in page


DAMAGED = ("", "{", "[]", "null", '{"format": 99}', "[" * 100_000, "\x1b[2J", '{"format": 1, "config": 3}')


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_records_end_in_one_line(
    content: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grades_history.json").write_text(content, encoding="utf-8")
    line = refused([{"RUN": str(tmp_path), "OUT": str(tmp_path / "page.html")}.get(w, w) for w in command], capsys)
    assert line.startswith(f"grades-hf {command[0]}: error: ")


def test_a_run_without_a_tau_through_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vl_convert

    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda snippet: "")
    looked().save(tmp_path / "grades_history.json")
    assert cli.main(["status", str(tmp_path)]) == 0
    assert "2 looks at held-out rows" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    capsys.readouterr()
    assert "only the second matrix" in refused(["suggest", str(tmp_path), "--target-compute", "0.7"], capsys)
