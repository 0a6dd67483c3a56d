"""GradESConfig: every option of the method, validated when it is made."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

MONITORS = (
    "auto", "gradient_change", "gradient_norm", "weight_change", "relative_change", "signal_to_noise", "evidence",
    "gradient_per_loss", "gradient_product",
)  # fmt: skip
REDUCTIONS = ("sum", "mean")
# Criterion -> the options that it takes; the others have their defaults.
CRITERIA: dict[str, tuple[str, ...]] = {
    "threshold": ("tau", "patience"),
    "no_new_minimum": ("window", "smoothing"),
    "rise": ("rise", "smoothing"),
    "no_significant_fall": ("window", "significance"),
    "significant_rise": ("window", "significance"),
    "pflug": ("window",),
}
# Criterion -> defaults of the options that depend on it; "" stands for all others.
DEFAULTS: dict[str, dict[str, float]] = {
    "threshold": {"alpha": 0.5, "quorum": 0.0, "max_frozen_fraction": 1.0},
    "rise": {"alpha": 0.0, "quorum": 0.5, "max_frozen_fraction": 0.5},
    "": {"alpha": 0.0, "quorum": 0.0, "max_frozen_fraction": 1.0},
}

WINDOW = "a part of the run in (0, 1), or a whole number of optimizer steps"


@dataclass
class GradESConfig:
    r"""Options of GradES (arXiv 2509.01842): when is a matrix frozen, and which ones are watched.

    **With `tau`** it is the paper's method. At optimizer step `t` (1-based) a component `W` that is not frozen yet
    freezes when

    $$ t > \lceil \alpha T \rceil \quad\text{and}\quad G_W(t) < \tau_W \text{ (for `patience` checks in a row)} $$

    where `T` is the planned number of optimizer steps and `G_W(t)` the statistic that `monitor` names. It is
    frozen before the update of step `t`: that update does not touch it any more (Algorithm 1).

    **Without** training ends when the model overfits: when in half of the components the smoothed statistic (the
    gradient by the loss) has risen by half over its own minimum, `criterion="rise"`. Until then nothing is frozen.
    Criteria other than the paper's take the place of the second condition; they compare the statistic with its own past
    and need no `tau`. They look at the gradient before clipping, and of a LoRA pair at that of B alone.

    Args:
        tau: Threshold on the statistic, the paper's $\tau$ ($\tau_r$ for LoRA; Table 9), greater than 0 and in the
            unit of the statistic. A number for all components, or a mapping from what a component is to a number.
            A key of the mapping is

            * a label: a tower (`"vision"`, `"language"`, ...), a group (`"attention"`, `"mlp"`, `"experts"`, ...), a
              projection (`"q"`, `"up"`, `"down"`, ...), or several of them joined by dots (`"vision.attention"`);
              `"mlp"` also stands for experts that no more specific key names;
            * a component's full name, the end of it (`"q_proj"`), or a regular expression that matches all of it;
            * `".*"`, which stands for all that no other key matches.

            The most specific key wins: full name, then name ending or expression (the first one in the mapping that
            matches), then labels, where a projection outweighs a group and a tower together, and a group outweighs a
            tower, then `".*"`. Every key must match a component and every component must get a threshold.
            Needed by `criterion="threshold"`, refused with any other.
        alpha: Grace ratio in [0, 1). Default: 0.5 with a threshold (the paper uses 0.55), else 0.
            Nothing freezes at the first `ceil(alpha * T)` optimizer steps, computed in decimal arithmetic: 0.55 of 100
            steps are 55.
        monitor: The statistic. `"auto"` (default) takes, with a threshold, the paper's choice for each component:
            gradient_change for full weights, gradient_norm for adapters; gradient_per_loss with `"rise"`, and
            gradient_norm with any other criterion.
            `"gradient_change"`: $\sum_{ij} |g_t - g_{t-1}|$ (Eq. 1); `"gradient_norm"`: $\sum_{ij} |g_t|$ (Eq. 3,
            A and B of a LoRA pair added); `"weight_change"`: $\sum_{ij} |W_{t-1} - W_{t-2}|$, the last completed
            update, the scale on which thresholds of the PyPI package `grades` live; `"gradient_per_loss"`:
            $\sum_{ij} |g_t| / L_t$ with the loss of the step, which the model must return. Some that have no scale (see
            `monitors/`): `"relative_change"`: $\|g_t - g_{t-1}\|_2 / (\|g_t\|_2 + \|g_{t-1}\|_2)$, which rises
            towards 0.707 as signal gives way to noise; `"signal_to_noise"`: $\sum_{ij} |\hat m| / \sqrt{\hat v}$ of
            Adam's moments, which falls; `"evidence"`: the mean square of the gradient by its variance, from Adam's
            moments, with `tau=1` Mahsereci and Hennig's evidence criterion. `"gradient_product"`:
            $\sum_{ij} g_t g_{t-1}$, for `criterion="pflug"` only, whose automatic choice it is.
        reduction: `"sum"` (default, as in the paper) or `"mean"`: divided by the number of measured elements, which
            makes matrices of different size comparable.
        criterion: The verdict on the values of a component's statistic. `"auto"` (default): `"threshold"` where there
            is a tau, else `"rise"`. `"threshold"`: the paper's. The others observe from the first step on, also in the
            grace period, and begin anew as long as the learning rate rises (warm-up). `"no_new_minimum"`: the smoothed
            statistic has had no new minimum for a `window`; `"rise"`: it has risen by the part `rise` over its minimum;
            `"no_significant_fall"`, `"significant_rise"`: over the last `window` it has no significant downward trend
            any more, or has a significant upward one; `"pflug"`: Pflug's test, the inner products of successive
            gradients add up to less than 0. Several names joined by `+` (`"rise+significant_rise"`) with the options of
            each: all say so at the same check.
        patience: Number of consecutive checks below tau, counted after the grace period, default 1 (as in the paper).
        window: How far criteria look back (`"pflug"`: how far at least): a part of the run if below 1, else a whole
            number of optimizer steps. Default 0.1.
        smoothing: Decay per optimizer step of the moving average that `"no_new_minimum"` and `"rise"` look
            at, in [0, 1). Default: that of an average over a tenth of the run, but not less than 10 steps (0.9) or more
            than 100 (0.99). 0: the values as they are.
        rise: The part of its minimum by which the smoothed statistic has risen, greater than 0; default 0.5.
        significance: Level of the trend tests, greater than 0 and at most 0.5; default 0.05.
        quorum: The part of the components, in [0, 1], that must be frozen or have converged at a check, before any that
            has converged freezes. Default: 0.5 with `"rise"`, else 0 (each by itself).
        check_every: Optimizer steps from one check to the next, default 1. Checks are made at steps that
            `check_every` divides. What is measured does not depend on it: always the change over one step.
        target_modules: What to watch, by PEFT's conventions: a list of names or name endings, a regular expression
            that matches the full name, or `"all-linear"`. Default None: every attention and feed-forward matrix in
            the model's repeated blocks. Names are module paths in the model without PEFT's prefix.
        exclude_modules: What not to watch, same conventions, default None.
        max_frozen_fraction: Training ends when this part of the components, in (0, 1], is frozen. Default: 0.5 with
            `"rise"`, else 1.0.
        skip_validation: Default True: no evaluation pass during training. False: evaluation goes on as usual.
        keep_frozen: Default False: after training `requires_grad` is as it was before. True: what was frozen stays.
        sample_size: Number of elements, 1 or more, that the statistic is estimated from in each tensor: a fixed random
            sample of it. Default None: all of them, exactly. 1024 elements have a relative error of 5 % in the median
            matrix of SmolLM2-135M, and of 10 % or less in nine of ten (see `monitors/sampling.py`).
        delay_transfer: Default False: the values of a check are on the host before the update of its step, so a GPU's
            queue runs empty at each check. True: they are read one step later, when they have long arrived. What falls
            below tau at step `t` then freezes at step `t + 1` and is still updated at step `t`; the values are recorded
            at the step that they were measured at.
        freeze_prefix: Default False. True: as soon as all components of the lowest blocks are frozen, whatever else
            is trained there and below (norms, biases, embeddings) freezes too, so that the backward pass ends at the
            lowest live block. The paper keeps training those; its matrices freeze by the same rule.
        merge_frozen_adapters: Default False. True: the update of a frozen LoRA pair is folded into its base weight
            while training goes on, so that it costs nothing; it is taken out for every save and at the end.
        max_recompilations: How many times, 1 or more, freezing may recompile a model under `torch.compile`; default 4
            (`freeze_prefix` adds two). Matrices stop being updated at their step all the same; the saving comes in
            that many batches.
        count_flops: Default True: the FLOPs of some steps are counted, which `GradES.savings()` needs.

    Raises:
        ValueError: an option has a value that it cannot have.

    Example:
        ```python
        GradESConfig()
        GradESConfig(tau=0.025, alpha=0.55)
        GradESConfig(tau={"attention": 0.02, "mlp": 0.04, r".*layers\.0\..*": 0.1}, patience=2)
        ```
    """

    tau: float | dict[str, float] | None = None
    alpha: float | None = None
    monitor: str = "auto"
    reduction: str = "sum"
    criterion: str = "auto"
    patience: int = 1
    window: float = 0.1
    smoothing: float | None = None
    rise: float = 0.5
    significance: float = 0.05
    quorum: float | None = None
    check_every: int = 1
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    max_frozen_fraction: float | None = None
    skip_validation: bool = True
    keep_frozen: bool = False
    sample_size: int | None = None
    delay_transfer: bool = False
    freeze_prefix: bool = False
    merge_frozen_adapters: bool = False
    max_recompilations: int = 4
    count_flops: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("monitor", MONITORS), ("reduction", REDUCTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}.")
        self._check_criterion()
        pairs: Any = self.tau
        if isinstance(pairs, list) and all(isinstance(item, (list, tuple)) and len(item) == 2 for item in pairs):
            self.tau = dict(pairs)  # from `state_dict`
        if isinstance(self.tau, Mapping):
            if not self.tau:
                raise ValueError("tau={} holds no threshold; pass a number, or a mapping such as {'attention': 0.1}.")
            for key, value in self.tau.items():
                if not isinstance(key, str) or not key:
                    raise ValueError(f"tau has the key {key!r}; keys are group names or patterns, as strings.")
                _check_tau(f"tau[{key!r}]", value)
            self.tau = {key: float(value) for key, value in self.tau.items()}
        elif self.tau is not None:
            _check_tau("tau", self.tau)
            self.tau = float(self.tau)
        if self.alpha is not None and (not _is_real(self.alpha) or not 0 <= self.alpha < 1):
            raise ValueError(
                f"alpha={self.alpha!r} must be a number in [0, 1): the part of the run in which nothing freezes "
                "(the paper uses 0.55; 1 would never freeze anything)."
            )
        if self.quorum is not None and (not _is_real(self.quorum) or not 0 <= self.quorum <= 1):
            raise ValueError(
                f"quorum={self.quorum!r} must be a number in [0, 1]: the part of the components that must have "
                "converged before any freezes (0: each by itself)."
            )
        for name, unit in (
            ("patience", "checks"),
            ("check_every", "optimizer steps"),
            ("sample_size", "elements"),
            ("max_recompilations", "recompilations"),
        ):
            number = getattr(self, name)
            if name == "sample_size" and number is None:
                continue
            if not is_count(number):
                raise ValueError(f"{name}={number!r} must be a whole number of {unit}, 1 or more.")
            setattr(self, name, int(number))
        fraction = self.max_frozen_fraction
        if fraction is not None and (not _is_real(fraction) or not 0 < fraction <= 1):
            raise ValueError(
                f"max_frozen_fraction={self.max_frozen_fraction!r} must be a number in (0, 1]: the part of the "
                "components at which training ends (1.0: when all are frozen)."
            )
        for name in ("alpha", "quorum", "max_frozen_fraction"):
            if getattr(self, name) is not None:
                setattr(self, name, float(getattr(self, name)))
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if isinstance(names, (list, tuple, set, frozenset)):
                names = list(names)
                setattr(self, name, names)
            valid = names is None or (isinstance(names, (str, list)) and len(names) > 0)
            if not valid or (isinstance(names, list) and not all(isinstance(item, str) and item for item in names)):
                raise ValueError(
                    f"{name}={names!r} must be a list of module names or name endings, or a regular expression as one "
                    "string; leave it out for the default."
                )
            if isinstance(names, str):
                try:
                    re.compile(names)
                except re.error as error:
                    raise ValueError(f"{name}={names!r} is no valid regular expression: {error}.") from error
        switches = ("skip_validation", "keep_frozen", "freeze_prefix", "merge_frozen_adapters", "count_flops")
        for name in (*switches, "delay_transfer"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")

    def _check_criterion(self) -> None:
        """Refuse options that the criterion does not take, and values that they cannot have."""
        names = self.rule.split("+") if isinstance(self.criterion, str) else []
        if not names or not set(names) <= CRITERIA.keys() or len(set(names)) < len(names):
            raise ValueError(
                f"criterion={self.criterion!r} is unknown; use one of {', '.join(CRITERIA)}, or several different ones "
                "joined by '+'."
            )
        names = [name for name in CRITERIA if name in names]  # their order means nothing
        if self.criterion != "auto":
            self.criterion = "+".join(names)
        rule, own = f"criterion={self.rule!r}", self._options()
        self._check_signs("pflug" in names, len(names))
        if self.tau is None and "tau" in own:
            others = ", ".join(repr(name) for name in CRITERIA if "tau" not in CRITERIA[name])
            raise ValueError(
                "tau is missing: criterion='threshold' needs a threshold on the statistic, such as tau=0.5. Criteria "
                f"without one: {others}."
            )
        if self.tau is not None and "tau" not in own:
            raise ValueError(
                f"tau={self.tau!r} is a threshold, and criterion={self.criterion!r} has none: leave tau out, or use "
                "criterion='threshold'."
            )
        for option in dataclasses.fields(self):
            users = [repr(name) for name, options in CRITERIA.items() if option.name in options]
            if users and option.name not in own and getattr(self, option.name) != option.default:
                raise ValueError(
                    f"{option.name}={getattr(self, option.name)!r} is no option of {rule}; "
                    f"it is one of {' and '.join(users)}."
                )
        for name, fits, what in (
            ("window", _is_window, WINDOW),
            ("smoothing", lambda x: 0 <= x < 1, "a number in [0, 1): the decay of a moving average per optimizer step"),
            ("rise", lambda x: x > 0, "a finite number greater than 0: a part of the minimum"),
            ("significance", lambda x: 0 < x <= 0.5, "a number in (0, 0.5]: the level of a one-sided test"),
        ):  # fmt: skip
            value = getattr(self, name)
            if name == "smoothing" and value is None:
                continue
            if not _is_real(value) or not fits(value):
                raise ValueError(f"{name}={value!r} must be {what}.")
            setattr(self, name, float(value))

    def _check_signs(self, pflug: bool, number: int) -> None:
        """`"pflug"` and `"gradient_product"`, whose values have both signs, go together and with nothing else."""
        if pflug and number > 1:
            raise ValueError(
                f"criterion={self.criterion!r} combines 'pflug' with criteria that look at another statistic: use "
                "either alone."
            )
        if pflug and self.monitor == "auto":
            self.monitor = "gradient_product"
        if pflug and self.monitor != "gradient_product":
            raise ValueError(
                f"monitor={self.monitor!r} does not go together with criterion='pflug', which adds up inner products "
                "of gradients: leave monitor out."
            )
        if self.monitor == "gradient_product" and not pflug:
            raise ValueError(
                "monitor='gradient_product' has values of both signs, which only criterion='pflug' can judge: use it "
                "(with alpha=0.9999 it only records), or another monitor."
            )

    @property
    def rule(self) -> str:
        """The criterion that is at work, where `criterion` is `"auto"`."""
        return self.criterion if self.criterion != "auto" else "rise" if self.tau is None else "threshold"

    @property
    def needs_loss(self) -> bool:
        """Whether the statistic is taken in proportion to the loss of each step."""
        automatic = self.monitor == "auto" and self.rule == "rise"
        return automatic or self.monitor == "gradient_per_loss"

    def resolved(self, total_steps: int) -> GradESConfig:
        """The same for a run of that many steps, with the values that None and `criterion="auto"` stand for."""
        values: dict[str, Any] = dict(DEFAULTS.get(self.rule, DEFAULTS[""]))
        if "smoothing" in self._options():
            values["smoothing"] = 1 - 1 / min(100, max(10, total_steps / 10))
        values = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, criterion=self.rule, **values)

    def _options(self) -> set[str]:
        """The options that the criterion takes."""
        return {option for name in self.rule.split("+") for option in CRITERIA[name]}

    def to_dict(self) -> dict[str, Any]:
        """All options as a dict that JSON can hold; `GradESConfig(**d)` makes an equal config."""
        return dataclasses.asdict(self)

    def state_dict(self) -> dict[str, Any]:
        """`to_dict()` for files with sorted keys (trainer_state.json): the order of `tau` counts, so it is a list."""
        tau = [list(item) for item in self.tau.items()] if isinstance(self.tau, dict) else self.tau
        return {**self.to_dict(), "tau": tau}


def is_count(value: object) -> bool:
    """Whether `value` is a whole number of at least 1 (a bool is none)."""
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1


def _is_window(value: float) -> bool:
    return 0 < value < 1 or (value >= 1 and value == int(value))


def _is_real(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _check_tau(name: str, value: object) -> None:
    if not _is_real(value) or value <= 0:  # type: ignore[operator]
        raise ValueError(
            f"{name}={value!r} must be a finite number greater than 0: a matrix freezes when its gradient statistic "
            "falls below it. Record a run without freezing to see which values occur."
        )
