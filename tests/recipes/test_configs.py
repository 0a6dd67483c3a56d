"""Every config is loaded and trained for two steps on a small model of its architecture: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recipes import finetune, finetune_vlm
from recipes.dry_run import ARCHITECTURES

from .rows import all_tasks_dir

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
TEXT = sorted(file.stem for file in CONFIGS.glob("*.yaml") if not file.stem.startswith("vlm_"))
VISION = sorted(file.stem for file in CONFIGS.glob("vlm_*.yaml"))
# Table 9 of the paper: thresholds for all weights and for adapters.
TAU = {
    "qwen3_14b": (6.387926, 0.025181),
    "phi4": (3.512882, 0.025181),
    "qwen3_0.6b": (1.804456, 0.001183),
    "llama3.1_8b": (2.404167, 0.021637),
    "mistral_7b": (2.726866, 0.029591),
}
FUSED = {"phi4": {"o_proj", "qkv_proj", "down_proj", "gate_up_proj"}}
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(all_tasks_dir(tmp_path_factory.mktemp("data"), train=20))


def test_there_is_a_config_for_each_model_and_method() -> None:
    assert {f"{name}_{method}" for name in [*TAU, "smollm2_135m"] for method in ("full", "lora")} <= set(TEXT)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", TAU)
def test_the_papers_hyperparameters(name: str, method: str) -> None:
    config = load(f"{name}_{method}")
    full = method == "full"
    expected = {
        "tau": TAU[name][not full], "alpha": 0.55, "learning_rate": 2e-5 if full else 2e-4, "max_length": 4096,
        "per_device_train_batch_size": 1 if full else 16, "gradient_accumulation_steps": 4,
        "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "patience": 1, "reduction": "sum",
        "monitor": "gradient_change" if full else "gradient_norm", "method": method,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert config.get("lora_r") == (None if full else 32)


@pytest.mark.parametrize("name", [name for name in TEXT if name.endswith(("_full", "_lora"))])
def test_every_value_says_where_it_comes_from(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if line and not line.startswith(("#", "model:"))]
    assert values
    sources = ("Table ", "ours", "Eq. ", "Algorithm 1", "the paper")
    assert not [line for line in values if not line.partition("# ")[2].startswith(sources)]


# The new name of the argument is unknown to older versions of transformers.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", TEXT)
def test_dry_run(name: str, data_dir: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    config = load(name)
    options = ["--config", str(CONFIGS / f"{name}.yaml"), "--data_dir", data_dir, "--output_dir", str(tmp_path / "run")]
    if "model" not in config:
        options += ["--model", str(tiny_model_dir)]
    finetune.main([*options, "--dry_run"])
    output = tmp_path / "run" / "dry_run"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["dry_run"]
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert (results["steps_run"], results["steps_planned"]) == (2, 2)
    history = json.loads((output / "grades_history.json").read_text(encoding="utf-8"))
    names = {component["name"].rpartition(".")[2] for component in history["components"]}
    assert names == FUSED.get(name.rpartition("_")[0], SEVEN)
    assert len(history["components"]) == 2 * len(names)
    model = AutoConfig.from_pretrained(output / "model")
    if config.get("model") in ARCHITECTURES:
        kind, sizes = ARCHITECTURES[config["model"]]
        assert model.model_type == kind.model_type
        ratio = sizes["num_attention_heads"] // sizes["num_key_value_heads"]
        assert model.num_attention_heads // model.num_key_value_heads == ratio
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(output / "model").parameters()) < 4_000_000
    assert len(AutoTokenizer.from_pretrained(output / "model")) <= model.vocab_size


def test_a_dry_run_of_a_local_model_has_its_shape(data_dir: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    options = ["--model", str(tiny_model_dir), "--data_dir", data_dir, "--output_dir", str(tmp_path), "--no_grades"]
    finetune.main([*options, "--dry_run", "--task", "arc_easy,piqa", "--max_steps", "100"])
    model = AutoConfig.from_pretrained(tmp_path / "dry_run" / "model")
    assert (model.model_type, model.num_attention_heads, model.num_key_value_heads) == ("llama", 4, 2)
    assert model.tie_word_embeddings
    scores = json.loads((tmp_path / "dry_run" / "results.json").read_text(encoding="utf-8"))["evaluation"]
    assert (scores["task"], scores["rows"]) == ("arc_easy+piqa", 6)
    parts = scores["after"]["tasks"]
    assert scores["after"]["acc"] == pytest.approx((parts["arc_easy"]["acc"] + parts["piqa"]["acc"]) / 2)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None or not torch.accelerator.is_available(),
    reason="bitsandbytes or an accelerator is missing",
)
def test_a_base_in_4_bits(data_dir: str, tmp_path: Path) -> None:
    config = str(CONFIGS / "qwen3_0.6b_lora.yaml")
    options = ["--config", config, "--data_dir", data_dir, "--output_dir", str(tmp_path), "--load_in_4bit", "true"]
    plan = finetune.prepare([*options, "--dry_run"])
    trainer = finetune.build(plan)
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert "Linear4bit" in kinds
    assert finetune.run(plan, trainer)["steps_run"] == 2


def test_a_model_that_is_not_to_be_had_is_refused(data_dir: str, tmp_path: Path) -> None:
    options = ["--model", "/nowhere", "--data_dir", data_dir, "--output_dir", str(tmp_path / "run"), "--no_grades"]
    with pytest.raises(SystemExit, match="model='/nowhere' is no directory"):
        finetune.main([*options, "--dry_run", "--task", "siqa"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "full", "--load_in_4bit"], "weights in 4 bits cannot be trained"),
        (["--load_in_4bit"], r"needs bitsandbytes: pip install 'grades-hf\[bnb\]'"),
        (["--load_in_4bit"], "load_in_4bit=True needs an accelerator"),
    ],
)
def test_4_bits_are_refused_where_they_cannot_be(
    options: list[str], message: str, data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = "accelerator" in message
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        finetune.prepare(["--data_dir", data_dir, "--output_dir", str(tmp_path), "--tau", "1", *options])


@pytest.mark.parametrize("name", VISION)
def test_vision_configs_parse(name: str) -> None:
    assert load(name)["tau"] == {"vision": 3.3, "language": 33.0}
    with pytest.raises(ValueError, match="data_dir is missing"):
        finetune_vlm.run(["--config", str(CONFIGS / f"{name}.yaml"), "--dry_run"])
    with pytest.raises(ValueError, match="load_in_4bit=True: finetune_vlm.py does not know that"):
        finetune_vlm.run(["--config", str(CONFIGS / f"{name}.yaml"), "--load_in_4bit"])


@pytest.mark.parametrize("name", VISION)
def test_vision_dry_run(name: str, tmp_path: Path) -> None:
    """The shape is SmolVLM's, whatever model the config names: finetune_vlm.py has one small model."""
    rows = [
        {"image": Image.new("RGB", (32, 32), color), "question": f"what color is number {index}", "answer": color}
        for index, color in enumerate(("red", "green", "blue", "black") * 2)
    ]
    for split in ("train", "validation"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{split}.parquet")
    options = ["--config", str(CONFIGS / f"{name}.yaml"), "--data_dir", str(tmp_path), "--use_cpu", "true"]
    options += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--per_device_train_batch_size", "2"]
    results = finetune_vlm.run([*options, "--gradient_accumulation_steps", "1", "--report_to", "none", "--dry_run"])
    assert (results["steps_run"], results["rows"]) == (2, 8)
    assert results.keys() >= {"frozen vision", "frozen language"}
