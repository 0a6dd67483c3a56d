"""Write docs/benchmarks.md (`python -m benchmarks.page`): the tables of benchmarks/results, and nothing typed by hand.

Also fills in the measured figures of docs/method_card.md and the tables of docs/studies.md and docs/criteria.md, which
stand between `<!-- KEY -->` and `<!-- -->` there, and draws the figure of the race.
"""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

from benchmarks import race_page
from benchmarks.internals import EARLIEST, LATER, MOST
from benchmarks.race_tasks import SETTINGS

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
PAGE, CARD, STUDIES = DOCS / "benchmarks.md", DOCS / "method_card.md", DOCS / "studies.md"
CRITERIA = DOCS / "criteria.md"

HEADER = """# Benchmarks

What this means for you:

- **Watching costs little.** Reading all gradients of a model adds a few percent to a step of full fine-tuning, and
  about half a percent with LoRA. `check_every=10` or `sample_size=1024` make it a fraction of that.
- **Freezing saves less than one would think**, because a frozen matrix still takes part in the forward pass and passes
  gradients on. `freeze_prefix=True` saves more. With LoRA there is little to save.
- **Freezing saves memory**: gradients and optimizer state of what is frozen are gone.

The last two are about the paper's method, with a tau. What ending a run saves, and what it costs in quality, is on the
page [Without a tau](criteria.md).

Made by `python -m benchmarks.page` from `benchmarks/results/*.json`; the tests check that it is up to date. Each part
names its command, commit and machine. Nothing here was measured on a GPU. Ratios compare runs side by side in one
process; the spread is that of the rounds. *Peer* is the PyPI package `grades`, another implementation of the paper.
"""


def load(name: str) -> dict[str, Any]:
    """One file of benchmarks/results."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def origin(found: dict[str, Any]) -> str:
    """Command, commit, machine and versions, as one paragraph."""
    machine, versions = found["machine"], found["versions"]
    return (
        f"`{found['command']}` at commit {found['commit'][:7]}, {machine['threads']} thread of an {machine['cpu']} "
        f"({machine['system']}), {', '.join(f'{name} {version}' for name, version in versions.items())}.\n"
    )


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns to the left, the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows]) + "\n"


def percent(value: float) -> str:
    """Two significant digits below 1 %, one decimal above."""
    return f"{100 * value:.2f} %" if value < 0.01 else f"{100 * value:.1f} %"


def spread(found: dict[str, float], form: Any) -> str:
    """Median and range."""
    return f"{form(found['median'])} ({form(found['min'])} to {form(found['max'])})"


def ratio(value: float) -> str:
    return f"{value:.3f}"


def overhead() -> str:
    found = load("overhead")
    parts = [
        "## What watching costs\n",
        "What monitoring adds to a bare step of SmolLM2-135M's shape, as a part of that step, and what it keeps in "
        "memory from step to step, as a part of the model. Median, and range in brackets. *limit*: how many times as "
        "long as PyTorch takes to read the two tensors once. FLOP counting is not in it; it slows at most one step in "
        "25 on average. *default* is a run without a tau: the statistic at each step, and the update of the moving "
        "average of the weights, spread over the steps from one to the next as in a run of 1000 steps (in a longer "
        "one it is rarer). It keeps the average. Its looks are told apart.\n",
        origin(found),
    ]
    for mode, rows in found["results"].items():
        lines = [
            [
                WAYS.get(name, f"`{name}`"),
                spread(row["hook_share"], percent),
                percent(row["kept_share_of_model"]) if row["kept_bytes"] else "nothing",
                spread(row["over_bandwidth_limit"], lambda x: f"{x:.1f}") if "over_bandwidth_limit" in row else "",
            ]
            for name, row in rows.items()
            if name != "bare"
        ]
        least = min((row["hook_share"]["median"], name) for name, row in rows.items() if name not in ("bare", "peer"))
        paper = "gradient_change" if mode == "full" else "gradient_norm"
        takeaway = (
            f"The paper's statistic, `{paper}`, adds {percent(rows[paper]['hook_share']['median'])} to a step; "
            f"the cheapest way, `{least[1]}`, adds {percent(least[0])}.\n"
        )
        parts += [f"### {TITLES[mode]}\n", takeaway, table(["monitoring", "part of a step", "kept", "limit"], lines)]
        if "default" in rows:
            parts.append(looks(rows["default"]))
    if any("earlier_hook_share" in row for rows in found["results"].values() for row in rows.values()):
        parts.append(versions(found["results"], found["command"].partition("--against ")[2][:7]))
    return "\n".join(parts)


def looks(row: dict[str, Any]) -> str:
    """What looks cost, in a few sentences; how many there are is reckoned with the rule's own numbers."""
    number, steps = looks_due(), row["look_steps"]["median"]
    return (
        f"Without a tau, a pass over {row['look_rows']} held-out rows (eight at once, each as long as those that are "
        f"trained on) takes as long as {steps:.0f} of these small steps. A look takes a quarter of such a pass where "
        f"the run clearly learns, and at most two passes. In the runs of the race that went on to their end it took "
        f"{passes():.2f} of a pass on average. About {number} looks are due in such a run, and at most {MOST} are "
        f"made. {number} average looks take {percent(looks_share(row, 1_000))} of a run of 1,000 such steps, and "
        f"{percent(looks_share(row, 10_000))} of one of 10,000.\n"
    )


