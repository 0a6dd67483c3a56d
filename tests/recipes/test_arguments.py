"""Arguments from a YAML file, the command line, and both; and what is refused."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from trl import ModelConfig, SFTConfig

from grades_hf import GradESConfig
from recipes.arguments import RENAMED, GradESArguments, check, command, grades_config, option, parse, thresholds
from tests.small import llama


@dataclasses.dataclass
class Own:
    task: str | None = option(None, "A task, 100 % of it.")


def parsed(*argv: str) -> tuple[Any, ...]:
    return parse((Own, ModelConfig, SFTConfig, GradESArguments), list(argv), "Try.")


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(
        "task: piqa\nlearning_rate: 1e-4\ntau: {attention: 0.5, mlp: 2}\npatience: 3\nuse_peft: true\n"
        "lora_target_modules: [q_proj, v_proj]\nfreeze_exclude_modules: '.*down_proj'\nmax_steps: -1\n",
        encoding="utf-8",
    )
    return str(file)


def test_yaml_alone(config: str) -> None:
    own, model, training, freezing = parsed("--config", config)
    assert (own.task, training.learning_rate, training.max_steps) == ("piqa", 1e-4, -1)
    assert (model.use_peft, model.lora_target_modules) == (True, ["q_proj", "v_proj"])
    expected = GradESConfig(tau={"attention": 0.5, "mlp": 2.0}, patience=3, exclude_modules=".*down_proj")
    assert grades_config(freezing) == expected


def test_the_command_line_wins(config: str) -> None:
    own, _, training, freezing = parsed(f"--config={config}", "--task", "siqa", "--tau", "0.25", "--grades", "true")
    assert (own.task, training.learning_rate) == ("siqa", 1e-4)
    grades = grades_config(freezing)
    assert grades is not None
    assert (grades.tau, grades.patience) == (0.25, 3)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.5", 0.5), ("1e-3", 1e-3), ('{"mlp": 2}', {"mlp": 2.0})],
)
def test_a_threshold_is_a_number_or_json(text: str, value: Any) -> None:
    *_, freezing = parsed("--tau", text)
    grades = grades_config(freezing)
    assert grades is not None
    assert grades.tau == value


def test_modules_are_a_list_or_an_expression() -> None:
    for text, value in (('["q_proj"]', ["q_proj"]), ("[qv]_proj", "[qv]_proj")):
        *_, freezing = parsed("--tau", "1", "--freeze_target_modules", text)
        grades = grades_config(freezing)
        assert grades is not None
        assert grades.target_modules == value


def test_every_option_of_grades_is_an_argument_with_its_default() -> None:
    arguments = {field.name: field for field in dataclasses.fields(GradESArguments)}
    for item in dataclasses.fields(GradESConfig):
        argument = arguments[RENAMED.get(item.name, item.name)]
        assert argument.default == (None if item.default is dataclasses.MISSING else item.default)
        assert argument.metadata["help"]
    *_, freezing = parsed()
    assert grades_config(freezing) == GradESConfig()


def test_observing_freezes_nothing_whatever_tau_is() -> None:
    *_, freezing = parsed("--tau", "5", "--observe", "true", "--alpha", "0.25")
    assert grades_config(freezing) == GradESConfig(tau=sys.float_info.min, alpha=0.25)
    *_, freezing = parsed("--grades", "false", "--tau", "zero")
    assert grades_config(freezing) is None


def test_help_shows_all_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parsed("--help")
    shown = capsys.readouterr().out
    for name in ("--config", "--freeze_target_modules", "--lora_r", "--task", "100 % of it", "--learning_rate"):
        assert name in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tao", "1"], "the argument '--tao' is unknown. Did you mean --tau?"),
        (["--zzzzzzzz=1"], "the argument '--zzzzzzzz=1' is unknown. --help lists all arguments."),
        (["--config", "nowhere.yaml"], "the file behind --config cannot be read"),
    ],
)
def test_an_unknown_argument_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parsed(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tao: 1\n", "'--tao' is unknown. Did you mean --tau"),
        ("- tau\n", "must contain a YAML mapping"),
        ("tau: [1\n", "cannot be read"),
    ],
)
def test_a_bad_yaml_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parsed("--config", str(file))


def test_a_value_of_the_wrong_type_is_refused_in_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed("--patience", "two")
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2
    assert "argument --patience: invalid int value: 'two'" in error[1]


@pytest.mark.parametrize("tau", ["zero", "nan", "-1", '{"mlp": 0}', '{"mlp": 1'])
def test_a_bad_threshold_is_refused(tau: str) -> None:
    *_, freezing = parsed(f"--tau={tau}")
    with pytest.raises(ValueError, match="tau.* must be"):
        grades_config(freezing)


def test_thresholds_of_a_model() -> None:
    model = llama()
    found = thresholds(model, GradESConfig(tau={"attention": 1.0, "mlp": 2.0}))
    assert {found["model.layers.0.self_attn.q_proj"], found["model.layers.1.mlp.up_proj"]} == {1.0, 2.0}
    assert len(found) == 14
    with pytest.raises(ValueError, match="vision"):
        thresholds(model, GradESConfig(tau={"vision": 1.0}))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load_in_4bit", "true"], "load_in_4bit=True and use_peft=False: such weights cannot be trained"),
        (
            ["--load_in_8bit", "true", "--use_peft", "true"],
            r"needs bitsandbytes: pip install -c constraints.txt -e '.\[bnb\]'",
        ),
        (["--load_in_4bit", "true", "--use_peft", "true"], "load_in_4bit=True needs an accelerator"),
    ],
)
def test_few_bits_are_refused_where_they_cannot_be(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, training, *_ = parsed(*options)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "accelerator" in message or None)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        check(model, training, dry_run=False)


def test_an_error_is_one_line_of_one_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, lines in (("0", ["try.py: error: x=1 is bad; pass 2."]), ("1", [])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended, command("try.py"):
            raise ValueError("x=1 is bad;\n pass 2.")
        assert ended.value.code == 2
        assert capsys.readouterr().err.splitlines() == lines
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended, command("try.py"):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert "try.py: interrupted. The same command with --resume_from_checkpoint true" in capsys.readouterr().err
    with pytest.raises(KeyError), command("try.py"):  # a fault of the program keeps its traceback
        raise KeyError
