"""What the recipes share: arguments on the command line or in a YAML file, those of GradES among them, and errors."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import logging
import os
import sys
import tempfile
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as TRACKERS
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from grades_hf import GradES, GradESConfig

logger = logging.getLogger(__name__)

RENAMED = {"target_modules": "freeze_target_modules", "exclude_modules": "freeze_exclude_modules"}
INTERRUPTED = (
    "interrupted. The same command with --resume_from_checkpoint true goes on from the last checkpoint in output_dir, "
    "if one has been saved."
)
PLAIN = (bool, int, float, str, int | None, float | None, str | None)


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of arguments, with its help text."""
    return dataclasses.field(default=default, metadata={"help": help.replace("%", "%%")})


def _grades_fields() -> list[Any]:
    """The options of GradESConfig as arguments; a value that has more than one type is written as JSON."""
    hints = typing.get_type_hints(GradESConfig)
    fields: list[Any] = [("grades", bool, option(True, "Use GradES. With false it is TRL's SFTTrainer alone."))]
    for item in dataclasses.fields(GradESConfig):
        kind = hints[item.name] if hints[item.name] in PLAIN else str | None
        default = None if item.default is dataclasses.MISSING else item.default
        text = item.metadata.get("help", f"The option {item.name} of GradESConfig.")
        fields.append((RENAMED.get(item.name, item.name), kind, option(default, text)))
    observe = option(False, "Freeze nothing, but record every value, for `grades-hf suggest`.")
    return [*fields, ("observe", bool, observe)]


GradESArguments = dataclasses.make_dataclass("GradESArguments", _grades_fields())
GradESArguments.__doc__ = "What GradES does: the options of GradESConfig."


def grades_config(arguments: Any) -> GradESConfig | None:
    """The options of GradES, or None where it is not used.

    Raises:
        ValueError: an option has a value that it cannot have.
    """
    if not arguments.grades:
        return None
    options = {}
    for item in dataclasses.fields(GradESConfig):
        value = options[item.name] = getattr(arguments, RENAMED.get(item.name, item.name))
        if isinstance(value, str):
            with contextlib.suppress(json.JSONDecodeError):  # a word, or a regular expression
                options[item.name] = json.loads(value)
    if arguments.observe:
        options["tau"] = sys.float_info.min  # nothing falls below it
    return GradESConfig(**options)


def parse(types: tuple[Any, ...], argv: list[str], description: str) -> tuple[Any, ...]:
    """One instance of each dataclass, from the command line and the file behind `--config`; the command line wins.

    Raises:
        ValueError: an argument is unknown, or the file cannot be read.
        SystemExit: a value has the wrong type, or help was asked for (as argparse does).
    """
    usage = "%(prog)s [--config FILE.yaml] [--argument value ...]; --help lists all arguments"
    parser: Any = TrlParser(types, allow_abbrev=False, usage=usage, description=description)
    parser.add_argument("--config", metavar="FILE.yaml", help="Arguments as YAML; the command line wins.")
    if not torch.accelerator.is_available():  # the defaults of TRL are made for a GPU
        parser.set_defaults(use_cpu=True, bf16=False, dataloader_pin_memory=False)
        parser.set_defaults(activation_checkpointing=False, gradient_checkpointing=False)  # the new name and the old
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    try:
        *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"the file behind --config cannot be read: {error}. Check its path and its YAML.") from error
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-")
        close = difflib.get_close_matches(name, [action.dest for action in parser._actions], n=1)
        hint = f"Did you mean --{close[0]}?" if close else "--help lists all arguments."
        raise ValueError(f"the argument {unknown[0]!r} is unknown. {hint}")
    return tuple(parsed[: len(types)])


