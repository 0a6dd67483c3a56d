"""What a history says of its run from the start: the components, and the versions of what it uses."""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..find.components import Component


def described(c: Component) -> dict[str, Any]:
    """A component as a history keeps it."""
    return {
        "name": c.name, "group": c.group, "projection": c.projection, "layer": c.layer, "tower": c.tower,
        "adapter": c.adapter, "numel": c.numel, "monitor": c.monitor, "tau": c.tau,
    }  # fmt: skip


def versions_of_run() -> dict[str, str]:
    """Of Python, of this package, and of those of its field that have been imported."""
    from .. import __version__

    names = ("torch", "transformers", "peft", "accelerate", "trl", "lightning", "bitsandbytes")
    loaded = {name: str(sys.modules[name].__version__) for name in names if name in sys.modules}
    return {"python": platform.python_version(), "grades_hf": __version__, **loaded}
