"""GradES for axolotl: a plugin that two lines of YAML switch on.

```yaml
plugins: [grades_hf.adapters.axolotl.GradESPlugin]
val_set_size: 0.05
```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator
from transformers import TrainerCallback

from ..config import make_config
from ..parallel.refusals import DEEPSPEED, FSDP1
from .trainer import GradESCallback

GENERATES = ("grpo", "gdpo", "ebft")  # values of `rl` that train on what the model generates


class GradESArgs(BaseModel):
    """What the plugin adds to axolotl's configuration, and what it refuses there.

    Attributes:
        grades: The options, the fields of `GradESConfig`; default: none, which is the mode without a tau.

    Raises:
        ValueError: an option that cannot be, or a part of the configuration that GradES cannot work with; when axolotl
            reads the configuration, before it loads a model.
    """

    grades: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse(cls, data: Any) -> Any:
        """Check the whole configuration."""
        if not isinstance(data, Mapping) or not any("GradESPlugin" in str(name) for name in data.get("plugins") or ()):
            return data
        config = make_config(data.get("grades") or {})
        if data.get("deepspeed"):
            raise ValueError(DEEPSPEED)
        if (data.get("fsdp") or data.get("fsdp_config")) and str(data.get("fsdp_version") or 1) == "1":
            raise ValueError(f"{FSDP1} In axolotl that is fsdp_version: 2.")
        if data.get("relora") or data.get("jagged_restart_steps"):
            raise ValueError(
                "ReLoRA begins its adapters anew while it trains, and GradES compares them over the run. Drop one."
            )
        if config.tau is None:
            if data.get("rl") in GENERATES:
                raise ValueError(
                    f"GradES without a tau cannot work with rl: {data['rl']}, because no held-out row has a loss "
                    "there. Set grades: {tau: ...}."
                )
            if not data.get("val_set_size") and not data.get("test_datasets"):
                raise ValueError(
                    "GradES without a tau decides by looks at held-out rows, and this configuration has none. Set "
                    "val_set_size: 0.05, or test_datasets, or grades: {tau: ...}."
                )
        return data


class GradESPlugin(BasePlugin):
    """Gives axolotl's trainer a `GradESCallback` with the options under `grades` in the configuration."""

    def get_input_args(self) -> str:
        """Where axolotl finds the arguments of this plugin."""
        return f"{__name__}.GradESArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        """The callback, before the trainer is made."""
        return [GradESCallback(dict(cfg.get("grades") or {}))]