def check(model: Any, training: Any, dry_run: bool) -> None:
    """Refuse what is not there, and find the checkpoint that `resume_from_checkpoint` means.

    Args:
        model: TRL's ModelConfig.
        training: TRL's SFTConfig.
        dry_run: Whether nothing is really trained.

    Raises:
        ValueError: the model goes by another argument, all weights shall be trained, a package, a tracker or an
            accelerator is missing, or the checkpoint is not complete.
    """
    if model.model_name_or_path is not None:
        raise ValueError(f"model_name_or_path={model.model_name_or_path!r}: here the argument is called --model.")
    _check_bits(model, dry_run)
    _find_checkpoint(training)
    for name in training.report_to:
        if name not in TRACKERS:
            raise ValueError(f"report_to={name!r} is unknown. Use all, none, or some of {', '.join(TRACKERS)}.")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to={name!r} needs a package that is not installed: pip install {name}.")


def make_directory(output: Path) -> None:
    """Make `output_dir`.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise ValueError(f"output_dir={str(output)!r} cannot be written: {error}. Pass another one.") from error


def _check_bits(model: Any, dry_run: bool) -> None:
    name = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
    if not getattr(model, name):
        return
    if not model.use_peft:
        raise ValueError(f"{name}=True and use_peft=False: such weights cannot be trained. Pass --use_peft true.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{name}=True needs bitsandbytes: pip install -c constraints.txt -e '.[bnb]'.")
    if not torch.accelerator.is_available() and not dry_run:
        raise ValueError(
            f"{name}=True needs an accelerator: on a CPU bitsandbytes repacks the weights at the first evaluation, and "
            "no gradient flows through them any more. Leave it out."
        )


def _find_checkpoint(training: Any) -> None:
    resume, output = training.resume_from_checkpoint, training.output_dir
    resume = None if resume is None else str(resume)  # YAML's true is a bool
    if resume is not None and resume.lower() in ("true", "false"):
        wanted = resume.lower() == "true"
        found = get_last_checkpoint(output) if wanted and Path(output).is_dir() else None
        resume = training.resume_from_checkpoint = found
        if wanted and found is None:
            logger.info("There is no checkpoint in output_dir=%r, so training starts at step 0.", output)
    if resume is not None and not Path(resume, "trainer_state.json").is_file():  # which Trainer writes last
        raise ValueError(f"resume_from_checkpoint={resume!r} holds no complete checkpoint; pass another directory.")
    made = 0 if resume is None else TrainerState.load_from_json(str(Path(resume, "trainer_state.json"))).global_step
    if 0 < training.max_steps <= made:  # Trainer might make one step more
        raise ValueError(
            f"max_steps={training.max_steps}, but {resume} has made {made} steps already. Raise max_steps."
        )


def thresholds(model: Any, grades: GradESConfig) -> dict[str, float]:
    """The threshold of each matrix.

    Raises:
        ValueError: the thresholds do not fit the model.
    """
    with hushed():  # the engine of the run says the same
        engine = GradES(model, grades, total_steps=10**6)  # the run's are not known here, and change no threshold
    engine.close()
    return {component["name"]: component["tau"] for component in engine.history.components}


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """GradES says nothing but warnings."""
    logger = logging.getLogger("grades_hf")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def command(script: str) -> Iterator[None]:
    """Around a command: its log lines, all cores of a CPU, and one line for a ValueError (status 2) or Ctrl-C (130).

    `accelerate launch` by itself gives one thread to a process that trains on a CPU.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("recipes", "grades_hf"):
        logging.getLogger(name).setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)  # of TRL and PEFT
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error is raised, too
    transformers.utils.logging.disable_progress_bar()
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and not torch.accelerator.is_available() and torch.get_num_threads() == 1:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    try:
        yield
    except (ValueError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        text = f"error: {' '.join(str(error).split())}" if not interrupted else INTERRUPTED
        if os.environ.get("RANK", "0") == "0":  # of several processes one says it
            sys.stderr.write(f"{script}: {text}\n")
        raise SystemExit(130 if interrupted else 2) from None
