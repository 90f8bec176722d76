"""The yardstick of overhead: it has the loss and gradients of plain torch, and this project's step makes hardly any
passes over tensors that it does not make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tools.bench.peers import bare_kernels, megatron3d_gpt
from tools.bench.peers.bare_kernels import Parameters, losses, shapes_of
from tools.bench.peers.plain_torch import PlainGPT
from tools.bench.peers.trainee import cross_entropy, tokens_and_labels
from tools.bench.peers.work import Work

WORK = Work(num_layers=2, hidden_size=32, num_attention_heads=2, seq_length=16, vocab_size=64, micro_batch=3)


def name_of(theirs: str) -> str:
    """Of a parameter of plain torch's model."""
    words = theirs.removeprefix("blocks.").removesuffix(".weight").replace("attention_norm", "norm1")
    words = words.replace("mlp_norm", "norm2").replace("tokens", "table")
    return f"{words}.weight" if "norm" in words and not words.endswith("bias") else words


def test_the_bare_kernels_have_the_loss_and_gradients_of_plain_torch() -> None:
    torch.manual_seed(0)
    model, parameters = PlainGPT(WORK), Parameters(shapes_of(WORK), torch.float32)
    theirs = {name_of(name): parameter for name, parameter in model.named_parameters()}
    assert theirs.keys() == parameters.weight.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameters.weight[name].copy_(parameter)
    tokens_BS, labels_BS = tokens_and_labels(WORK)
    wanted = cross_entropy(model(tokens_BS), labels_BS)
    wanted.backward()
    found = losses(parameters, WORK, tokens_BS.t(), labels_BS.t()).mean()
    torch.testing.assert_close(found, wanted)
    found.backward()
    norm = parameters.update()
    assert norm > 0
    for name, parameter in theirs.items():
        torch.testing.assert_close(parameters.gradient[name], parameter.grad, msg=name)


class ElementsTouched(TorchDispatchMode):
    """Counts the elements of all tensors that operations read and write, in place once; views and tensors without
    values yet are neither."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view and "empty" not in str(operation):
            leaves = {id(one): one for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)}
            self.count += sum(one.numel() for one in leaves.values())
        return result


def elements_of(step: Callable[[], float]) -> int:
    """Of a step that is not the first."""
    step()
    with ElementsTouched() as touched:
        step()
    return touched.count


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_touches_hardly_more_elements_than_the_bare_kernels(dtype: str) -> None:
    work = replace(WORK, hidden_size=64, seq_length=32, vocab_size=512, dtype=dtype, threads=1)
    bare, ours = (elements_of(module.build(work).step) for module in (bare_kernels, megatron3d_gpt))
    assert bare <= ours < 1.005 * bare
