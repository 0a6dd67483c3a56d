"""What GradES costs as a run grows: the record of long runs and of many components, and a step.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --parts history
    python -m benchmarks.scaling --parts steps

**history**: a run is recorded as a trainer does it, with a log every ten steps and a checkpoint every 500 (or 100) of
them. In a process of its own for each size: bytes on disk, CPU time of a recorded check and of a checkpoint's save,
memory beyond that of the process before, and CPU time of what reads the record (`status`, a plot, a resume). Values are
random and nothing freezes, which is the most that a record can hold. "json" is the format of version 0.1, which was
rewritten at each save, measured on a fiftieth of the checks and multiplied.

**steps**: the CPU time of a step beyond the kernels, by components and by the step of the run, for each criterion, with
gradients that change and gradients that are 0; see `benchmarks/scaling_steps.py`.

Writes benchmarks/results/scaling.json; parts that were not run keep their figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# checks, components, steps between two checkpoints
SIZES = ((100_000, 448, 500), (1_200, 10_000, 100))
LOG_EVERY = 10
DRAWN = 1_000  # checks that a plot asks for
JSON_PART = 50


class Options(argparse.Namespace):
    """The options of the command; device and shape are none of them."""

    device, shape = "cpu", "smollm2-135m"


@dataclass(eq=False)
class Made:
    """A component of no model, as far as a record asks."""

    name: str
    layer: int
    group: str = "mlp"
    projection: str = "up"
    tower: str | None = None
    adapter: bool = False
    numel: int = 4096 * 14_336
    monitor: str = "gradient_change"
    tau: float | None = 0.5


def record(checks: int, components: int, every: int, folder: Path) -> dict[str, Any]:
    """The figures of one size, measured in this process."""
    import pyarrow  # noqa: F401  (loaded by `datasets` in any training process)
    import torch

    from grades_hf import History

    made = [Made(f"model.layers.{i // 7}.mlp.experts.{i}.up_proj", i // 7) for i in range(components)]
    names = [component.name for component in made]
    source = torch.Generator().manual_seed(0)
    values = [torch.rand(components, dtype=torch.float64, generator=source) for _ in range(64)]
    found: dict[str, Any] = {"checks": checks, "components": components, "save_every": every}

    def begin() -> Any:
        config = {"alpha": 0.5, "reduction": "sum", "check_every": 1, "tau": 0.5}
        return History.start(made, config, total_steps=checks, t_grace=checks // 2)

    before = memory()
    history = begin()
    history.open(folder)
    saves, recording = [], 0.0
    for step in range(1, checks + 1):
        start = time.process_time()
        history.record(step, names, values[step % 64])
        recording += time.process_time() - start
        if step % LOG_EVERY == 0:
            row = {"step": step, "frozen": 0, "loss": 1 / step, "compute_saved": 0.0, "seconds": step * 0.7654321}
            history.record_log(row)
            history.flush(urgent=False)
        if step % every == 0:
            start = time.process_time()
            history.checksum()  # goes into the checkpoint
            history.flush()
            saves.append(time.process_time() - start)
    found["peak_memory_mb"] = (memory("VmHWM") - before) / 1e6
    history.ended = "completed"
    history.flush()
    found["disk_mb"] = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    found["record_microseconds"] = 1e6 * recording / checks
    found["save_seconds"] = {"median": sorted(saves)[len(saves) // 2], "max": max(saves), "n": len(saves)}
    reading: dict[str, float] = {}
    with cpu(reading, "load"):
        loaded = History.load(folder)
    with cpu(reading, "latest"):
        loaded.latest()
    with cpu(reading, f"sampled({DRAWN})"):
        sum(len(list(series)) for series in loaded.sampled(DRAWN).values.values())
    with cpu(reading, "all values"):
        sum(len(list(series)) for series in loaded.values.values())
    del history, loaded
    before = memory()
    with cpu(reading, "resume"):
        earlier, resumed = History.load(folder), begin()
        earlier.truncate(checks - every // 2)
        resumed.adopt(earlier)
        resumed.open(folder)
    found["resume_memory_mb"] = (memory("VmHWM") - before) / 1e6
    found["reading_seconds"] = reading
    del earlier, resumed
    part = begin()
    for step in range(1, checks // JSON_PART + 1):
        part.record(step, names, values[step % 64])
    old: dict[str, float] = {}
    with cpu(old, "save_seconds"):
        part.save(folder / "h.json")
    size = (folder / "h.json").stat().st_size
    found["json"] = {"save_seconds": JSON_PART * old["save_seconds"], "disk_mb": JSON_PART * size / 1e6}
    return found


def memory(what: str = "VmRSS") -> int:
    """Bytes that this process holds, or (VmHWM) the most it held since the last call with VmRSS."""
    if what == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


@contextmanager
def cpu(into: dict[str, float], name: str) -> Iterator[None]:
    """Note the CPU time of a block."""
    start = time.process_time()
    yield
    into[name] = time.process_time() - start


def history_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The record at each size, in a process of its own."""
    from benchmarks import common

    found = []
    for checks, components, every in SIZES:
        size = [str(max(20, checks // options.divide)), str(components), str(max(10, every // options.divide))]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.scaling", "--record", *size, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        found.append(row)
        common.say(
            f"{row['checks']:,} checks x {row['components']:,}: {row['disk_mb']:.0f} MB on disk (json "
            f"{row['json']['disk_mb']:.0f}), {row['save_seconds']['median']:.3f} s of CPU a save, at most "
            f"{row['save_seconds']['max']:.3f} (json {row['json']['save_seconds']:.1f}), "
            f"{row['peak_memory_mb']:.0f} MB of memory ({row['resume_memory_mb']:.0f} at a resume), "
            f"{row['record_microseconds']:.0f} us a check, sampled in "
            f"{row['reading_seconds'][f'sampled({DRAWN})']:.2f} s"
        )
    return found


def steps_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a step costs, see `benchmarks/scaling_steps.py`; the processes of the other part do not import it."""
    from benchmarks import scaling_steps

    return scaling_steps.steps_part(options)


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {"history": history_part, "steps": steps_part}


def main(argv: list[str] | None = None) -> Path | None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--divide", type=int, default=1, help="divide checks, steps and components by this (for tests)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    parser.add_argument("--record", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv, Options())
    if options.record is not None:
        checks, components, every = map(int, options.record[:3])
        sys.stdout.write(json.dumps(record(checks, components, every, Path(options.record[3]))) + "\n")
        return None
    import torch

    from benchmarks import common

    torch.set_num_threads(options.threads)
    options.output = options.output or common.RESULTS
    del options.record
    file = options.output / "scaling.json"
    results = json.loads(file.read_text(encoding="utf-8"))["results"] if file.is_file() else {}
    for part in options.parts:
        results[part] = {"commit": common.commit(), "figures": PARTS[part](options)}
    path = common.write("scaling", results, options, "pyarrow")
    common.say(f"Written: {path}")
    return path


if __name__ == "__main__":
    main()
