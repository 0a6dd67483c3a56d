"""Which memory comes back: `python -m benchmarks.memory` counts bytes over scripted frozen sets, ours and the peer's.

Counted are tensors, each buffer once: weights, gradients before the update, optimizer state, and what monitoring keeps
from one step to the next. `held` is what lies in memory between two steps, `peak` what does just before the monitor
of the next one looks: all of that and the new gradients. On a GPU `allocated_peak` is torch's own count of the most
that a whole step took, activations and temporaries included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.overhead import NEVER, Way, monitoring, peer_callback
from grades_hf import Component, find_components

ALWAYS = 1e30  # a threshold that everything falls below
STEPS = 3  # the first is remembered, at the second components freeze, before the third everything is counted


def frozen_sets(components: list[Component]) -> dict[str, list[str]]:
    """The scripted sets: names of components."""
    blocks = 1 + max(component.layer or 0 for component in components)
    return {
        "none": [],
        "bottom half": [c.name for c in components if (c.layer or 0) < blocks // 2],
        "all but the top block": [c.name for c in components if (c.layer or 0) < blocks - 1],
        "all matrices": [c.name for c in components],
    }


def ways(options: argparse.Namespace) -> dict[str, Way]:
    """All ways of monitoring, by name."""
    result = {"no monitoring": Way()}
    for monitor in ("gradient_change", "gradient_norm", "weight_change"):
        result[monitor] = Way({"monitor": monitor})
    sampled = {"monitor": "gradient_change", "sample_size": options.sample_size}
    result[f"gradient_change, sample_size={options.sample_size}"] = Way(sampled)
    if not options.no_peer:
        result["peer"] = Way(peer=True)
    return result


def buffers(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of each buffer behind the tensors, by its address."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def scripted(way: Way, components: list[Component], names: list[str]) -> Way:
    """This way with thresholds at which these components freeze at once and no others."""
    if way.options is None:
        return way
    tau: Any = NEVER
    if len(names) == len(components):
        tau = ALWAYS
    elif names:
        tau = {**dict.fromkeys(names, ALWAYS), ".*": NEVER}
    return Way({**way.options, "tau": tau, "alpha": 0.0})


def freeze_peer(callback: Any, model: nn.Module, names: list[str]) -> None:
    """Freeze these by the peer's own function."""
    keys = {}
    for key in callback.component_stats:
        _, layer, part, projection = key.split("_", 3)
        keys[f"layers.{int(layer)}.{'self_attn' if part == 'attn' else part}.{projection}"] = key
    for name in names:
        callback._freeze_component(model, keys[name[name.index("layers.") :]], 2)


def count(
    way: Way, model: nn.Module, batch: dict[str, Tensor], components: list[Component], names: list[str], device: str
) -> dict[str, int]:
    """Bytes by kind when `names` are frozen."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # In bfloat16 a smaller step would move nothing.
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    on_gpu = torch.device(device).type == "cuda"
    result: dict[str, int] = {}
    with monitoring(scripted(way, components, names), model, optimizer, batch) as hooks:
        for step in range(1, STEPS + 1):
            if step == STEPS:
                result["optimizer"] = sum(buffers(_state(optimizer)).values())
                result["kept"] = hooks.kept()
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats(device)
            loss = model(**batch).loss
            if loss.requires_grad:  # not when a LoRA is frozen to its last matrix
                loss.backward()
            if step == STEPS:
                result["gradients"] = sum(buffers(parameter.grad for parameter in trained).values())
            if hooks.before is not None:
                hooks.before()
            optimizer.step()
            optimizer.zero_grad()
            if hooks.after is not None:
                hooks.after()
            if step == 2 and hooks.callback is not None:
                freeze_peer(hooks.callback, model, names)
        if on_gpu:
            result["allocated_peak"] = torch.cuda.max_memory_allocated(device)
    for parameter in trained:
        parameter.requires_grad_(True)  # the peer leaves it frozen
    result["weights"] = sum(buffers(model.parameters()).values())
    result["held"] = result["weights"] + result["optimizer"] + result["kept"]
    result["peak"] = result["held"] + result["gradients"]
    return result


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def measure(options: argparse.Namespace, *, lora: bool) -> dict[str, dict[str, dict[str, int]]]:
    """Way -> frozen set -> bytes by kind."""
    config = common.shape(options.shape)
    model = common.model(
        config, device=options.device, dtype=common.dtype(options), rank=options.rank if lora else None
    )
    batch = common.batch(config, options.batch, options.length, device=options.device)
    components = find_components(model)
    return {
        name: {
            frozen: count(way, model, batch, components, names, options.device)
            for frozen, names in frozen_sets(components).items()
            if frozen == "none" or way.options is not None or way.peer
        }
        for name, way in ways(options).items()
    }


def report(mode: str, results: dict[str, dict[str, dict[str, int]]]) -> None:
    """The table of one mode, in MB."""
    kinds = list(results["no monitoring"]["none"])
    bare = results["no monitoring"]["none"]["peak"]
    common.say(f"\n{mode}, MB")
    common.say(f"{'':34} {'frozen':22}" + "".join(f"{kind:>15}" for kind in kinds) + f"{'peak / bare':>13}")
    for name, sets in results.items():
        for frozen, counted in sets.items():
            cells = "".join(f"{counted[kind] / 1e6:15,.1f}" for kind in kinds)
            common.say(f"{name:34} {frozen:22}{cells}{counted['peak'] / bare:13.3f}")


def main(arguments: list[str] | None = None) -> Path:
    """Count, print, write; returns the JSON file."""
    parser = common.parser(__doc__.splitlines()[0], rounds=None)
    parser.add_argument("--modes", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--sample-size", type=int, default=1024, help="elements of each tensor, where sampled")
    parser.add_argument("--no-peer", action="store_true", help="without the package grades")
    options = parser.parse_args(arguments)
    if not options.no_peer:
        peer_callback(2)  # say at once if it is missing
    torch.set_num_threads(options.threads)
    results = {}
    for mode in options.modes:
        results[mode] = measure(options, lora=mode == "lora")
        report(mode, results[mode])
    return common.write("memory", results, options, *([] if options.no_peer else ["grades"]))


if __name__ == "__main__":
    common.say(f"\nwritten to {main()}")
