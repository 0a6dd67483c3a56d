"""torch.compile: freezing steps and weights as without it, and a bounded number of compilations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from grades_hf import GradES, GradESCallback, GradESConfig
from tests import small

STEPS = 18

# torch looks at .grad of the activations that enter a compiled block
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiler:
    """A backend of torch.compile that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.compiled += 1
        return graph.forward


def run(compiler: Compiler | None, *, parts: bool = False, **options: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """One more component freezes at every step but the first; returns the frozen steps and the final weights."""
    model = small.llama(2)
    trained: nn.Module = model
    if compiler is not None and parts:
        for layer in model.model.layers:
            layer.compile(backend=compiler)
    elif compiler is not None:
        trained = torch.compile(model, backend=compiler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    config = GradESConfig(tau=1e-30, alpha=0, monitor="gradient_norm", **options)
    engine = GradES(trained, config, total_steps=STEPS, optimizer=optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        engine.criterion.tau[: engine.t] = 1e30
        ids = torch.randint(3, 64, (2, 12), generator=generator)
        trained(input_ids=ids, labels=ids).loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
        if engine.done:
            break
    frozen = dict(engine.frozen)
    engine.close()
    return frozen, {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.compatibility("Trainer", "torch.compile: freezing in batches, same freezing steps and weights", "works")
@pytest.mark.parametrize(("limit", "prefix"), [(1, True), (4, False)])
def test_as_without_compile_in_at_most_so_many_recompilations(limit: int, prefix: bool) -> None:
    before = torch._dynamo.config.recompile_limit
    compiler = Compiler()
    frozen, weights = run(compiler, max_recompilations=limit, freeze_prefix=prefix)
    expected_frozen, expected_weights = run(None, freeze_prefix=prefix)
    assert frozen == expected_frozen
    assert len(set(frozen.values())) == 14
    for name, weight in expected_weights.items():
        assert torch.equal(weights[name], weight), name
    assert 1 < compiler.compiled <= 1 + limit + 2 * prefix
    assert torch._dynamo.config.recompile_limit == before


def test_compiled_blocks_count_as_compiled() -> None:
    compiler = Compiler()
    assert run(compiler, parts=True, max_recompilations=2)[0] == run(None)[0]
    assert 1 < compiler.compiled <= 2 * 3  # each block


def test_between_batches_gradients_of_frozen_matrices_are_dropped() -> None:
    model = small.llama(2)
    model.compile(backend=Compiler())
    engine = GradES(
        model,
        GradESConfig(tau={"model.layers.1.mlp.up_proj": 1e30, ".*": 1e-30}, alpha=0, monitor="gradient_norm"),
        total_steps=9,
    )
    weight = model.model.layers[1].mlp.up_proj.weight
    for _ in range(2):
        ids = torch.randint(3, 64, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        engine.step()
        assert engine.frozen == {"model.layers.1.mlp.up_proj": 1}
        assert weight.requires_grad
        assert weight.grad is None
    engine.close()
    assert weight.requires_grad


def test_kept_frozen_is_frozen_though_no_batch_came() -> None:
    model = small.llama(2)
    model.compile(backend=Compiler())
    config = GradESConfig(
        tau={"model.layers.1.mlp.up_proj": 1e30, ".*": 1e-30}, alpha=0, monitor="gradient_norm", keep_frozen=True
    )
    engine = GradES(model, config, total_steps=9)
    ids = torch.randint(3, 64, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    engine.step()
    engine.close()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.compatibility("Trainer", "torch_compile=True, full and LoRA", "works")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_under_trainer(tmp_path, method: str) -> None:
    """Trainer hands the callback the model without its compiled wrapper; accelerate's state tells."""

    def train(**options: Any) -> tuple[GradES, dict[str, torch.Tensor]]:
        model = small.llama() if method == "full" else small.lora()
        callback = GradESCallback(tau=30.0 if method == "full" else 0.5, alpha=0.25, monitor="gradient_norm")
        small.trainer(model, tmp_path, [callback], **options).train()
        return callback.engine, {n: p.detach().clone() for n, p in model.named_parameters()}

    engine, weights = train(torch_compile=True, torch_compile_backend="eager")
    plain, expected = train()
    assert engine.extension("compilation") is not None
    assert plain.extension("compilation") is None
    assert engine.frozen == plain.frozen
    for name, weight in expected.items():  # a traced model makes its attention mask in another way
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)