def looks_due() -> int:
    """How many looks a run has that goes on to its end, with no proposal of the gradients."""
    return 1 + int(math.log(1 / EARLIEST) / math.log(LATER))


def looks_share(row: dict[str, Any], run: int) -> float:
    """The part of a run of so many steps that those looks take, each as many passes as in the mean of the race."""
    return float(looks_due() * passes() * row["look_steps"]["median"] / run)


def enough(row: dict[str, Any], goal: float) -> str:
    """How many steps a run must have for statistic, average and looks to take no more than this part of it."""
    left = goal - row["hook_share"]["median"]
    return f"{math.ceil(looks_share(row, 1_000) / left):,},000" if left > 0 else "no number of"


def passes() -> float:
    return race_page.passes(load("race")["results"]["runs"])


def versions(results: dict[str, Any], commit: str) -> str:
    """The table of version 0.1, this one and the peer."""
    lines, slower, count = [], [], 0
    for mode, rows in results.items():
        for name, row in rows.items():
            if "earlier_hook_share" not in row:
                continue
            count += 1
            peer = rows.get("peer") if name == "weight_change" else None
            lines.append(
                [
                    TITLES[mode],
                    f"`{name}`",
                    spread(row["earlier_hook_share"], percent),
                    spread(row["now_hook_share"], percent),
                    "" if peer is None else spread(peer["hook_share"], percent),
                ]
            )
            if row["now_hook_share"]["median"] > row["earlier_hook_share"]["max"]:
                slower.append(f"`{name}` ({TITLES[mode]})")
    worse = f"these are larger than in version 0.1: {', '.join(slower)}" if slower else "none is larger than before"
    takeaway = f"Of {count} figures {worse}. Version 0.1 is commit {commit}.\n"
    return "\n".join(
        [
            "### Version 0.1, this one and the peer\n",
            takeaway,
            "Part of the same bare step, in rounds by turns, each version in new processes. Larger: the median is "
            "above all that version 0.1 took. The peer thresholds `weight_change` only.\n",
            table(["training", "statistic", "version 0.1", "this version", "peer"], lines, left=2),
        ]
    )


def scaling() -> str:
    """What a long run's record and a step with many components cost."""
    found = load("scaling")
    parts = ["## As a run grows\n"]
    rows = found["results"]["history"]["figures"]
    lines = [
        [
            f"{row['checks']:,} x {row['components']:,}",
            f"{row['disk_mb']:.0f} MB",
            f"{row['json']['disk_mb']:.0f} MB",
            f"{row['save_seconds']['median']:.3f} s (at most {row['save_seconds']['max']:.3f})",
            f"{row['json']['save_seconds']:.1f} s",
            f"{row['peak_memory_mb']:.0f} MB",
        ]
        for row in rows
    ]
    takeaway = (
        f"A checkpoint's save of the record takes at most {max(row['save_seconds']['max'] for row in rows):.3f} s of "
        f"CPU time and the record at most {max(row['peak_memory_mb'] for row in rows):.0f} MB of memory, however long "
        "the run.\n"
    )
    header = ["checks x components", "on disk", "as JSON", "a save", "as JSON", "memory"]
    parts += ["### The record\n", takeaway, origin_of_part(found, "history"), table(header, lines)]
    if "steps" in found["results"]:
        parts += steps(found)
    return "\n".join(parts)


def origin_of_part(found: dict[str, Any], part: str) -> str:
    """The same of a part that may have been run apart from the others."""
    commit = found["results"][part]["commit"]
    return origin(found | {"command": f"python -m benchmarks.scaling --parts {part}", "commit": commit})


