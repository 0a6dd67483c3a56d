"""The README's first block with GradES and without, and its picture: `python -m benchmarks.first_run`.

The block runs as it stands. For the run without GradES, and for seeds other than its own, single words of it are
replaced. What came of it goes to benchmarks/results/first_run.json, the picture to docs/first_run.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import common

ROOT = Path(__file__).parents[1]
RESULT, PICTURE = ROOT / "benchmarks" / "results" / "first_run.json", ROOT / "docs" / "first_run.png"
POINTS = 40  # evaluations of the run without GradES, for the curve


def block() -> str:
    """The first Python block of the README."""
    found = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert found is not None
    return found[1]


def replaced(source: str, *changes: tuple[str, str]) -> str:
    """`source` with each pair's first text replaced by its second.

    Raises:
        ValueError: a text does not occur exactly once.
    """
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(f"{old!r} is {source.count(old)} times in the README's first block.")
        source = source.replace(old, new)
    return source


def seeded(seed: int) -> str:
    """The block with another seed; with 0 it is the block itself."""
    return replaced(block(), ("set_seed(0)", f"set_seed({seed})"), ('"run",', f'"run", seed={seed + 42},'))


def run(source: str) -> dict[str, Any]:
    """The namespace that the block leaves, and the `seconds` that its training took."""
    names: dict[str, Any] = {"__name__": "__main__"}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                exec(compile(source, "README.md", "exec"), names)
        finally:
            os.chdir(before)
    log = names["trainer"].state.log_history
    names["seconds"] = next(entry["train_runtime"] for entry in log if "train_runtime" in entry)
    return names


def measure(seed: int) -> dict[str, Any]:
    """One seed, with GradES and without."""
    source = seeded(seed)
    ours = run(source)
    callback = next(c for c in ours["trainer"].callback_handler.callbacks if type(c).__name__ == "GradESCallback")
    plain = run(replaced(source, ("callbacks=[GradESCallback()]", "callbacks=[]")))
    steps = plain["trainer"].state.global_step
    loss: dict[str, float] = {}
    for name, names in (("with", ours), ("without", plain)):
        loss[name] = names["trainer"].evaluate(names["test_dataset"])["eval_loss"]
    return {
        "seed": seed,
        "steps": {"with": ours["trainer"].state.global_step, "without": steps},
        "test loss": loss,
        "seconds": {"with": ours["seconds"], "without": plain["seconds"]},
        "looks": callback.engine.ending.looks,
    }


def curve(seed: int, steps: int) -> list[tuple[int, float]]:
    """Step and test loss of the run without GradES, at POINTS steps."""
    watched = run(
        replaced(
            seeded(seed),
            ("callbacks=[GradESCallback()]", "callbacks=[]"),
            ("eval_dataset=eval_dataset", "eval_dataset=test_dataset"),
            ("use_cpu=True", f'use_cpu=True, eval_strategy="steps", eval_steps={max(1, steps // POINTS)}'),
        )
    )
    return [(e["step"], e["eval_loss"]) for e in watched["trainer"].state.log_history if "eval_loss" in e]


def picture(found: dict[str, Any]) -> Any:
    """Test loss over the steps, where the run with GradES ended, and what each run has saved."""
    import altair as alt

    seed = found["seeds"][0]
    curve = [{"step": step, "loss": loss, "run": "without GradES"} for step, loss in found["curve"]]
    end, last = seed["steps"]["with"], seed["steps"]["without"]
    ours, plain = seed["test loss"]["with"], seed["test loss"]["without"]
    green, grey = "#0b7a4b", "#6b7280"
    x = alt.X(
        "step:Q", title="optimizer step", axis=alt.Axis(tickCount=6, grid=False), scale=alt.Scale(domain=[0, last])
    )
    top = max(plain + 0.2, 3.0)
    y = alt.Y("loss:Q", title="loss on test rows", scale=alt.Scale(domain=[1.8, top], clamp=True))
    line = alt.Chart(alt.Data(values=curve)).mark_line(strokeWidth=2, clip=True)
    both = [
        line.transform_filter(f"datum.step <= {end}").encode(x, y, color=alt.value(green)),
        line.transform_filter(f"datum.step >= {end - last / POINTS}").encode(x, y, color=alt.value(grey)),
    ]
    rule = alt.Chart(alt.Data(values=[{"step": end}])).mark_rule(strokeDash=[4, 4], color=green).encode(x="step:Q")
    ends = [
        {"step": end, "loss": ours, "text": f"with GradES: {ours:.2f}", "color": green, "dx": 8, "dy": 12},
        {"step": last, "loss": plain, "text": f"without: {plain:.2f}", "color": grey, "dx": 4, "dy": -15},
    ]
    marks: list[Any] = []
    for row, align in zip(ends, ("left", "right"), strict=True):
        base = alt.Chart(alt.Data(values=[row])).encode(x, y)
        marks.append(base.mark_point(filled=True, size=90, color=row["color"], opacity=1))
        text = base.mark_text(
            align=align, dx=row["dx"], dy=row["dy"], fontSize=13, fontWeight="bold", color=row["color"]
        )
        marks.append(text.encode(text="text:N"))
    note = {"step": end, "loss": top - 0.08, "text": f"ends at step {end} of {last}"}
    label = alt.Chart(alt.Data(values=[note])).mark_text(align="right", dx=-6, fontSize=13, color=green)
    marks.append(label.encode(x, y, text="text:N"))
    chart = alt.layer(*both, rule, *marks).properties(width=330, height=230, background="white", padding=8)
    return chart.configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal").configure_view(
        stroke=None
    )


def table(found: dict[str, Any]) -> str:
    """The README's table: means over the seeds, with their standard deviation."""

    def cell(kind: str, name: str, form: str) -> str:
        values = [seed[kind][name] for seed in found["seeds"]]
        return f"{mean(values):{form}} ± {stdev(values):{form}}"

    looks = [len(seed["looks"]) for seed in found["seeds"]]
    assert len(set(looks)) == 1, "the row on looks gives one number"
    return "\n".join(
        [
            "| | with GradES | without |",
            "|---|---:|---:|",
            f"| optimizer steps | {cell('steps', 'with', '.0f')} | {found['seeds'][0]['steps']['without']} |",
            f"| looks at up to 128 held-out rows | {looks[0]} | |",
            f"| loss on 256 test rows | **{cell('test loss', 'with', '.2f')}** | "
            f"{cell('test loss', 'without', '.2f')} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--picture", action="store_true", help="draw the picture of the results that there are")
    arguments = parser.parse_args()
    if not arguments.picture:
        began = time.monotonic()
        seeds = [measure(seed) for seed in arguments.seeds]
        command = f"python -m benchmarks.first_run --seeds {' '.join(map(str, arguments.seeds))}"
        found = {
            "command": command,
            "commit": common.commit(),
            "versions": common.versions(),
            "machine": common.machine(),
        }
        found |= {
            "minutes": round((time.monotonic() - began) / 60, 1),
            "seeds": seeds,
            "curve": curve(seeds[0]["seed"], seeds[0]["steps"]["without"]),
        }
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    picture(found).save(str(PICTURE), scale_factor=2)
    sys.stdout.write(f"{table(found)}\n")


if __name__ == "__main__":
    main()
