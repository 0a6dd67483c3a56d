"""Every config holds the paper's numbers, and its dry run trains a small model of its architecture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grades_hf import History
from recipes import dry_run, finetune, pypi

from .rows import all_tasks_dir, write_jsonl

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
TEXT = sorted(file.stem for file in CONFIGS.glob("*.yaml") if not file.stem.startswith("vlm_"))
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
PACKAGE = pypi.cache_dir() / "pypi" / pypi.BENCHMARKS[0]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(all_tasks_dir(tmp_path_factory.mktemp("data"), train=80))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run switches the hub off for its process; here that is undone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def tried(name: str, output: Path, *options: str) -> dict[str, Any]:
    """The results of a dry run."""
    return finetune.main(
        ["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", str(output), "--dry_run", "true", *options]
    )


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
        "monitor": "gradient_change" if full else "gradient_norm", "use_peft": not full,
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


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for seed, name in enumerate(TEXT)])
def test_a_dry_run_freezes_some_matrices_of_a_model_of_its_shape(
    name: str, seed: int, data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(name)
    few = [] if name == "smollm2_135m_lora" else ["--task", "boolq,siqa"]  # one with all benchmarks is enough
    results = tried(name, tmp_path, "--data_dir", data_dir, "--seed", str(seed), *few)
    output = tmp_path / "dry_run"
    assert [path.name for path in tmp_path.iterdir()] == ["dry_run"]
    assert results["steps_planned"] == dry_run.STEPS
    names = {component["name"].rpartition(".")[2] for component in History.load(output).components}
    assert names == FUSED.get(name.rpartition("_")[0], SEVEN)
    assert results["components"] == 2 * len(names)
    if "tau" in config:
        assert 0 < len(results["frozen"]) <= results["components"]
        assert min(results["frozen"].values()) > config["alpha"] * dry_run.STEPS
    said = f"froze {len(results['frozen'])} of {results['components']} matrices" if "tau" in config else "saw no reason"
    assert f"GradES {said}" in capsys.readouterr().out
    model = AutoConfig.from_pretrained(output / "model")
    kind, (heads, keys), _ = dry_run.ARCHITECTURES[config["model"]]
    assert (model.model_type, model.num_attention_heads / model.num_key_value_heads) == (kind, heads / keys)
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(output / "model").parameters()) < 4_000_000
    assert len(AutoTokenizer.from_pretrained(output / "model")) == model.vocab_size


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", ["qwen3_0.6b_full", "qwen3_0.6b_lora"])
def test_a_dry_run_freezes_with_any_seed_and_without_data(
    name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    results = tried(name, tmp_path / "run", "--seed", str(seed), "--task", "boolq,siqa")
    assert results["frozen"]
    assert not (tmp_path / "empty").exists()  # nothing was downloaded


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="the package with the benchmarks is not in the cache")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_dry_run_on_the_rows_of_pypi(seed: int, tmp_path: Path) -> None:
    results = tried("smollm2_135m_lora", tmp_path, "--seed", str(seed))
    assert results["frozen"]
    assert results["evaluation"]["rows"] == 8 * dry_run.TEST_ROWS


def test_a_dry_run_of_a_local_model_has_its_shape_and_tokenizer(tmp_path: Path, tiny_model_dir: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"Once upon a time there was number {i}."} for i in range(9)])
    results = finetune.main(
        ["--model", str(tiny_model_dir), "--data", str(file), "--output_dir", str(tmp_path), "--dry_run", "true"]
    )
    model = AutoConfig.from_pretrained(tmp_path / "dry_run" / "model")
    assert (model.model_type, model.num_attention_heads, model.num_key_value_heads) == ("llama", 4, 2)
    assert model.tie_word_embeddings
    assert model.vocab_size == 512
    assert results["steps_run"] == dry_run.STEPS


def test_a_dry_run_of_an_unknown_model_takes_a_llama(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat}] * 10)
    options = ["--model", "someone/model", "--data", str(file), "--output_dir", str(tmp_path), "--tau", "0.5"]
    with caplog.at_level("INFO", logger="recipes"):
        results = finetune.main([*options, "--dry_run", "true"])
    for line in (
        f"This is a dry run: {dry_run.STEPS} steps of a small random model shaped like someone/model, on the 8 ",
        "The architecture of someone/model is not known without a download: the small model is a Llama.",
        "The thresholds are multiplied by",
    ):
        assert line in caplog.text
    assert results["frozen"]
    assert "{'" not in capsys.readouterr().out  # no dictionaries of figures


def test_a_dry_run_says_when_nothing_can_freeze(
    data_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="recipes"):
        results = tried("qwen3_0.6b_full", tmp_path, "--data_dir", data_dir, "--task", "siqa", "--alpha", "0.99")
    assert "nothing can freeze: alpha, patience or check_every leave no check for it" in caplog.text
    assert results["frozen"] == {}


def test_thresholds_that_do_not_fit_are_refused_by_a_dry_run(
    data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        tried("qwen3_0.6b_full", tmp_path, "--data_dir", data_dir, "--tau", '{"vision": 1}')
    assert "tau has the key 'vision', which matches no component" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["dry_run"]


def test_a_dry_run_that_observes_freezes_nothing_and_a_threshold_is_no_false_alarm(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": f"Once upon a time there was number {i}."} for i in range(40)]
    )
    options = ["--data", str(file), "--output_dir", str(tmp_path / "out"), "--dry_run", "true", "--tau", "1"]
    results = finetune.main(["--model", str(tiny_model_dir), *options, "--observe", "true"])
    assert results["frozen"] == {}
    caplog.clear()
    assert finetune.main(["--model", str(tiny_model_dir), *options])["frozen"]
    assert "nothing can freeze" not in caplog.text
    with pytest.raises(SystemExit, match="2"):
        finetune.main(["--model_name_or_path", str(tiny_model_dir), *options])
    assert "here the argument is called --model" in capsys.readouterr().err