def steps(found: dict[str, Any]) -> list[str]:
    """What a step costs by components, criterion, gradients and the step of the run."""
    figures: list[dict[str, Any]] = found["results"]["steps"]["figures"]
    named = ("components", "criterion", "statistic", "gradients")
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in figures:
        groups.setdefault(tuple(row[key] for key in named), {})[row["step"]] = row
    at = sorted({row["step"] for row in figures})
    lines = [
        [
            f"{key[0]:,}",
            f"{key[1]}, `{key[2]}`",
            key[3],
            *(f"{group[step]['step_ms']:.2f}" for step in at),
            f"{max(row['without_ms'] for row in group.values()):.2f}",
            f"{max(row['beyond_ms'] for row in group.values()):+.2f}",
        ]
        for key, group in groups.items()
    ]
    most = max(row["components"] for row in figures)
    beyond = max(row["beyond_ms"] for row in figures if row["components"] == most)
    growth = [group[at[-1]]["step_ms"] / group[at[0]]["step_ms"] for key, group in groups.items() if key[0] == most]
    more = f"at most {beyond:.1f} ms more CPU time" if beyond > 0 else f"at least {-beyond:.1f} ms less CPU time"
    takeaway = (
        f"With {most:,} components a step takes {more} than a bare loop over the same tensors. At step {at[-1]:,} it "
        f"takes {min(growth):.2f} to {max(growth):.2f} times as much as at step {at[0]:,}.\n"
    )
    header = ["components", "criterion", "gradients", *(f"step {step:,}" for step in at), "bare", "more"]
    return [
        "### A step\n",
        takeaway,
        "Milliseconds of CPU time of a step (forward and backward of a tiny head, `engine.step()`, the record in a "
        "file and a log every ten steps) for matrices of 4 x 4 elements, by the step of the run. *bare*: the same "
        "without GradES, and a loop that takes the sum of absolute values of each tensor. *more*: the most that a step "
        "takes more than that; less than 0 where GradES, which takes small tensors together, is faster.\n",
        origin_of_part(found, "steps"),
        table(header, lines, left=3),
    ]


GOALS = {"full": 0.03, "lora": 0.01}  # the part of a run that a run without a tau may take more, at most
WAYS = {"peer": "peer: PyPI package `grades`", "default": "default, no tau (looks not included)"}
TITLES = {"full": "All weights", "lora": "LoRA of rank 16 on all linear layers"}


def step_cost() -> str:
    found = load("step_cost")
    parts = [
        "## What a step costs when parts are frozen\n",
        "SmolLM2-135M's shape, batch 1 x 64, LM head included, as a part of the step with nothing frozen. FLOPs are "
        "counted and exact; times are medians with their range, on a machine that did other things as well. *cut*: "
        "with `freeze_prefix`; *merged*: with `merge_frozen_adapters`.\n",
        origin(found),
    ]
    for setting, rows in found["results"].items():
        method, _, checkpointing = setting.partition(", checkpointing ")
        title = TITLES[method] + ("" if checkpointing == "none" else f", {checkpointing} checkpointing")
        lines = [
            [name, ratio(row["flops_ratio"]), spread(row["time_ratio"], ratio) if "time_ratio" in row else ""]
            for name, row in rows.items()
        ]
        least = min((row["flops_ratio"], name) for name, row in rows.items() if name != "forward pass alone")
        forward = rows["forward pass alone"]["flops_ratio"]
        takeaway = (
            f"The most that was saved: {ratio(least[0])} of the FLOPs are left with {least[1]} ({ratio(forward)} is "
            "the forward pass).\n"
        )
        parts += [f"### {title}\n", takeaway, table(["frozen", "FLOPs", "time"], lines)]
    return "\n".join(parts)


def memory() -> str:
    found = load("memory")
    parts = [
        "## Memory\n",
        "Peak of one step in MB (10^6 bytes): weights, gradients, optimizer state, and what the monitor keeps.\n",
        origin(found),
    ]
    for mode, rows in found["results"].items():
        states = list(next(row for name, row in rows.items() if name != "no monitoring"))
        lines = [
            [
                "peer: PyPI package `grades`" if name == "peer" else name if name == "no monitoring" else f"`{name}`",
                *(f"{row[state]['peak'] / 1e6:.0f}" if state in row else "" for state in states),
            ]
            for name, row in rows.items()
        ]
        frozen = [f"frozen: {state}" for state in states]
        bare = rows["no monitoring"][states[0]]["peak"]
        ours = rows["gradient_change" if mode == "full" else "gradient_norm"]
        takeaway = (
            f"With the paper's statistic the peak is {ours[states[0]]['peak'] / bare:.2f} of that without GradES while "
            f"nothing is frozen, and {ours[states[-1]]['peak'] / bare:.2f} with all matrices frozen.\n"
        )
        parts += [f"### {TITLES[mode]}, peak\n", takeaway, table(["monitoring", *frozen], lines)]
    return "\n".join(parts)


def sampling_error() -> str:
    found = load("sampling_error")
    lines = [
        [
            f"`{name.split(', ')[0]}`",
            name.split(", ")[1].split()[0],
            *(percent(row[k]) for k in ("median", "p90", "worst")),
        ]
        for name, row in found["results"].items()
    ]
    bound = max(row["p90"] for name, row in found["results"].items() if name.split(", ")[1].split()[0] == "1024")
    return "\n".join(
        [
            "## The error of a sample\n",
            f"With 1024 elements the error is below {percent(bound)} for nine of ten matrices.\n",
            "Relative error (root mean square over samples) of the statistic with `sample_size`, over the matrices of "
            "SmolLM2-135M-Instruct on 8 rows of Social IQa.\n",
            origin(found),
            table(["monitor", "elements", "median matrix", "nine of ten below", "worst"], lines),
        ]
    )


