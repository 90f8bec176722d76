"""The yardstick of overhead: this project's kernels called one after another on plain tensors, and nothing else.

The same model and step as `megatron3d_gpt.py` in one process: no layers, units, schedule, axes or checks, gradients
that are written where the optimizer reads them, one update of all parameters at once.

Shapes: S sequence, B micro-batch, H hidden, N heads, D head size, V vocabulary, T = S * B tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron3d_kernels.registry import Registry
from torch import Tensor
from torch.optim.adam import adam

from tools.bench.peers.trainee import Trainee, tokens_and_labels
from tools.bench.peers.work import LEARNING_RATE, WEIGHT_DECAY, Work

KERNELS = Registry()
INIT_STD, EPSILON = 0.02, 1e-5


class Parameters:
    """All parameters in one buffer each of weights, fp32 gradients, fp32 master weights and moments."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self.master = torch.zeros(sum(sizes)).normal_(std=INIT_STD)
        for name, initial in zip(shapes, self.master.split(sizes), strict=True):
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                initial.fill_(1.0)
        self.gradients, self.moments = torch.zeros_like(self.master), [torch.zeros_like(self.master) for _ in range(2)]
        self.weights = self.master if dtype == torch.float32 else self.master.to(dtype)
        self.count = torch.zeros(())
        self.weight: dict[str, Tensor] = {}
        self.gradient: dict[str, Tensor] = {}
        for name, weight, gradient in zip(shapes, self.weights.split(sizes), self.gradients.split(sizes), strict=True):
            self.weight[name] = weight.view(shapes[name])
            self.gradient[name] = gradient.view(shapes[name])
            if "norm" in name or name == "positions":  # those whose gradients autograd brings
                self.weight[name].requires_grad_()

    @torch.no_grad()
    def update(self) -> float:
        """One step of AdamW; returns the norm of the gradients."""
        for name, weight in self.weight.items():
            if weight.grad is not None:
                self.gradient[name].copy_(weight.grad)
                weight.grad = None
        norm = float(torch.linalg.vector_norm(self.gradients))
        adam(
            [self.master],
            [self.gradients],
            [self.moments[0]],
            [self.moments[1]],
            [],
            [self.count],
            fused=True,
            decoupled_weight_decay=True,
            amsgrad=False,
            maximize=False,
            beta1=0.9,
            beta2=0.999,
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            eps=1e-8,
        )
        if self.weights is not self.master:
            self.weights.copy_(self.master)
        return norm


class _Linear(torch.autograd.Function):
    """The three products; gradients overwrite those of the step before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Parameters, name: str, has_bias: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parameters, ctx.name, ctx.has_bias = parameters, name, has_bias
        bias = parameters.weight[f"{name}.bias"] if has_bias else None
        return KERNELS.linear(x, parameters.weight[name], bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), weights, gradients = ctx.saved_tensors, ctx.parameters.weight, ctx.parameters.gradient
        grad_in = KERNELS.input_gradient(grad, weights[ctx.name])
        grad_TO, x_TI = grad.flatten(0, -2), x.flatten(0, -2)
        if gradients[ctx.name].dtype == grad.dtype:
            KERNELS.add_weight_gradient(gradients[ctx.name], grad_TO, x_TI, overwrites=True)
        else:
            gradients[ctx.name].copy_(KERNELS.weight_gradient(grad_TO, x_TI))
        if ctx.has_bias:
            gradients[f"{ctx.name}.bias"].copy_(grad_TO.sum(0))
        return grad_in, None, None, None


class _Lookup(torch.autograd.Function):
    """Rows of the table, whose gradients come after those of the output product."""

    @staticmethod
    def forward(ctx: Any, rows_SB: Tensor, parameters: Parameters, _first: Tensor) -> Tensor:
        ctx.save_for_backward(rows_SB)
        ctx.parameters = parameters
        return torch.nn.functional.embedding(rows_SB, parameters.weight["table"])

    @staticmethod
    def backward(ctx: Any, grad_SBH: Tensor) -> tuple[None, None, None]:
        (rows_SB,), table = ctx.saved_tensors, ctx.parameters.gradient["table"]
        table.index_add_(0, rows_SB.flatten(), grad_SBH.flatten(0, 1).to(table.dtype))
        return None, None, None


class _Loss(torch.autograd.Function):
    """The loss of each token; its gradient overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, logits_SBV: Tensor, target_SB: Tensor) -> Tensor:
        width = logits_SBV.shape[-1]
        sums = KERNELS.local_softmax_sums(logits_SBV, target_SB, 0, width, overwrite=True)
        ctx.save_for_backward(logits_SBV, target_SB, *sums)
        row_max, sum_exp, target_logit = sums
        return sum_exp.log() + row_max - target_logit

    @staticmethod
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None]:
        logits_SBV, target_SB, row_max, sum_exp, target_logit = ctx.saved_tensors
        numbers = (target_SB, row_max, sum_exp, target_logit, grad_SB)
        options = {"vocab_start": 0, "num_valid": logits_SBV.shape[-1], "in_place": True, "overwritten": True}
        return KERNELS.cross_entropy_backward(logits_SBV, *numbers, **options), None


