"""freeze_prefix: what freezes with the lowest blocks, where backward ends, and that live gradients do not change."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from grades_hf import GradES, GradESCallback, GradESConfig
from grades_hf.hooks import Hook
from tests import small

CHECKPOINTING = [None, False, True]  # use_reentrant
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))


def llama(tied: bool = False, layers: int = 4) -> LlamaForCausalLM:
    return small.llama(layers, tied=tied).train()


def with_checkpointing(model: Any, reentrant: bool | None) -> Any:
    if reentrant is not None:
        small.enable_checkpointing(model, reentrant)
    return model


def freeze_low(model: nn.Module, low: str = "layers\\.[01]\\.", **options: Any) -> GradES:
    """An engine that freezes what matches `low` in its first step, and nothing else ever."""
    tau = {f".*{low}.*": 1e30, ".*": 1e-30}
    config = GradESConfig(tau=tau, alpha=0, monitor="gradient_norm", **{"freeze_prefix": True, **options})
    return GradES(model, config, total_steps=9)


def backward(model: nn.Module, ids: Tensor = IDS) -> None:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        backward(model)
    return counter.get_total_flops()


def raise_tau(engine: GradES, chosen: Callable[[Any], bool]) -> None:
    """From now on these components are below their threshold."""
    for place, component in enumerate(engine.components):
        if chosen(component):
            engine.criterion.tau[place] = 1e30


@pytest.mark.parametrize("reentrant", CHECKPOINTING)
@pytest.mark.parametrize("method", ["full", "tied", "lora"])
def test_live_gradients_are_those_without_the_cut(method: str, reentrant: bool | None) -> None:
    model = llama(tied=method == "tied")
    if method == "lora":
        model = small.lora(model)
        nn.init.normal_(model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight)
    with_checkpointing(model, reentrant)
    whole = copy.deepcopy(model)
    engine = freeze_low(model)
    backward(model)
    engine.step()
    assert len(engine.frozen) == 14
    for _ in range(2):
        backward(model)
        backward(whole)
        ours, theirs = gradients(model), gradients(whole)
        frozen = {n for n, p in whole.named_parameters() if p.requires_grad} - ours.keys()
        assert all(".layers.2." not in name and ".layers.3." not in name for name in frozen)
        assert ours
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-7, msg=name)
        engine.step()


@pytest.mark.parametrize("reentrant", CHECKPOINTING)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_backward_ends_at_the_lowest_live_block(method: str, reentrant: bool | None) -> None:
    """It costs what a model of the upper blocks alone costs, and below them a forward pass."""

    def make(layers: int) -> Any:
        model = llama(layers=layers)
        return with_checkpointing(small.lora(model) if method == "lora" else model, reentrant)

    model = make(4)
    engine = freeze_low(model)
    backward(model)
    uncut = flops(model)
    backward(model)
    engine.step()
    cut = flops(model)

    upper = make(2)
    for name, p in upper.named_parameters():
        if "embed" in name:
            p.requires_grad_(False)
    if not reentrant:
        upper.get_input_embeddings()._forward_hooks.clear()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        make(4).eval()(input_ids=IDS)
    four = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        make(2).eval()(input_ids=IDS)
    lower_blocks_forward = four - counter.get_total_flops()
    assert cut == lower_blocks_forward + flops(upper)
    assert cut < uncut


def test_what_freezes_with_the_prefix() -> None:
    engine = freeze_low(llama())
    backward(engine.extension("prefix").root)
    engine.step()
    norms = {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")}
    assert engine.extension("prefix").frozen == dict.fromkeys({"model.embed_tokens.weight"} | norms, 1)


def test_a_tied_embedding_freezes_together_with_the_head() -> None:
    model = llama(tied=True)
    engine = freeze_low(model)
    backward(model)
    engine.step()
    backward(model)
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad is not None
    engine.close()
    assert all(p.requires_grad for p in model.parameters())


def test_without_the_option_norms_and_embeddings_go_on() -> None:
    model = llama()
    engine = freeze_low(model, freeze_prefix=False)
    backward(model)
    engine.step()
    backward(model)
    assert engine.extension("prefix") is None
    assert model.model.embed_tokens.weight.grad is not None


def test_the_prefix_grows_block_by_block_and_not_over_a_live_one() -> None:
    model = llama()
    engine = freeze_low(model, low="layers\\.[13]\\.")
    backward(model)
    engine.step()
    assert engine.extension("prefix").frozen == {}
    raise_tau(engine, lambda component: component.layer == 0)
    backward(model)
    engine.step()
    assert engine.extension("prefix").frozen["model.embed_tokens.weight"] == 2
    assert {name.split(".")[2] for name in engine.extension("prefix").frozen if "layers" in name} == {"0", "1"}


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["embed_tokens"]},  # what is below must not freeze
        {"exclude_modules": ["layers.0.mlp.up_proj"]},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},  # matrices that go on being trained
    ],
)
def test_what_the_user_keeps_stays_alive(options: dict[str, Any]) -> None:
    model = llama()
    engine = freeze_low(model, **options)
    backward(model)
    engine.step()
    assert len(engine.frozen) > 0
    assert engine.extension("prefix").frozen == {}
    backward(model)
    assert model.model.embed_tokens.weight.grad is not None
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None or "target_modules" not in options


def test_norms_above_are_not_taken_for_lower_ones() -> None:
    """Order is that of execution: OPT-like models hold their final norm before the blocks."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = llama()
            self.final_norm, self.head = inner.model.norm, inner.lm_head
            self.embed, self.layers = inner.model.embed_tokens, inner.model.layers
            self.rotary = inner.model.rotary_emb

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            hidden = self.embed(input_ids)
            positions = self.rotary(hidden, torch.arange(input_ids.shape[1])[None])
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=positions)
            logits = self.head(self.final_norm(hidden))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return type("Output", (), {"loss": loss})

    model = Shuffled()
    engine = freeze_low(model)
    backward(model)
    engine.step()
    assert "embed.weight" in engine.extension("prefix").frozen
    assert not {"final_norm.weight", "head.weight"} & engine.extension("prefix").frozen.keys()


