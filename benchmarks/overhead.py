"""What monitoring costs: `python -m benchmarks.overhead` measures bare steps, ours and the peer's side by side.

The setting: fine-tuning, all weights or a LoRA, of a random model of a real shape with AdamW. A round runs a few steps
with each way of monitoring, in alternating order, on the same model. The time of monitoring is that of
`engine.step()`, or of the peer's callback; the time of a step is that of a bare one in the same round. Nothing freezes.

`default` is a run without a tau: the statistic at each step, and the average of the weights, which is updated at every
k-th step, over k steps, so that its update is in it as in a run of RUN steps. Its looks at held-out rows are told
apart: what one costs in steps, measured on a few rows of the length of those that are trained on.

With `--against COMMIT` each round is also made with that version of grades_hf and with this one, each in a new process,
by turns. Their times are divided by the same bare step, since the first steps of a process are slower.

The memory-bandwidth limit is the time in which all watched gradients and those of the step before are read once, by
`sum()`, in the same steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState

from benchmarks import common
from grades_hf import GradES, GradESConfig

NEVER = 1e-30  # a threshold that nothing falls below
MEASURED = 2
RUN = 1000  # steps of the run that is measured a few steps of
LOOK_ROWS = 16  # rows of the look that is measured, of ...
ALL_ROWS = 128  # ... those of a look by default
DEFAULT = "default"


@dataclass(frozen=True)
class Way:
    """One way of monitoring: ours with these options, the peer, or none.

    Attributes:
        options: Options of `GradESConfig`; None for no engine.
        peer: Whether the peer's callback runs.
        tau: Whether the run has a tau.
        warmup: Steps until it works as in all later ones.
        measured: Steps that are measured.
    """

    options: dict[str, Any] | None = None
    peer: bool = False
    tau: bool = True
    warmup: int = 2
    measured: int = MEASURED


@dataclass
class Times:
    """Seconds, one entry a measured step."""

    step: list[float] = field(default_factory=list)
    hook: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    look: list[float] = field(default_factory=list)  # of ALL_ROWS rows
    kept: int = 0  # bytes from one step to the next


def ways(options: argparse.Namespace, *, lora: bool) -> dict[str, Way]:
    """All ways of monitoring, by name."""
    first = "gradient_norm" if lora else "gradient_change"
    result = {"bare": Way(warmup=1)}
    for monitor in ("gradient_change", "gradient_norm", "weight_change"):
        result[monitor] = Way({"monitor": monitor})
    # Ten steps, of which one makes a check and the one before keeps what it compares with; not the run's first ten, in
    # which gradients are copied once to learn whether they may be kept.
    result[f"{first}, check_every=10"] = Way({"monitor": first, "check_every": 10}, warmup=10, measured=10)
    # The first update makes the average; those after it come every RUN / 200 steps.
    result[DEFAULT] = Way({"look_rows": LOOK_ROWS}, tau=False, warmup=2, measured=RUN // 200)
    if not lora:
        for monitor in ("gradient_change", "gradient_norm", "weight_change"):
            sampled = {"monitor": monitor, "sample_size": options.sample_size}
            result[f"{monitor}, sample_size={options.sample_size}"] = Way(sampled)
    if torch.device(options.device).type != "cpu":
        result[f"{first}, delay_transfer"] = Way({"monitor": first, "delay_transfer": True})
    if not options.no_peer:
        result["peer"] = Way(peer=True)
    return result


def peer_callback(steps: int) -> Any:
    """The callback of the package `grades`, of which nothing freezes.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the benchmarks compare with the package grades: pip install -c constraints.txt -e '.[benchmarks]', or "
            "leave it out with --no-peer."
        ) from error
    return GradEarlyStoppingCallback(config=GradEarlyStoppingConfig(tau=NEVER, alpha=(steps - 1) / steps))


@dataclass
class Hooks:
    """What monitoring adds to a step.

    Attributes:
        before: To call before the update.
        look: The same at a step with a look at held-out rows; returns how often these pass through the model.
        after: To call at the end of the step.
        kept: Bytes that are kept from one step to the next.
        watched: The parameters that are monitored; empty for the peer's.
        callback: The peer's.
    """

    before: Callable[[], Any] | None = None
    look: Callable[[], int] | None = None
    after: Callable[[], None] | None = None
    kept: Callable[[], int] = lambda: 0
    watched: Sequence[Tensor] = ()
    callback: Any = None