def losses(parameters: Parameters, work: Work, tokens_SB: Tensor, labels_SB: Tensor) -> Tensor:
    """The loss of each token, fp32 [S, B]."""
    weight, hidden = parameters.weight, work.hidden_size

    def norm(x_SBH: Tensor, name: str) -> Tensor:
        return KERNELS.layer_norm(x_SBH, weight[f"{name}.weight"], weight[f"{name}.bias"], EPSILON)

    def linear(x: Tensor, name: str, has_bias: bool = True) -> Tensor:
        return _Linear.apply(x, parameters, name, has_bias)

    x_SBH = _Lookup.apply(tokens_SB, parameters, weight["positions"]) + weight["positions"].unsqueeze(1)
    for layer in range(work.num_layers):
        qkv = linear(norm(x_SBH, f"{layer}.norm1"), f"{layer}.qkv").split(hidden, -1)
        heads = [part.unflatten(-1, (work.num_attention_heads, -1)).permute(1, 2, 0, 3) for part in qkv]  # [B, N, S, D]
        y_BNSD = KERNELS.attention(*heads, mask=None, probability=0.0, is_causal=True)
        x_SBH = x_SBH + linear(y_BNSD.permute(2, 0, 1, 3).flatten(2), f"{layer}.projection")
        inner = KERNELS.activation(linear(norm(x_SBH, f"{layer}.norm2"), f"{layer}.up"), "gelu")
        x_SBH = x_SBH + linear(inner, f"{layer}.down")
    return _Loss.apply(linear(norm(x_SBH, "norm"), "table", has_bias=False), labels_SB)


def shapes_of(work: Work) -> dict[str, tuple[int, ...]]:
    """The parameters by name."""
    hidden = work.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"table": (work.vocab_size, hidden), "positions": (work.seq_length, hidden)}
    wide = {"qkv": (3 * hidden, hidden), "projection": (hidden, hidden), "up": (4 * hidden, hidden)}
    for layer in range(work.num_layers):
        for name, shape in {**wide, "down": (hidden, 4 * hidden)}.items():
            shapes |= {f"{layer}.{name}": shape, f"{layer}.{name}.bias": shape[:1]}
    norms = ["norm", *(f"{layer}.norm{half}" for layer in range(work.num_layers) for half in (1, 2))]
    return shapes | {f"{norm}.{one}": (hidden,) for norm in norms for one in ("weight", "bias")}


def build(work: Work) -> Trainee:
    """The model in one process."""
    dtype = torch.bfloat16 if work.dtype == "bf16" else torch.float32
    parameters = Parameters(shapes_of(work), dtype)
    tokens_SB, labels_SB = (x_BS.t().contiguous() for x_BS in tokens_and_labels(work))

    def step() -> float:
        loss = losses(parameters, work, tokens_SB, labels_SB).mean()
        loss.backward()
        parameters.update()
        return loss.item()

    return Trainee(step, parameters.master.numel())