def test_a_decoder_is_cut_off_only_when_its_encoder_is_frozen() -> None:
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=64, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config)
    engine = freeze_low(model, low="decoder\\.block\\.0\\.")
    backward(model)
    engine.step()
    assert engine.extension("prefix").frozen == {}
    raise_tau(engine, lambda component: component.tower == "encoder")
    whole = copy.deepcopy(model)
    for p in whole.parameters():
        p.requires_grad_(True)
    backward(model)
    engine.step()
    names = engine.extension("prefix").frozen.keys()
    assert "shared.weight" in names
    assert "encoder.final_layer_norm.weight" in names
    assert "decoder.final_layer_norm.weight" not in names
    assert any(name.startswith("decoder.block.0.") for name in names)
    assert not any(name.startswith("decoder.block.1.") for name in names)
    backward(model)
    backward(whole)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients(whole)[name], rtol=1e-5, atol=1e-7, msg=name)


def test_towers_that_run_one_after_the_other() -> None:
    """A vision tower's prefix takes nothing of the language model; that one's follows when all below it is frozen."""
    from recipes import finetune_vlm

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(2)]
    asked = [[{"role": "user", "content": "what color is it?"}]] * 2
    answers = [[{"role": "assistant", "content": color}] for color in ("red", "blue")]
    rows = Dataset.from_dict({"image": images, "prompt": asked, "completion": answers})
    torch.manual_seed(0)
    model, processor = finetune_vlm.random_model(rows)
    inputs = dict(DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(list(rows)))
    whole = copy.deepcopy(model)

    def step() -> None:
        model.zero_grad()
        model(**inputs).loss.backward()
        engine.step()

    engine = freeze_low(model, low="nothing|.*vision.*layers\\.0\\.")
    vision, language = sorted({c.tower for c in engine.components}, reverse=True)
    step()
    names = set(engine.extension("prefix").frozen)
    assert names
    assert all("vision" in name for name in names)
    for place, component in enumerate(engine.components):
        if component.tower == vision or component.layer == 0:
            engine.criterion.tau[place] = 1e30
    step()
    below = set(engine.extension("prefix").frozen) - names
    assert any("embed_tokens" in name for name in below)
    assert any("connector" in name for name in below)
    assert all(not p.requires_grad for name, p in model.named_parameters() if "vision" in name or "connector" in name)
    model.zero_grad()
    model(**inputs).loss.backward()
    whole(**inputs).loss.backward()
    assert {c.tower for c in engine.components if c.frozen_at is None} == {language}
    ours, theirs = gradients(model), gradients(whole)
    assert ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reentrant", CHECKPOINTING)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(method: str, reentrant: bool | None) -> None:
    def make() -> tuple[Any, GradES, torch.optim.Optimizer]:
        model = small.lora(llama()) if method == "lora" else llama(tied=True)
        with_checkpointing(model, reentrant)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
        engine = freeze_low(model, low="layers\\.0\\.")
        engine.freezer.optimizers = [optimizer]
        return model, engine, optimizer

    def train(model: Any, engine: GradES, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            if engine.t == 3:  # a second block follows at step 4
                raise_tau(engine, lambda component: component.layer == 1)
            backward(model, IDS.roll(engine.t, 1))
            engine.step()
            optimizer.step()

    model, engine, optimizer = make()
    train(model, engine, optimizer, 6)

    first, first_engine, first_optimizer = make()
    train(first, first_engine, first_optimizer, 2)
    state = json.loads(json.dumps(first_engine.state_dict(tensors=False)))
    second, second_engine, second_optimizer = make()
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second_engine.load_state_dict(state)
    train(second, second_engine, second_optimizer, 4)
    assert second_engine.frozen == engine.frozen
    assert second_engine.extension("prefix").frozen == engine.extension("prefix").frozen
    assert set(engine.extension("prefix").frozen.values()) == (set() if method == "lora" else {1, 4})
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


def test_closing_gives_everything_back() -> None:
    model = with_checkpointing(llama(), True)
    engine = freeze_low(model)
    backward(model)
    engine.step()
    assert not model.model.layers[0].gradient_checkpointing
    engine.close()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for n, m in model.named_modules() if "embed" not in n)


