"""Rounds of `python -m benchmarks.overhead` with one version of grades_hf, this or an earlier one, in new processes.

The benchmark is that of today, so that both versions are asked the same; of the earlier one only `src/` is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, overhead

STATISTICS = ("gradient_change", "gradient_norm", "weight_change")


def check_out(commit: str, folder: Path) -> str:
    """Put `src/` of a commit of this repository into `folder`; returns the commit's full name.

    Raises:
        ValueError: there is no such commit.
    """
    done = subprocess.run(["git", "rev-parse", f"{commit}^{{commit}}"], cwd=common.PROJECT, capture_output=True)
    if done.returncode:
        raise ValueError(f"--against {commit}: this repository has no such commit. Pass one of `git log`.")
    packed = subprocess.run(["git", "archive", commit, "src"], cwd=common.PROJECT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return done.stdout.decode().strip()


def one_round(folder: Path, options: argparse.Namespace, *, lora: bool) -> dict[str, Any]:
    """One round with the version in `folder`: statistic -> seconds of a step that it takes."""
    names = ("device", "shape", "dtype", "batch", "length", "rank", "threads")
    words = [(f"--{name}", str(value)) for name in names if (value := getattr(options, name)) is not None]
    command = [sys.executable, "-m", "benchmarks.overhead_earlier", *(word for pair in words for word in pair)]
    places = os.pathsep.join([str(folder / "src"), str(common.PROJECT)])
    done = subprocess.run(
        [*command, *(["--lora"] if lora else [])],
        cwd=common.PROJECT,
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not Path(found["package"]).is_relative_to(folder):
        raise RuntimeError(f"--against: the process took {found['package']}, not the version in {folder}.")
    seconds: dict[str, Any] = found["hook_seconds"]
    return seconds


def main() -> None:
    """In the new process: one round, whose figures are the last line."""
    import grades_hf

    parser = common.parser("One round with one version of grades_hf.", rounds=None)
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("grades_hf").setLevel(logging.ERROR)
    # Version 0.1 could leave the counting of FLOPs out, which slows some steps and is no part of what is compared.
    known = {option.name for option in dataclasses.fields(grades_hf.GradESConfig)}
    more = {"count_flops": False} if "count_flops" in known else {}
    every = {"bare": overhead.Way(warmup=1)}
    every |= {name: overhead.Way({"monitor": name, **more}) for name in STATISTICS}
    times = overhead.one_round(every, *overhead.setting(options, lora=options.lora), options.device)
    seconds = {name: statistics.mean(times[name].hook) for name in STATISTICS}
    sys.stdout.write("\n" + json.dumps({"package": grades_hf.__file__, "hook_seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
