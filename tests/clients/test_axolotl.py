"""axolotl's plugin: with axolotl's own plugin manager where it is installed, else with its documented base class."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from grades_hf import GradESCallback

NAME = "grades_hf.adapters.axolotl.GradESPlugin"
INSTALLED = importlib.util.find_spec("axolotl") is not None


class Documented:
    """What axolotl documents of `BasePlugin` and this plugin uses."""

    def get_input_args(self) -> str | None:
        return None

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The module of the plugin."""
    if not INSTALLED:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setattr(sys.modules["axolotl.integrations.base"], "BasePlugin", Documented, raising=False)
    monkeypatch.delitem(sys.modules, "grades_hf.adapters.axolotl", raising=False)
    yield importlib.import_module("grades_hf.adapters.axolotl")
    sys.modules.pop("grades_hf.adapters.axolotl", None)


def test_it_gives_the_trainer_a_callback(plugin: types.ModuleType) -> None:
    made = plugin.GradESPlugin()
    module, _, name = made.get_input_args().rpartition(".")
    assert getattr(importlib.import_module(module), name) is plugin.GradESArgs
    (callback,) = made.add_callbacks_pre_trainer({"grades": {"tau": {"q": 0.1, ".*": 0.2}}}, model=None)
    assert isinstance(callback, GradESCallback)
    assert callback.config.tau == {"q": 0.1, ".*": 0.2}
    (callback,) = made.add_callbacks_pre_trainer({}, model=None)
    assert callback.config.tau is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "val_set_size"),
        ({"val_set_size": 0.0}, "val_set_size"),
        ({"val_set_size": 0.1, "rl": "grpo"}, "rl: grpo"),
        ({"grades": {"tua": 0.5}}, "did you mean tau"),
        ({"grades": {"tau": -1}}, "greater than 0"),
        ({"grades": {"tau": 0.5}, "deepspeed": "zero2.json"}, "DeepSpeed"),
        ({"grades": {"tau": 0.5}, "fsdp_config": {"offload_params": True}}, "fsdp_version: 2"),
        ({"grades": {"tau": 0.5}, "relora": True}, "ReLoRA"),
    ],
)
def test_what_cannot_work_is_refused(plugin: types.ModuleType, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        plugin.GradESArgs.model_validate({"plugins": [NAME], **data})


@pytest.mark.parametrize(
    "data",
    [
        {"plugins": [NAME], "val_set_size": 0.05},
        {"plugins": [NAME], "test_datasets": [{"path": "held_out.jsonl"}]},
        {"plugins": [NAME], "grades": {"tau": 0.5}, "rl": "grpo"},
        {"plugins": [NAME], "grades": {"tau": 0.5}, "fsdp_config": {}, "fsdp_version": 2},
        {"plugins": ["another.Plugin"], "deepspeed": "zero2.json"},
        {},
    ],
)
def test_what_works_is_not(plugin: types.ModuleType, data: dict[str, Any]) -> None:
    assert plugin.GradESArgs.model_validate(data).grades == data.get("grades")


@pytest.mark.skipif(not INSTALLED, reason="needs axolotl")
def test_axolotls_manager_finds_it(plugin: types.ModuleType) -> None:
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    manager = PluginManager.get_instance()
    manager.register(NAME)
    assert manager.get_input_args() == ["grades_hf.adapters.axolotl.GradESArgs"]
    (callback,) = manager.add_callbacks_pre_trainer(DictDefault({"grades": {"tau": 0.5}}), None)
    assert isinstance(callback, GradESCallback)
    assert callback.config.tau == 0.5
    manager.plugins.clear()
