"""The counter: equal to closed forms and to torch's own, and counting changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from grades_hf.record.counter import FlopCounter

WIDTH, FEED, LAYERS, HEADS, KV_HEADS, VOCABULARY, BATCH, LENGTH = 16, 40, 2, 4, 2, 64, 2, 10
HEAD = WIDTH // HEADS
TOKENS = BATCH * LENGTH
LINEAR = 2 * WIDTH * WIDTH + 2 * WIDTH * KV_HEADS * HEAD + 3 * WIDTH * FEED  # weights of a block's matrices
FORWARD_LINEAR = 2 * TOKENS * (LAYERS * LINEAR + WIDTH * VOCABULARY)
FORWARD_ATTENTION = LAYERS * 2 * (2 * BATCH * HEADS * LENGTH * LENGTH * HEAD)  # scores and weighted values
FORWARD = FORWARD_LINEAR + FORWARD_ATTENTION
FULL = 3 * FORWARD  # backward: input gradients and weight gradients


@pytest.fixture(autouse=True)
def no_mode_is_left() -> Iterator[None]:
    yield
    assert _get_current_dispatch_mode_stack() == []


def wide(attention: str = "eager") -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=FEED,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            attn_implementation=attention,
        )
    )


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def test_counts_equal_closed_forms_and_those_of_torch() -> None:
    with FlopCounter() as counter, FlopCounterMode(display=False) as expected:
        loss = wide()(**batch()).loss
        assert counter.total == FORWARD
        loss.backward()
    assert counter.total == expected.get_total_flops() == FULL


def test_the_attention_kernel_of_the_cpu_is_counted() -> None:
    with FlopCounter() as counter:
        loss = wide("sdpa")(**batch()).loss
        assert counter.total == FORWARD
        loss.backward()
    assert counter.total == FULL + FORWARD_ATTENTION // 2  # the kernel computes the scores again in backward


def test_counting_changes_no_bit() -> None:
    gradients = []
    for counted in (False, True):
        net = wide("sdpa").bfloat16()
        if counted:
            with FlopCounter():
                net(**batch()).loss.backward()
        else:
            net(**batch()).loss.backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(plain, counted) for plain, counted in zip(*gradients, strict=True))


def test_fused_experts_count_like_a_loop_over_experts() -> None:
    totals = []
    for implementation in ("eager", "grouped_mm"):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, experts_implementation=implementation,
        )  # fmt: skip
        model = MixtralForCausalLM(config)
        with FlopCounter() as counter:
            model(**batch()).loss.backward()
        totals.append(counter.total)
    assert totals[0] == totals[1]


def test_a_function_that_is_first_met_while_counting_is_still_compiled() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    function = torch.compile(lambda x: torch.relu(x @ x), backend="aot_eager")
    with FlopCounter():
        function(torch.ones(2, 2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    function(torch.ones(2, 2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
