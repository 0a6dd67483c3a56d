"""Labels that tell people what a component is: group, projection and tower. They decide nothing but which tau applies.

Names differ from model to model, so labels are read off names where the field agrees on them, and fall back to the
model's own name where it does not. Nothing here decides whether a matrix is tracked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .components import Component

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MIXER = re.compile(r"mixer|mamba|ssm|rwkv|recurrent|rglru|lstm|conv|hyena|retention", re.IGNORECASE)

# What the projections of attention and feed-forward layers are called in the models of Transformers.
_ATTENTION_NAMES = {
    "q": "q q_proj query q_lin wq query_proj q_attn linear_q to_q",
    "k": "k k_proj key k_lin wk key_proj linear_k to_k",
    "v": "v v_proj value v_lin wv value_proj linear_v to_v",
    "o": "o o_proj out_proj out_lin wo dense c_proj proj out output linear_out output_proj to_out resid_proj",
    "qkv": "qkv qkv_proj c_attn query_key_value wqkv in_proj in_proj_weight w_pack to_qkv",
}
_MLP_NAMES = {
    "gate": "gate gate_proj w1 wi_0 gate_linear",
    "up": "up up_proj w3 wi_1 wi fc1 fc_in c_fc lin1 linear1 dense_h_to_4h layer_1 intermediate_dense intermediate wi",
    "gate_up": "gate_up gate_up_proj input_linear gate_and_up_proj",
    "down": "down down_proj w2 wo fc2 fc_out c_proj lin2 linear2 dense_4h_to_h layer_2 output_dense output output_linear",
}
_PROJECTIONS = {
    "attention": {name: label for label, names in _ATTENTION_NAMES.items() for name in names.split()},
    "mlp": {name: label for label, names in _MLP_NAMES.items() for name in names.split()},
}

_TOWERS = {
    "vision": re.compile(r"vision|visual|image|vit$|pixel|video", re.IGNORECASE),
    "audio": re.compile(r"audio|speech|acoustic|wav", re.IGNORECASE),
    "language": re.compile(r"language|text|llm", re.IGNORECASE),
}
_GENERIC = {
    "model", "base_model", "transformer", "backbone", "module", "layers", "layer", "blocks", "block", "h",
    "encoder", "decoder", "stages", "resblocks", "groups",
}  # fmt: skip


def group_of(path: Sequence[tuple[str, str]], name: str, *, inside: bool, expert: bool) -> str:
    """`"attention"`, `"experts"`, `"mixer"` or `"mlp"` inside a block, `"other"` outside.

    `path` holds (attribute name, class name) of the modules from the block down to the matrix.
    """
    if not inside:
        return "other"
    parts = [part for segment in path for part in segment]
    if expert:
        return "experts"
    if any(ATTENTION.search(part) for part in parts):
        return "attention"
    owners = [part for segment in path[:-1] for part in segment]
    return "mixer" if any(_MIXER.search(part) for part in owners) else "mlp"


def projection_of(path: Sequence[tuple[str, str]], name: str, group: str) -> str:
    """`"q"`, `"gate"`, `"down"`, ..., or the module's own name where it is not one of the field's common names."""
    own = name.rpartition(".")[2]
    table = _PROJECTIONS["attention" if group == "attention" else "mlp"]
    if group in ("other", "mixer"):
        return own
    if own == "dense" and len(path) > 1:  # BERT: attention.output.dense, intermediate.dense, output.dense
        holder = path[-2][0].lower()
        if group != "attention" and holder in table:
            return table[holder]
    return table.get(own.lower(), own)


def refine_projections(components: Sequence[Component], shapes: Mapping[str, tuple[int, int]]) -> None:
    """An up projection twice as wide as its down projection is a fused gate and up projection (ModernBERT's `Wi`)."""
    by_parent: dict[str, dict[str, Component]] = {}
    for component in components:
        by_parent.setdefault(component.name.rpartition(".")[0], {})[component.projection] = component
    for family in by_parent.values():
        up, down = family.get("up"), family.get("down")
        if up is None or down is None or "gate" in family:
            continue
        rows, columns = shapes.get(up.name, (0, 0))[0], shapes.get(down.name, (0, 0))[1]
        if rows and rows == 2 * columns:
            up.projection = "gate_up"


def tower_labels(paths: Sequence[str]) -> list[str | None]:
    """A label for each list of blocks, given its path; all None where the model has one tower only."""
    labels: list[str | None] = []
    for path in paths:
        segments = path.split(".")
        modality = next((tower for tower, words in _TOWERS.items() if any(map(words.search, segments))), None)
        own = [segment for segment in segments if segment not in _GENERIC and not segment.isdigit()]
        side = next((segment for segment in reversed(segments) if segment in ("encoder", "decoder")), None)
        labels.append(modality or (own[-1] if len(paths) > 1 and own else None) or side)
    if any(label in ("vision", "audio") for label in labels):
        labels = ["language" if label in (None, "encoder", "decoder") else label for label in labels]
    return labels if len(set(labels)) > 1 else [None] * len(labels)
