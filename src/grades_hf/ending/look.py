"""As if nobody had looked: modes, buffers and random states after a look are those of before."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ..parallel.sharded import reshard


@contextlib.contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode meanwhile; afterwards modes, buffers and random states are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with same_random_states(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
        reshard(model)


@contextlib.contextmanager
def same_random_states(collate: Any = None) -> Iterator[None]:
    """Random numbers begin at the same place at each call; afterwards all random states are as before.

    Args:
        collate: A collator whose own generators are put back, too.
    """
    python, array = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    generators = list(_generators(collate, 3))
    try:
        with torch.random.fork_rng(devices):
            seed()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        for put_back in generators:
            put_back()


def seed() -> None:
    """All random numbers begin at the same place."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _generators(owner: Any, depth: int) -> Iterator[Callable[[], Any]]:
    """What puts the random generators among the attributes of an object, and of the objects in it, back."""
    own = getattr(owner, "__dict__", None)
    if not isinstance(own, dict) or isinstance(owner, (nn.Module, type)) or not depth:
        return
    for name, value in list(own.items()):
        if isinstance(value, torch.Generator):
            yield functools.partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield functools.partial(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            yield functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif value is None and "generator" in name:  # made when it is first asked for
            yield functools.partial(own.__setitem__, name, None)
        else:
            yield from _generators(value, depth - 1)
