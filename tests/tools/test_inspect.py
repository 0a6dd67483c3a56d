"""The command `grades-hf inspect`, on configuration files of five real models, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import LoraConfig

from benchmarks import coverage
from grades_hf.tools import cli
from grades_hf.tools.inspect import parse_lora
from tests.architectures import TABLE

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = "r=32,target_modules=all-linear"
# Number of parameters as the model cards say, number of matrices in the blocks counted by hand.
MODELS = {
    "llama-3.1-8b": (8_030_261_248, 32 * 7),
    "qwen3-14b": (14_768_307_200, 40 * 7),
    "phi-4": (14_659_507_200, 40 * 4),
    "mixtral-8x7b": (46_702_792_704, 32 * 6),
    "qwen2.5-vl-7b": (8_292_166_656, 32 * 5 + 28 * 7),
}


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(["inspect", *argv]) == 0
    return capsys.readouterr().out


def refused(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", *argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    return captured.err.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_real_configurations(name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.perf_counter()
    options = ["--lora", ADAPTERS] if kind == "lora" else []
    text = run(str(GOLDEN / f"{name}.json"), *options, capsys=capsys)
    assert time.perf_counter() - started < 20  # a few seconds; the limit is for a busy machine
    parameters, matrices = MODELS[name]
    assert f" {parameters:,} parameters" in text.splitlines()[0]
    assert f"tracked: {matrices} components in " in text
    assert text == (GOLDEN / f"{name}.{kind}.txt").read_text(encoding="utf-8")


def test_a_local_directory_and_selections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TABLE["Llama"].build().save_pretrained(tmp_path)
    assert "tracked: 14 components in 2 layers" in run(str(tmp_path), capsys=capsys)
    some = run(str(tmp_path), "--target-modules", "q_proj", "up_proj", capsys=capsys)
    assert "tracked: 4 components in 2 layers" in some
    assert "not in target_modules" in some
    by_pattern = run(str(tmp_path), "--target-modules", r".*layers\.0\..*_proj", capsys=capsys)
    assert "tracked: 7 components in 1 layers" in by_pattern
    fewer = run(str(tmp_path), "--exclude-modules", "down_proj", capsys=capsys)
    assert "tracked: 12 components" in fewer
    assert "in exclude_modules" in fewer
    adapters = run(str(tmp_path), "--lora", "r=2,target_modules=q_proj+v_proj", capsys=capsys)
    assert "tracked: 4 components in 2 layers" in adapters
    assert "not trainable" in adapters


def test_a_configuration_without_a_class_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TABLE["BERT"].build().config.to_dict()
    config["architectures"] = None
    file = tmp_path / "bert.json"
    file.write_text(json.dumps(config))
    assert run(str(file), capsys=capsys).startswith("BertModel (bert): ")


def test_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such file" in refused("nowhere/config.json", capsys=capsys)
    assert "holds no config.json" in refused(str(tmp_path), capsys=capsys)
    message = refused("no-such-user/no-such-model", capsys=capsys)
    assert "'no-such-user/no-such-model' cannot be read" in message
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    assert "cannot be read" in refused(str(bad), capsys=capsys)
    bad.write_text('{"model_type": "no_such_type"}')
    assert "no_such_type" in refused(str(bad), capsys=capsys)
    bad.write_text('{"model_type": "llama", "hidden_size": "wide"}')
    assert "bad.json" in refused(str(bad), capsys=capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-modules", "query"], "target_modules=['query'] matches no trainable module"),
        (["--exclude-modules", "("], "exclude_modules='(' is no valid regular expression"),
        (["--lora", "r"], "'r', which is no NAME=VALUE pair"),
        (["--lora", "rank=3"], "LoraConfig has no option 'rank'"),
        (["--lora", "{r: 3}"], "is no JSON object"),
        (["--lora", "r=0,target_modules=all-linear"], "r"),
        (["--lora", "target_modules=query"], "query"),
        (["--lora", "target_modules=embed_tokens"], "no trainable attention or feed-forward matrix"),
        (["--unknown"], "unknown option --unknown; there are"),
    ],
)
def test_options_that_cannot_work(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(str(GOLDEN / "llama-3.1-8b.json"), *options, capsys=capsys)


def test_a_model_without_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "resnet.json"
    file.write_text(json.dumps({"model_type": "resnet", "architectures": ["ResNetModel"]}))
    assert "no repeated blocks" in refused(str(file), capsys=capsys)


def test_lora_options() -> None:
    plain = parse_lora("r=16,lora_alpha=32,use_rslora=true,target_modules=q_proj+v_proj")
    assert plain == parse_lora(
        '{"r": 16, "lora_alpha": 32, "use_rslora": true, "target_modules": ["q_proj", "v_proj"]}'
    )
    assert plain.target_modules == {"q_proj", "v_proj"}
    assert parse_lora("target_modules=q_proj").target_modules == {"q_proj"}
    assert parse_lora("target_modules=all-linear").target_modules == "all-linear"
    assert parse_lora(r"target_modules=.*\.q_proj").target_modules == r".*\.q_proj"
    assert isinstance(parse_lora("bias=all"), LoraConfig)


@pytest.mark.slow
def test_the_command_as_users_call_it() -> None:
    command = [sys.executable, "-m", "grades_hf.tools.cli", "inspect", str(GOLDEN / "phi-4.json")]
    done = subprocess.run([*command, "--target-modules", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "grades-hf inspect: error: target_modules=['nothing']" in done.stderr
    assert len(done.stderr.splitlines()) == 1, "no other library says a word"


# --- docs/coverage.md --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_the_table_in_the_docs_is_up_to_date(name: str) -> None:
    assert coverage.row(TABLE[name]) in coverage.TARGET.read_text(encoding="utf-8")


def test_the_page_in_the_docs_holds_nothing_else() -> None:
    page = coverage.TARGET.read_text(encoding="utf-8")
    assert page.startswith(coverage.HEADER)
    assert len(page.splitlines()) == len(coverage.HEADER.splitlines()) + len(TABLE) + 1
