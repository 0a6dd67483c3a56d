"""Labels that tell people what a component is: group, projection and tower. They decide nothing but which tau applies.

Names differ from model to model, so labels are read off names where the field agrees on them, and fall back to the
model's own name where it does not. Nothing here decides whether a matrix is tracked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Protocol


class Labelled(Protocol):
    """What has a name and the label of its projection."""

    name: str
    projection: str


ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|expert", re.IGNORECASE)
_MIXER = re.compile(r"mixer|mamba|ssm|recurrent|temporal|lru|lstm|conv|hyena|retention", re.IGNORECASE)

# What the projections of attention and feed-forward layers are called in the models of Transformers.
_ATTENTION_NAMES = {
    "q": "q q_proj query query_proj q_lin wq q_attn q_head linear_q to_q projection_query project_q",
    "k": "k k_proj key key_proj k_lin wk k_attn k_head linear_k to_k projection_key project_k",
    "v": "v v_proj value value_proj v_lin wv v_attn v_head linear_v to_v projection_value project_v",
    "o": "o o_proj out_proj out_lin wo dense c_proj proj projection out output linear_out output_proj to_out post_proj "
    "attention_out",
    "qkv": "qkv qkv_proj c_attn query_key_value wqkv in_proj in_proj_weight w_pack to_qkv att_proj",
}
_MLP_NAMES = {
    "gate": "gate gate_proj w1 wi_0 gate_linear proj_up_gate",
    "up": "up up_proj w3 v1 wi wi_1 fc1 fc_in c_fc lin1 linear1 linear_1 linear_fc1 dense_h_to_4h dense1 layer_1 "
    "pwconv1 ffn intermediate_dense intermediate intermediate_query proj_up in_proj",
    "gate_up": "gate_up gate_up_proj input_linear gate_and_up_proj",
    "down": "down down_proj w2 wo fc2 fc_out c_proj lin2 linear2 linear_2 linear_fc2 dense_4h_to_h dense2 layer_2 "
    "pwconv2 ffn_output output_dense output output_query output_linear proj_down out_proj",
}
_PROJECTIONS = {
    "attention": {name: label for label, names in _ATTENTION_NAMES.items() for name in names.split()},
    "mlp": {name: label for label, names in _MLP_NAMES.items() for name in names.split()},
}

_TOWERS = {
    "vision": re.compile(r"vision|visual|image|img|pixel|video|(^|_)vit(_|$)", re.IGNORECASE),
    "audio": re.compile(r"audio|speech|acoustic|wav", re.IGNORECASE),
    "language": re.compile(r"language|text|llm", re.IGNORECASE),
}
_GENERIC = {"model", "base_model", "transformer", "backbone", "module"}


def group_of(path: Sequence[tuple[str, str]], *, inside: bool, expert: bool) -> str:
    """`"attention"`, `"experts"`, `"mixer"` or `"mlp"` inside a block, `"other"` outside.

    `path` holds (attribute name, class name) of the modules from the block down to the matrix. The innermost module
    whose name or class tells decides; where none does it is a feed-forward matrix.
    """
    if not inside:
        return "other"
    if expert:
        return "experts"
    if path and ATTENTION.search(path[-1][0]):
        return "attention"
    for attribute, class_name in reversed(path[:-1]):
        for label in (attribute, class_name):
            if ATTENTION.search(label):
                return "attention"
            if _MLP.search(label):
                return "mlp"
        if _MIXER.search(attribute):  # not the class, which begins with the model's name: ConvBert, RecurrentGemma
            return "mixer"
    return "mlp"


def projection_of(path: Sequence[tuple[str, str]], name: str, group: str) -> str:
    """`"q"`, `"gate"`, `"down"`, ..., or the module's own name where it is not one of the field's common names.

    A number in a list has no name of its own and takes that of the list.
    """
    named = [segment for segment in name.split(".") if not segment.isdigit()]
    own = named[-1] if named else name
    if group in ("other", "mixer"):
        return own
    table = _PROJECTIONS["attention" if group == "attention" else "mlp"]
    holder = path[-2][0] if len(path) > 1 else ""
    if own in ("dense", "linear") and (holder.lower() in table or group != "attention"):  # BERT: intermediate.dense
        own = holder or own
    return table.get(own.lower(), own)


def refine_projections(components: Sequence[Labelled], shapes: Mapping[str, tuple[int, int]]) -> None:
    """An up projection twice as wide as its down projection is a fused gate and up projection (ModernBERT's `Wi`)."""
    by_parent: dict[str, dict[str, Labelled]] = {}
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
    """A label for each list of blocks, given its path; all None where the model has one tower only.

    It is read off the part of the path in which the lists differ: the modality that it names, else its first name.
    Beside a vision or audio tower, what has no name of its own (or is an encoder or decoder) is language.
    """
    parents = [path.split(".")[:-1] for path in paths]
    common = len(list(takewhile(lambda level: len(set(level)) == 1, zip(*parents, strict=False))))
    labels: list[str | None] = []
    for parent in parents:
        own = [segment for segment in parent[common:] if segment not in _GENERIC and not segment.isdigit()]
        modality = (tower for tower, words in _TOWERS.items() if any(map(words.search, own)))
        labels.append(next(modality, own[0] if own else None))
    if any(label in ("vision", "audio") for label in labels):
        labels = ["language" if label in (None, "encoder", "decoder") else label for label in labels]
    return labels if len(set(labels)) > 1 else [None] * len(labels)