def figures() -> dict[str, str]:
    """The measured figures of the method card, by key."""
    watching, cost = load("overhead")["results"], load("step_cost")["results"]
    top = "all but the top block, cut"
    return {
        **{f"default_{mode}": percent(rows["default"]["hook_share"]["median"]) for mode, rows in watching.items()},
        **{f"looks_{mode}": percent(looks_share(rows["default"], 10_000)) for mode, rows in watching.items()},
        **{f"enough_{mode}": enough(rows["default"], GOALS[mode]) for mode, rows in watching.items()},
        "top_block": ratio(cost["full, checkpointing none"][top]["flops_ratio"]),
        "top_block_checkpointing": ratio(cost["full, checkpointing non-reentrant"][top]["flops_ratio"]),
        "forward": ratio(cost["full, checkpointing none"]["forward pass alone"]["flops_ratio"]),
    }


def render() -> str:
    """The whole page of benchmarks."""
    return "\n".join([HEADER, overhead(), scaling(), step_cost(), memory(), sampling_error()])


def study(name: str) -> str:
    """The table of a study, from the comparison.csv of its grid."""
    with open(RESULTS / name / "comparison.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    full = next(float(row["training FLOPs"]) for row in rows if row["arm"] == "none")
    quality = next(column for column in rows[0] if column.endswith(" loss") and not column.startswith("average"))
    lines = []
    for row in rows:
        training, validation = float(row["training FLOPs"]), float(row["validation FLOPs"])
        lines.append(
            [
                f"`{row['arm']}`",
                f"{float(row[quality]):.4f} ± {float(row[f'{quality} standard error']):.4f}",
                f"{float(row['steps']):.0f} of {float(row['steps planned']):.0f}",
                ratio((training + validation) / full),
                ratio(validation / full) if validation else "",
            ]
        )
    heads = ["arm", f"loss, mean of {rows[0]['seeds']} seeds", "steps", "compute", "of it validation"]
    return f"\n\n{table(heads, lines)}\n"


def studies() -> dict[str, str]:
    """The tables of docs/studies.md, by key."""
    return {folder.name: study(folder.name) for folder in sorted(RESULTS.glob("study_*"))}


def race() -> dict[str, str]:
    """The tables of docs/criteria.md, by key."""
    found = load("race")
    rows, runs = found["results"]["arms"], found["results"]["runs"]
    outcomes, full = race_page.outcomes(rows), race_page.full_budget(rows, "loss")
    accuracies = race_page.accuracies(outcomes, race_page.full_budget(rows, "accuracy"))
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(run["command"] for run in runs))
    commits = ", ".join(sorted({run["commit"][:7] for run in runs}))
    values = {
        "race_meaning": race_page.meaning(rows),
        "race_origin": origin(found | {"command": "?", "commit": "!"}).replace("`?`", commands).replace("!", commits),
        "race_extent": race_page.extent(rows, list(SETTINGS)),
        "race_goals": race_page.goal_lines(rows),
        "race_worst": table(*race_page.worst(outcomes)),
        "race_accuracy": table(*accuracies),
        "race_ends": table(*race_page.ends(outcomes)),
        "race_arms": table(["arm", "what it is"], [list(pair) for pair in race_page.ARMS.items()], left=2),
    }
    parts = []
    for family in dict.fromkeys(setting.family for setting in SETTINGS.values()):
        own = [name for name, setting in SETTINGS.items() if setting.family == family and name in outcomes]
        if own:
            parts.append(f"#### {family}\n\n{table(*race_page.losses(outcomes, own, full))}")
    values["race_losses"] = "\n".join(parts)
    return {key: f"\n\n{text}\n" for key, text in values.items()}


def fill(text: str, values: dict[str, str]) -> str:
    """The page `text` with `values` in their places.

    Raises:
        ValueError: a value has none.
    """
    for key, value in values.items():
        filled = f"<!-- {key} -->{value}<!-- -->"
        text, count = re.subn(f"<!-- {key} -->.*?<!-- -->", lambda _, filled=filled: filled, text, flags=re.DOTALL)
        if not count:
            raise ValueError(f"there is no place for {key}: <!-- {key} --><!-- -->.")
    return text


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    for path, values in ((CARD, figures()), (STUDIES, studies()), (CRITERIA, race())):
        path.write_text(fill(path.read_text(encoding="utf-8"), values), encoding="utf-8")
    race_page.figure(load("race")["results"]["arms"], RESULTS / "race")
