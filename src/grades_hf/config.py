"""GradESConfig: every option, with its help text and its check in one place."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from .checks import count, names, number, one_of, short, taus

REDUCTIONS = ("sum", "mean")

# Options and statistics that earlier versions had -> the values that stand for not using them (docs/criteria.md).
DELETED: dict[str, tuple[Any, ...]] = {
    "criterion": ("auto", "threshold", "rise"), "window": (0.1,), "smoothing": (None,), "significance": (0.05,),
    "quorum": (None, 0.0, 0.5), "budget": (None,), "thaw": (None,), "count_flops": (True,),
}  # fmt: skip
DELETED_MONITORS = ("relative_change", "signal_to_noise", "evidence", "gradient_product")


def grace_steps(alpha: float, total_steps: int) -> int:
    r"""$t_{grace} = \lceil \alpha T \rceil$, in decimal arithmetic: 0.55 of 100 steps are 55, not 56."""
    return math.ceil(Fraction(str(alpha)) * total_steps)


def _monitor(name: str, value: Any) -> Any:
    if value in DELETED_MONITORS:
        raise ValueError(
            f"monitor={value!r} is gone since grades-hf 0.2.0, because it lost against the others (docs/criteria.md "
            f"names the commit that has it). Use one of {', '.join(_monitors())}."
        )
    return one_of(*_monitors())(name, value)


def _monitors(*, tau: bool = True) -> list[str]:
    """The values of `monitor`; without a tau those that look at one step only."""
    from .statistics import STATISTICS  # which imports torch

    return ["auto", *(name for name, statistic in STATISTICS.items() if tau or not statistic.two_steps)]


def _option(default: Any, check: Callable[[str, Any], Any], help: str, only: str = "") -> Any:
    """A field with its help text.

    Args:
        default: The default value.
        check: From the option's name and value to the value that is kept; raises a ValueError. None is never checked.
        help: What the command line and the documentation say.
        only: `"tau"` or `"look"`: the mode that the option belongs to; both if empty.
    """
    metadata = {"help": " ".join(help.split()), "check": check, "only": only}
    return field(default=default, metadata=metadata)


@dataclass
class GradESConfig:
    r"""Options of GradES (arXiv 2509.01842). There are two modes.

    **With `tau`** it is the paper's method. At optimizer step `t` (1-based) a component `W` that is not frozen yet
    freezes when

    $$ t > \lceil \alpha T \rceil \quad\text{and}\quad G_W(t) < \tau_W \text{ (for `patience` checks in a row)} $$

    where `T` is the planned number of optimizer steps and `G_W(t)` the statistic that `monitor` names. It is frozen
    before the update of step `t`: that update does not touch it any more (Algorithm 1).

    **Without** nothing freezes. The gradients propose when to look, looks at held-out rows decide whether the run ends,
    and a moving average of the weights is returned (see `grades_hf.ending`).

    What every option means stands in its field; `grades-hf options` prints it.

    Raises:
        ValueError: an option has a value that it cannot have, or belongs to the other mode.

    Example:
        ```python
        GradESConfig()
        GradESConfig(tau=0.025, alpha=0.55)
        GradESConfig(tau={"attention": 0.02, "mlp": 0.04, r".*layers\.0\..*": 0.1}, patience=2)
        ```
    """

    tau: float | dict[str, float] | None = _option(
        None,
        taus,
        """Threshold on the statistic, the paper's tau (tau_r for LoRA; Table 9), greater than 0, in the unit of the
        statistic. A number for all components, or a mapping. A key of the mapping is a label (a tower such as "vision",
        a group such as "attention", "mlp" or "experts", a projection such as "q" or "down", or several joined by dots),
        the name of a component or the end of it, a regular expression that matches all of the name, or ".*" for all
        others. The most specific key wins: full name, name ending or expression (the first that matches), projection,
        group, tower, ".*". "mlp" also stands for experts that no other key names. Every key must match, and every
        component must get a threshold. Default: none, which is the other mode.""",
    )
    alpha: float | None = _option(
        None,
        number(
            lambda value: 0 <= value < 1,
            "a number in [0, 1): the part of the run in which nothing freezes (the paper uses 0.55; 1 would never "
            "freeze anything)",
        ),
        """Grace ratio in [0, 1). Nothing freezes, and no look is made, at the first ceil(alpha * T) optimizer
        steps, computed in decimal arithmetic: 0.55 of 100 steps are 55. Default: 0.5 with a tau, else 0.""",
    )
    monitor: str = _option(
        "auto",
        _monitor,
        """The statistic. "auto": with a tau the paper's choice, gradient_change for full weights and gradient_norm for
        adapters; else gradient_per_loss. "gradient_change": sum |g_t - g_(t-1)| (Eq. 1). "gradient_norm": sum |g_t|
        (Eq. 3, A and B of a LoRA pair added). "weight_change": sum |W_(t-1) - W_(t-2)|, the last completed update,
        which the PyPI package `grades` thresholds. "gradient_per_loss": sum |g_t| divided by the loss of the step.""",
    )
    reduction: str = _option(
        "sum",
        one_of(*REDUCTIONS),
        """"sum" (as in the paper) or "mean": divided by the number of measured elements, which makes matrices of
        different size comparable.""",
    )
    patience: int = _option(
        1,
        count("checks"),
        "Number of checks in a row below tau, counted after the grace period, before a component freezes.",
        only="tau",
    )
    check_every: int = _option(
        1,
        count("optimizer steps"),
        """Optimizer steps from one check to the next. Checks are made at steps that it divides. What is measured does
        not depend on it: it is always the change over one step.""",
    )
    target_modules: list[str] | str | None = _option(
        None,
        names,
        """What to watch, by PEFT's conventions: a list of module names or name endings, a regular expression that
        matches the full name, or "all-linear". Names are module paths without PEFT's prefix. Default: every attention
        and feed-forward matrix in the model's repeated blocks.""",
    )
    exclude_modules: list[str] | str | None = _option(
        None, names, "What not to watch, by the same conventions. Default: nothing."
    )
    max_frozen_fraction: float = _option(
        1.0,
        number(
            lambda value: 0 < value <= 1,
            "a number in (0, 1]: the part of the components at which training ends (1.0: when all are frozen)",
        ),
        "Training ends when this part of the components that take part, in (0, 1], is frozen.",
        only="tau",
    )
    rise: float = _option(
        0.2,
        number(lambda value: value > 0, "a finite number greater than 0: a part of the minimum"),
        """How far the smoothed statistic must have risen over its own minimum, in half of the components, before they
        propose the first look: 0.2 is 1.2 times the minimum. Each proposal makes this ratio 1.5 times as large.""",
        only="look",
    )
    look_rows: int = _option(
        128, count("rows"), "Number of held-out rows that a look computes the loss of, at most.", only="look"
    )
    average_device: str | None = _option(
        None,
        one_of("cpu"),
        """Where the moving average of the trained weights is kept: "cpu", or by default beside the weights.""",
        only="look",
    )
    return_weights: str = _option(
        "average",
        one_of("average", "last"),
        """Which weights the model holds when a look has ended the run: their moving average, or the "last" ones.""",
        only="look",
    )
    skip_validation: bool | str = _option(
        "auto",
        one_of("auto", True, False),
        """Whether scheduled evaluations are left out (Trainer). "auto": yes, unless something needs them
        (load_best_model_at_end, early stopping, a scheduler or callback that reads metrics); one line says so.""",
    )
    keep_frozen: bool = _option(
        False,
        one_of(True, False),
        "Whether what was frozen still requires no gradient after training. Default: everything is as before.",
        only="tau",
    )
    sample_size: int | None = _option(
        None,
        count("elements"),
        """Number of elements of each tensor that the statistic is estimated from: a fixed random sample. 1024 elements
        have a relative error of 5 % in the median matrix of SmolLM2-135M. Default: all of them, exactly.""",
    )
    delay_transfer: bool = _option(
        False,
        one_of(True, False),
        """Whether the values of a check are read one step later, so that a GPU's queue does not run empty. What falls
        below tau at step t then freezes at step t + 1.""",
    )
    freeze_prefix: bool = _option(
        False,
        one_of(True, False),
        """Whether the norms, biases and embeddings below freeze too, once all components of the lowest blocks are
        frozen, so that the backward pass ends at the lowest live block. The paper keeps training them.""",
        only="tau",
    )
    merge_frozen_adapters: bool = _option(
        False,
        one_of(True, False),
        """Whether a frozen LoRA pair is folded into a copy of its base weight while training goes on, so that it costs
        nothing. Saves and the end of training see the pair as it is.""",
        only="tau",
    )
    max_recompilations: int = _option(
        4,
        count("recompilations"),
        """How many times freezing may recompile a model under torch.compile (freeze_prefix adds two). Matrices stop
        being updated at their step all the same; the saving comes in that many batches.""",
        only="tau",
    )

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if value is not None or option.default is not None:
                setattr(self, option.name, option.metadata["check"](option.name, value))
        if self.tau is None and self.monitor not in (without := _monitors(tau=False)):
            raise ValueError(f"monitor={self.monitor!r} needs a tau. Without one it is one of {', '.join(without)}.")
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.metadata["only"] == ("look" if self.tau is not None else "tau") and value != option.default:
                if self.tau is None:
                    raise ValueError(
                        f"{option.name}={value!r} is about freezing, and without a tau nothing freezes. Pass a tau, or "
                        f"leave {option.name} out."
                    )
                raise ValueError(
                    f"{option.name}={value!r} is about looks at held-out rows, and with a tau there are none. Leave "
                    f"tau or {option.name} out."
                )

    @property
    def needs_loss(self) -> bool:
        """Whether the statistic is divided by the loss of each step."""
        from .statistics import STATISTICS

        return STATISTICS[self.monitor].needs_loss if self.monitor != "auto" else self.tau is None

    def resolved(self) -> GradESConfig:
        """The same with the values that None and `"auto"` stand for, where they do not depend on the component."""
        alpha = self.alpha if self.alpha is not None else 0.0 if self.tau is None else 0.5
        return dataclasses.replace(self, alpha=alpha)

    def to_dict(self) -> dict[str, Any]:
        """All options as a dict that JSON can hold; `GradESConfig(**d)` makes an equal config."""
        return dataclasses.asdict(self)

    def state_dict(self) -> dict[str, Any]:
        """`to_dict()` for files with sorted keys (trainer_state.json): the order of `tau` counts, so it is a list."""
        tau = [list(item) for item in self.tau.items()] if isinstance(self.tau, dict) else self.tau
        return {**self.to_dict(), "tau": tau}


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` without what earlier versions had besides; a ValueError names what is unknown, and what is near."""
    known = [option.name for option in dataclasses.fields(GradESConfig)]
    if "criterion" in options:  # a whole config of an earlier version, in which `rise` was another criterion's option
        options = {name: value for name, value in options.items() if name != "rise"}
    for name, value in options.items():
        if name in DELETED and value not in DELETED[name]:
            raise ValueError(
                f"{name}={short(value)} is gone since grades-hf 0.2.0, because it lost against the others "
                "(docs/criteria.md names the commit that has it). Leave it out."
            )
        if name not in known and name not in DELETED:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(known)}."
            raise ValueError(f"GradES has no option {name}={short(value)}; {hint}")
    return {name: value for name, value in options.items() if name in known and value is not None}


_made_by_dataclass = GradESConfig.__init__


@functools.wraps(_made_by_dataclass)
def _init(self: GradESConfig, *values: Any, **options: Any) -> None:
    _made_by_dataclass(self, *values, **_known(options))


GradESConfig.__init__ = _init  # type: ignore[method-assign]


def make_config(config: GradESConfig | Mapping[str, Any] | None = None, **options: Any) -> GradESConfig:
    """A config from what users pass: a `GradESConfig`, a dict of its fields or None, and single options over it.

    Raises:
        ValueError: it is none of these, or an option is unknown or has a value that it cannot have.
    """
    if config is None:
        return GradESConfig(**options)
    if isinstance(config, GradESConfig):
        return dataclasses.replace(config, **_known(options))
    if isinstance(config, Mapping):
        return GradESConfig(**{**config, **options})
    raise ValueError(
        f"config={short(config)} must be a GradESConfig or a dict of its fields. A threshold goes by name: "
        "GradESCallback(tau=0.5)."
    )


def helps() -> Iterable[tuple[str, str, str]]:
    """Name, default and help text of every option."""
    for option in dataclasses.fields(GradESConfig):
        yield option.name, repr(option.default), option.metadata["help"]
