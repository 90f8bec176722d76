"""The yardstick of overhead is the model that it is held against: its loss and gradients are those of plain torch."""

from __future__ import annotations

import torch

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