@contextmanager
def monitoring(
    way: Way, model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> Iterator[Hooks]:
    """Monitor `model` in this way for a while."""
    if way.options is not None:
        config = GradESConfig(**({"tau": NEVER} if way.tau else {}) | way.options)
        more: dict[str, Any] = {} if way.tau else {"held_out": held_out(batch)}
        engine = GradES(model, config, total_steps=RUN, optimizer=optimizer, **more)

        def look() -> int:
            engine.t = max(RUN // 2, int(1.4 * engine.t))  # one is due
            before = len(engine.ending.looks)
            engine.step(epoch=1.0)
            if len(engine.ending.looks) == before:
                raise RuntimeError("no look at held-out rows was made where one was to be measured.")
            return 1 + (engine.ending.looks[-1]["loss"] is not None)

        yield Hooks(
            # The first pass over the data, in which there are no looks.
            before=engine.step if way.tau else lambda: engine.step(epoch=0.5),
            look=None if way.tau else look,
            kept=lambda: kept_by(engine),
            watched=[parameter for component in engine.components for parameter in component.measured],
        )
        engine.close()
    elif way.peer:
        callback, state, control = peer_callback(RUN), TrainerState(max_steps=RUN), TrainerControl()
        arguments: Any = SimpleNamespace(output_dir=None)
        callback.on_train_begin(arguments, state, control, model=model)

        def after() -> None:
            state.global_step += 1
            callback.on_step_end(arguments, state, control, model=model)

        yield Hooks(after=after, kept=lambda: cached_bytes(callback), callback=callback)
    else:
        yield Hooks()


def held_out(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Rows to look at, of the length of those that are trained on."""
    return [{key: value[0] for key, value in batch.items()} for _ in range(LOOK_ROWS)]


def kept_by(engine: Any) -> int:
    """Bytes that an engine keeps from one step to the next; version 0.1 says how many its statistics keep."""
    if not hasattr(engine, "statistics"):
        return sum(monitor.nbytes for monitor in engine.monitors.values())
    average = [tensor.nbytes for tensor in engine.tensors().get("average", {}).values()]
    return sum(map(kept_bytes, engine.statistics.values())) + sum(average)


def kept_bytes(statistic: Any) -> int:
    """Bytes that a statistic keeps from one step to the next: what it compares with, and the places of its sample."""
    kept = sum(tensor.nbytes for tensor in statistic.previous.values())
    return int(kept + (0 if statistic.sampler is None else statistic.sampler.nbytes))


def cached_bytes(callback: Any) -> int:
    """Bytes of the weights that the peer's callback has copied."""
    caches = [stats.weight_cache for stats in callback.component_stats.values() if stats.weight_cache is not None]
    return sum(t.nbytes for cache in caches for t in (cache.values() if isinstance(cache, dict) else [cache]))


def run(
    way: Way, model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], device: str, times: Times
) -> None:
    """A few steps in this way.

    On an accelerator the monitoring of the last step alone is timed by itself, since waiting for it on both sides makes
    the step longer.
    """
    on_cpu = torch.device(device).type == "cpu"
    number = way.warmup + way.measured
    with monitoring(way, model, optimizer, batch) as hooks:
        for index in range(number):
            measured = index >= way.warmup
            alone = measured and (on_cpu or index == number - 1)
            common.synchronize(device)
            start, hook = time.perf_counter(), 0.0
            model(**batch).loss.backward()
            if hooks.before is not None:
                hook += _call(hooks.before, device if alone else None)
                if alone and way.options == {"monitor": "gradient_change"}:
                    pause = time.perf_counter()
                    times.limit.append(_read_once(hooks.watched, device))
                    start += time.perf_counter() - pause
            optimizer.step()
            optimizer.zero_grad()
            if hooks.after is not None:
                hook += _call(hooks.after, device if alone else None)
            common.synchronize(device)
            if alone:
                times.hook.append(hook)
            if measured and (on_cpu or not alone):
                times.step.append(time.perf_counter() - start)
        times.kept = hooks.kept()
        if hooks.look is not None:
            passes = 0

            def look() -> None:
                nonlocal passes
                passes = hooks.look()

            for _ in range(2):  # the first one tries whether several rows may share a forward pass
                model(**batch).loss.backward()
                seconds = common.seconds(look, device) - statistics.mean(times.hook)
                optimizer.zero_grad()
            times.look.append(seconds / passes * ALL_ROWS / LOOK_ROWS)


def _call(function: Callable[[], None], device: str | None) -> float:
    """Call it; the seconds that it took where a device to wait for is given."""
    if device is None:
        function()
        return 0.0
    return common.seconds(function, device)


def _read_once(watched: Sequence[Tensor], device: str) -> float:
    """Seconds for reading every watched gradient, and a tensor of its size elsewhere in memory, once."""
    pairs = [(parameter.grad, parameter.detach()) for parameter in watched if parameter.grad is not None]
    return common.seconds(lambda: [(gradient.sum(), other.sum()) for gradient, other in pairs], device)


Setting = tuple[nn.Module, torch.optim.Optimizer, dict[str, Tensor]]


def setting(options: argparse.Namespace, *, lora: bool) -> Setting:
    """Model, optimizer and batch."""
    config = common.shape(options.shape)
    model = common.model(
        config, device=options.device, dtype=common.dtype(options), rank=options.rank if lora else None
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    return model, optimizer, common.batch(config, options.batch, options.length, device=options.device)


def one_round(
    ways: dict[str, Way],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    device: str,
    *,
    backwards: bool = False,
) -> dict[str, Times]:
    """A few steps in each way."""
    times = {name: Times() for name in ways}
    for name, way in reversed(ways.items()) if backwards else ways.items():
        run(way, model, optimizer, batch, device, times[name])
    return times


def measure(options: argparse.Namespace, *, lora: bool, earlier: Path | None = None) -> dict[str, Any]:
    """All ways in one mode; times are medians over rounds, ratios are taken round by round.

    Args:
        options: Those of the command.
        lora: The mode.
        earlier: A folder with an earlier version, see `benchmarks/overhead_earlier.py`.
    """
    from benchmarks import overhead_earlier

    model, optimizer, batch = setting(options, lora=lora)
    size = sum(parameter.nbytes for parameter in model.parameters())
    everything = ways(options, lora=lora)
    rounds: list[dict[str, Times]] = []
    apart: dict[str, list[dict[str, float]]] = {"earlier": [], "now": []}  # each version in new processes
    sources = {"earlier": earlier, "now": common.PROJECT}
    for number in range(options.rounds):
        backwards = number % 2 == 1
        for version in reversed(sources) if backwards else sources:
            if earlier is not None:
                apart[version].append(overhead_earlier.one_round(sources[version], options, lora=lora))
        rounds.append(one_round(everything, model, optimizer, batch, options.device, backwards=backwards))

    bare = [statistics.median(times["bare"].step) for times in rounds]
    results: dict[str, Any] = {"bare": {"seconds": common.spread(bare)}}
    for name in everything:
        if name == "bare":
            continue
        own = [times[name] for times in rounds]
        results[name] = {
            "hook_share": common.ratio([statistics.mean(t.hook) for t in own], bare),
            "step_ratio": common.ratio([statistics.median(t.step) for t in own], bare),
            "hook_seconds": common.spread([statistics.mean(t.hook) for t in own]),
            "kept_bytes": own[-1].kept,
            "kept_share_of_model": own[-1].kept / size,
        }
    looks = [statistics.mean(times[DEFAULT].look) for times in rounds]
    results[DEFAULT] |= {"look_steps": common.ratio(looks, bare), "look_rows": ALL_ROWS, "run_steps": RUN}
    for version, found in apart.items():
        for name in found[0] if found else ():
            results[name][f"{version}_hook_share"] = common.ratio([seconds[name] for seconds in found], bare)
    own = [times["gradient_change"] for times in rounds]
    limits = [statistics.mean(t.limit) for t in own]
    results["gradient_change"]["over_bandwidth_limit"] = common.ratio([statistics.mean(t.hook) for t in own], limits)
    results["gradient_change"]["limit_seconds"] = common.spread(limits)
    return results


def report(mode: str, results: dict[str, Any]) -> None:
    """The table of one mode."""
    bare = results["bare"]["seconds"]
    common.say(f"\n{mode}: a bare step takes {bare['median']:.3f} s ({bare['min']:.3f} to {bare['max']:.3f})")
    common.say(f"{'':34} {'monitoring / bare step':>24} {'step / bare step':>20} {'kept / model':>13}")
    for name, values in results.items():
        if name == "bare":
            continue
        hook, step = values["hook_share"], values["step_ratio"]
        common.say(
            f"{name:34} {hook['median']:8.2%} ({hook['min']:6.2%}-{hook['max']:6.2%}) "
            f"{step['median']:6.3f} ({step['min']:.3f}-{step['max']:.3f}) {values['kept_share_of_model']:12.2%}"
            + (f"   earlier {values['earlier_hook_share']['median']:.2%}" if "earlier_hook_share" in values else "")
        )
    look = results[DEFAULT]["look_steps"]
    common.say(f"A look at {ALL_ROWS} rows takes as long as {look['median']:.1f} bare steps.")
    limit = results["gradient_change"]["over_bandwidth_limit"]
    common.say(
        f"gradient_change takes {limit['median']:.2f} times ({limit['min']:.2f}-{limit['max']:.2f}) as long as reading "
        "both gradients once."
    )


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print, write; returns the JSON file."""
    parser = common.parser(__doc__.splitlines()[0], rounds=3)
    parser.add_argument("--modes", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--sample-size", type=int, default=1024, help="elements of each tensor, where sampled")
    parser.add_argument("--no-peer", action="store_true", help="without the package grades")
    parser.add_argument("--against", metavar="COMMIT", help="measure this commit of the repository beside it")
    options = parser.parse_args(arguments)
    if not options.no_peer:
        peer_callback(2)  # say at once if it is missing
    torch.set_num_threads(options.threads)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        earlier = None
        if options.against is not None:
            from benchmarks import overhead_earlier

            earlier = Path(folder)
            options.against = overhead_earlier.check_out(options.against, earlier)
        for mode in options.modes:
            results[mode] = measure(options, lora=mode == "lora", earlier=earlier)
            report(mode, results[mode])
    return common.write("overhead", results, options, *([] if options.no_peer else ["grades"]))


if __name__ == "__main__":
    common.say(f"\nwritten to {main()}")