def test_the_order_is_no_longer_recorded_after_the_first_freezing() -> None:
    model = llama()
    engine = freeze_low(model)
    record = engine.extension("prefix")._record

    def recording() -> int:
        hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
        return sum(hook._method() == record for hook in hooks if isinstance(hook, Hook))

    assert recording() == len(list(model.modules()))
    backward(model)
    engine.step()
    assert recording() == 0


def test_a_state_of_another_model_is_refused_unchanged() -> None:
    model = llama()
    engine = freeze_low(model)
    state = engine.state_dict(tensors=False) | {"extensions": {"prefix": {"frozen": {"nowhere": 3}, "cut": {}}}}
    with pytest.raises(ValueError, match="'nowhere'"):
        engine.load_state_dict(state)
    assert all(p.requires_grad for p in model.parameters())


def test_checkpointing_outside_the_blocks_is_refused() -> None:
    class Old(nn.Module):
        gradient_checkpointing = True

        def __init__(self) -> None:
            super().__init__()
            block = nn.ModuleDict({"attn": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
            self.blocks = nn.ModuleList([block, copy.deepcopy(block)])

    with pytest.raises(ValueError, match="freeze_prefix=True does not work with the gradient checkpointing of Old"):
        freeze_low(Old(), low="blocks\\.0")


def test_a_model_without_a_sequence_of_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="freeze_prefix=True needs a model whose blocks"):
        GradES(model, GradESConfig(tau=1, target_modules=["0"], freeze_prefix=True), total_steps=4)


@pytest.mark.compatibility("Trainer", "freeze_prefix, checkpointing reentrant or not, full and LoRA", "works")
@pytest.mark.parametrize("reentrant", CHECKPOINTING)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_under_trainer(tmp_path, method: str, reentrant: bool | None) -> None:
    """The same frozen components as without the option, frozen parameters bit-identical, live ones trained."""
    spy = small.Spy()
    callback = GradESCallback(
        tau={".*layers\\.[01]\\..*": 1e30, ".*": 1e-30}, alpha=0.25, monitor="gradient_norm", freeze_prefix=True
    )
    model = small.lora(llama()) if method == "lora" else llama()
    options = {} if reentrant is None else small.checkpointing_arguments(reentrant)
    trainer = small.trainer(model, tmp_path, [callback, spy], max_steps=6, **options)
    trainer.train()
    assert set(callback.engine.frozen.values()) == {3}
    after = dict(model.named_parameters())
    second, third = spy.weights[2], spy.weights[3]
    frozen = {n for n, p in after.items() if torch.equal(third[n], p) and not torch.equal(second[n], p)}
    for layer in (0, 1):
        assert any(f"layers.{layer}." in name for name in frozen)
    if method == "full":
        assert frozen == {n for n in after if "layers.0." in n or "layers.1." in n or "embed" in n}
    moved = {n for n, p in after.items() if not torch.equal(spy.weights[3][n], p)}
    assert moved == {n for n, p in after.items() if p.requires_grad} - frozen
    assert moved
