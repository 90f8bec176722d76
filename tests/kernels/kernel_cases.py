"""What every implementation of every kernel must do, as functions of (device, dtype, registry).

The same cases run on the references, on Triton through its interpreter and on Triton on a GPU. Each compares values and
gradients with the formula in float64, written here from the paper and differentiated by autograd, on inputs that were
already rounded to the dtype under test. Sizes are odd on purpose: not powers of two, one column, no rows, strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from megatron3d_kernels import Registry
from megatron3d_kernels.adam import AdamStep, AdamTensors
from torch import Tensor

from tests.kernels.fp8_cases import FP8_CASES

Case = Callable[[torch.device, torch.dtype, Registry], None]
Operation = Callable[..., Tensor]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FP32_NOISE = 3e-6
"""Share of the largest value that fp32 sums of up to a few thousand terms may be off by: 2^-24 times a few dozen
roundings that do not all point one way."""


def assert_close(
    got: Tensor, want: Tensor, dtype: torch.dtype, what: str, *, floor: float = 0.0, rounded: float = 0.0
) -> None:
    """One rounding to the dtype (half a unit in the last place, a whole one at a boundary) plus noise of fp32 sums.

    floor: size of the terms inside, where they cancel to a smaller result; noise is a share of them.
    rounded: share of the largest value up to which terms inside are rounded to the dtype.
    """
    assert got.dtype == dtype, f"{what}: result is {got.dtype}, not {dtype}"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} is not {tuple(want.shape)}"
    if want.numel() == 0:
        return
    error = (got.double().cpu() - want.cpu()).abs()
    info = torch.finfo(dtype)
    largest = float(want.detach().abs().max())
    bound = want.abs().cpu() * info.eps + max(largest, floor) * FP32_NOISE + rounded * largest * info.eps + info.tiny
    worst = (error / bound).argmax()
    assert bool((error <= bound).all()), f"{what}: error {error.flatten()[worst]} over {bound.flatten()[worst]}"


def check(
    operation: Operation,
    formula: Operation,
    inputs: list[Tensor],
    what: str,
    *,
    floor: float = 0.0,
    rounded: float = 0.0,
) -> None:
    """Compare values and the gradients of all inputs."""
    dtype = inputs[0].dtype
    wide = [x.detach().double().requires_grad_() for x in inputs]
    leaves = [x.detach().requires_grad_() for x in inputs]
    want, got = formula(*wide), operation(*leaves)
    assert_close(got, want, dtype, f"{what}: value", floor=floor, rounded=rounded)
    grad = random(tuple(want.shape), want.device, dtype, seed=7)
    wanted = torch.autograd.grad(want, wide, grad.double())
    for place, (given, expected) in enumerate(zip(torch.autograd.grad(got, leaves, grad), wanted)):
        name = f"{what}: gradient of input {place}"
        assert_close(given, expected, inputs[place].dtype, name, floor=floor, rounded=rounded)


def check_alone(operation: Operation, inputs: list[Tensor], what: str) -> None:
    """A gradient that is asked for alone is the one that comes with all others, to the bit."""
    together = [x.detach().requires_grad_() for x in inputs]
    value = operation(*together)
    grad = random(tuple(value.shape), value.device, value.dtype, seed=7)
    wanted = torch.autograd.grad(value, together, grad)
    for place, expected in enumerate(wanted):
        alone = [x.detach().requires_grad_(index == place) for index, x in enumerate(inputs)]
        (given,) = torch.autograd.grad(operation(*alone), [alone[place]], grad)
        assert torch.equal(given, expected), f"{what}: gradient of input {place} alone is another"


def random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def strided(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same kind of numbers in layouts whose rows or columns are not neighbours in memory."""
    *lead, last = shape
    wider = random((*lead, last + 3), device, dtype, seed=1)
    turned = random((last, *lead), device, dtype, seed=2)
    return {"part of a wider row": wider[..., 2 : last + 2], "columns far apart": turned.movedim(0, -1)}


def layouts(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Contiguous and strided inputs."""
    return {"contiguous": random(shape, device, dtype), **strided(shape, device, dtype)}


def layer_norm_formula(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float) -> Tensor:
    """Ba et al. 2016, equation 4."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def rms_norm_formula(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Zhang and Sennrich 2019, equation 4."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm_floor(x: Tensor) -> float:
    """Largest |x| / std: x and its mean are rounded at the size of x before their difference is divided by std."""
    wide = x.double()
    return float((wide.abs() / (wide.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()).max())


def layer_norm_case(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """With and without bias, over all layouts."""
    weight = random(shape[-1:], device, dtype, seed=3) + 1
    bias = random(shape[-1:], device, dtype, seed=4)
    operation, formula = partial(registry.layer_norm, eps=1e-5), partial(layer_norm_formula, eps=1e-5)
    for layout, x in layouts(shape, device, dtype).items():
        parameters = [weight] if layout == "columns far apart" else [weight, bias]
        check(operation, formula, [x, *parameters], f"{shape}, {layout}", floor=layer_norm_floor(x))
    shifted = random(shape, device, dtype) + 3
    check(operation, formula, [shifted, weight, bias], f"{shape}, mean 3", floor=layer_norm_floor(shifted))


def rms_norm_case(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """Over all layouts, for values near and far from eps."""
    weight = random(shape[-1:], device, dtype, seed=3) + 1
    operation, formula = partial(registry.rms_norm, eps=1e-5), partial(rms_norm_formula, eps=1e-5)
    for layout, x in layouts(shape, device, dtype).items():
        check(operation, formula, [x, weight], f"{shape}, {layout}", floor=1.0)
    small = random(shape, device, dtype) * 0.01
    check(operation, formula, [small, weight], f"{shape}, small", floor=1.0)


def norms_accept_other_parameter_dtype(device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """Parameters in fp32 beside narrower activations are used as they are, and get gradients of their own dtype."""
    x = random((5, 33), device, dtype)
    weight, bias = random((33,), device, torch.float32, seed=3), random((33,), device, torch.float32, seed=4)
    check(partial(registry.layer_norm, eps=1e-5), partial(layer_norm_formula, eps=1e-5), [x, weight, bias], "LayerNorm")
    check(partial(registry.rms_norm, eps=1e-5), partial(rms_norm_formula, eps=1e-5), [x, weight], "RMSNorm")


def gate_formula(gate: Tensor, kind: str) -> Tensor:
    """Shazeer 2020, sections 1 and 2."""
    if kind == "swiglu":
        return gate / (1 + (-gate).exp())
    return gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 if kind == "geglu" else gate.clamp(min=0)


def gated_case(kind: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """Gate and up apart, then as the halves of one tensor."""
    for layout, gate in layouts(shape, device, dtype).items():
        up = random(shape, device, dtype, seed=5)
        apart = lambda g, u: gate_formula(g, kind) * u  # noqa: E731
        check(partial(registry.gated_activation, kind=kind), apart, [gate, up], f"{kind} {shape}, {layout}")
    half = shape[-1]
    fused = lambda both: gate_formula(both[..., :half], kind) * both[..., half:]  # noqa: E731
    for layout, gate_up in layouts((*shape[:-1], 2 * half), device, dtype).items():
        check(partial(registry.fused_gated_activation, kind=kind), fused, [gate_up], f"fused {kind} {shape}, {layout}")


def check_bias(operation: Operation, formula: Operation, inputs: list[Tensor], what: str) -> None:
    """operation(x, bias) of rows x [..., F] that hold the bias already: the value, and both gradients.

    The gradient of the bias adds up gradients of rows that are rounded to the dtype, of which it is a sum.
    """
    x, bias = (one.detach().requires_grad_() for one in inputs)
    wide = x.detach().double().requires_grad_()
    want = formula(wide)
    got = operation(x, bias=bias)
    assert_close(got, want, x.dtype, f"{what}: value")
    grad = random(tuple(want.shape), want.device, x.dtype, seed=7)
    grad_x, grad_bias = torch.autograd.grad(got, [x, bias], grad)
    (want_x,) = torch.autograd.grad(want, wide, grad.double())
    assert_close(grad_x, want_x, x.dtype, f"{what}: gradient")
    rows = grad_x.double().flatten(0, -2)
    largest = float(rows.abs().sum(0).max()) if len(rows) else 0.0
    assert_close(grad_bias, rows.sum(0), bias.dtype, f"{what}: gradient of the bias", floor=largest)


def activation_formula(x: Tensor, kind: str) -> Tensor:
    """Hendrycks and Gimpel 2016, sections 2 and 2.1; So et al. 2021; Elfwing et al. 2018."""
    if kind == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if kind == "gelu_tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if kind == "silu":
        return x / (1 + (-x).exp())
    return x.clamp(min=0) ** (2 if kind == "squared_relu" else 1)


def activation_case(
    kind: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, registry: Registry
) -> None:
    """Without and with the gradient of a bias."""
    formula = partial(activation_formula, kind=kind)
    bias = random(shape[-1:], device, dtype, seed=4)
    for layout, x in layouts(shape, device, dtype).items():
        check(partial(registry.activation, kind=kind), formula, [x], f"{kind} {shape}, {layout}", floor=1.0)
        check_bias(partial(registry.activation, kind=kind), formula, [x, bias], f"{kind} with bias {shape}, {layout}")


def gated_bias_case(kind: str, device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """The gradient of a bias of gate and up, over more rows than there are programs."""
    gate_up, bias = random((3, 3, 74), device, dtype), random((74,), device, dtype, seed=4)
    formula = lambda both: gate_formula(both[..., :37], kind) * both[..., 37:]  # noqa: E731
    check_bias(partial(registry.fused_gated_activation, kind=kind), formula, [gate_up, bias], kind)


def swiglu_of_large_gates_is_finite(device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """exp(-gate) overflows for very negative gates; value and slope must still be their limits."""
    gate = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0], device=device, dtype=dtype)
    gate_up = torch.cat([gate, torch.ones_like(gate)]).requires_grad_()
    y = registry.swiglu(gate_up)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.0, 0.0, 90.0, 200.0]
    assert gate_up.grad is not None
    assert gate_up.grad[:5].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def rotary_formula(x: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
    """RoFormer, equation 34, by complex numbers; x [B, N, S, D], angles [B or 1, 1, S, R/2] of each position."""
    half = angles.shape[-1]
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    pairs = [turned.real, turned.imag]
    rotated = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([rotated, x[..., 2 * half :]], -1)


def rotary_case(interleaved: bool, rotated: int, device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """x [B, N, S, D] with shared positions; x a transposed part of [S, B, N, 3D] with positions per sample."""
    batch, heads, sequence, size = 2, 3, 3, 12
    frequencies = 10000.0 ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    shared = torch.arange(sequence)[:, None] * frequencies
    own = torch.tensor([[0, 1, 0], [2, 3, 900]])[..., None] * frequencies
    qkv = random((sequence, batch, heads, 3 * size), device, dtype, seed=2)
    inputs = {
        "contiguous": random((batch, heads, sequence, size), device, dtype),
        "a part of [S, B, N, 3D], transposed": qkv[..., size : 2 * size].permute(1, 2, 0, 3),
    }
    for (layout, x), angles in zip(inputs.items(), (shared, own)):
        cos, sin = angles.cos().float().to(device), angles.sin().float().to(device)
        wide = angles.expand(batch, sequence, rotated // 2).unsqueeze(1).to(device)
        operation = partial(_apply, registry, cos, sin, interleaved)
        check(operation, partial(rotary_formula, angles=wide, interleaved=interleaved), [x], layout)


def _apply(registry: Registry, cos: Tensor, sin: Tensor, interleaved: bool, x: Tensor) -> Tensor:
    """apply_rotary with x last, for `partial`."""
    return registry.apply_rotary(x, cos, sin, interleaved)


def query_key_value_case(
    heads: tuple[int, int],
    rotated: int,
    interleaved: bool,
    device: torch.device,
    dtype: torch.dtype,
    registry: Registry,
) -> None:
    """Views of [S, B, O] turned in place, and one gradient from three in the orders of memory that attention leaves."""
    sequence, batch, size = 5, 3, 12
    queries, keys = heads
    num_heads = queries + 2 * keys
    frequencies = 10000.0 ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / max(rotated, 1))
    angles = torch.arange(sequence)[:, None] * frequencies
    rotary = (angles.cos().float().to(device), angles.sin().float().to(device)) if rotated else None
    wide_angles = angles.expand(batch, sequence, rotated // 2).unsqueeze(1).to(device)
    given = random((sequence, batch, num_heads * size), device, dtype, seed=2)
    wide = given.double().requires_grad_()
    turned = wide.unflatten(-1, (num_heads, size)).permute(1, 2, 0, 3)
    wanted = [turned[:, :queries], turned[:, queries : queries + keys], turned[:, queries + keys :]]
    wanted[:2] = [rotary_formula(x, wide_angles, interleaved=interleaved) for x in wanted[:2]]
    leaf, bias = given.clone().requires_grad_(), random((num_heads * size,), device, dtype, seed=4).requires_grad_()
    qkv = leaf * 1
    got = registry.query_key_value(qkv, heads, rotary, interleaved=interleaved, bias=bias)
    for name, one, want in zip(("q", "k", "v"), got, wanted, strict=True):
        is_view = one.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
        assert is_view or torch.compiler.is_compiling(), f"{name} is a copy"
        assert_close(one, want, dtype, f"{heads}: {name}")
    grads = [random(tuple(one.shape), device, dtype, seed=7 + place) for place, one in enumerate(got)]
    grads[0] = grads[0].transpose(1, 2).contiguous().transpose(1, 2)
    grads[2] = grads[2][:, :1, :1].expand(grads[2].shape)
    grad, grad_bias = torch.autograd.grad(got, [leaf, bias], grads)
    (want_grad,) = torch.autograd.grad(wanted, wide, [one.double() for one in grads])
    assert_close(grad, want_grad, dtype, f"{heads}: gradient")
    rows = grad.double().flatten(0, 1)
    largest = float(rows.abs().sum(0).max())
    assert_close(grad_bias, rows.sum(0), dtype, f"{heads}: gradient of the bias", floor=largest)
    alone = registry.query_key_value(leaf * 1, heads, rotary, interleaved=interleaved)
    assert torch.equal(torch.autograd.grad(alone, leaf, grads)[0], grad), "without a bias the gradient is another"


def cross_entropy_case(
    sizes: tuple[int, int, int], in_place: bool, device: torch.device, dtype: torch.dtype, registry: Registry
) -> None:
    """Loss and gradient put together from shards equal torch's cross_entropy over the unpadded vocabulary.

    sizes: number of shards, columns of each, valid vocabulary entries in all; so some shards may be all padding.
    """
    num_shards, columns, vocabulary = sizes
    logits = random((2, 3, num_shards * columns), device, dtype) * 4
    target = torch.tensor([[0, vocabulary - 1, vocabulary // 2], [-100, 1, vocabulary // 3]], device=device)
    grad_loss = random((2, 3), device, torch.float32, seed=6) * (target >= 0)
    wide = logits[..., :vocabulary].double().requires_grad_()
    flat = (wide.reshape(-1, vocabulary), target.reshape(-1))
    want = torch.nn.functional.cross_entropy(*flat, reduction="none").view(2, 3)
    (want_grad,) = torch.autograd.grad(want, wide, grad_loss.double())
    loss, grad = sharded_cross_entropy(logits, target, grad_loss, sizes, registry, in_place=in_place)
    assert_close(torch.where(target >= 0, loss, 0), want.detach(), torch.float32, f"{sizes}: loss")
    assert_close(grad[..., :vocabulary], want_grad, dtype, f"{sizes}: gradient")
    assert bool((grad[..., vocabulary:] == 0).all()), f"{sizes}: padding got a gradient"


def sharded_cross_entropy(
    logits: Tensor,
    target: Tensor,
    grad_loss: Tensor,
    sizes: tuple[int, int, int],
    registry: Registry,
    *,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """What ranks of a tensor-parallel axis do, one after the other in one process."""
    num_shards, columns, vocabulary = sizes
    shards = logits.split(columns, dim=-1)
    shards = [shard.contiguous() for shard in shards] if in_place else list(shards)
    starts = [columns * index for index in range(num_shards)]
    valid = [min(max(vocabulary - start, 0), columns) for start in starts]
    before = [registry.local_max(shard, n) for shard, n in zip(shards, valid)]
    sums = [
        registry.local_softmax_sums(shard, target, start, n, overwrite=in_place)
        for shard, start, n in zip(shards, starts, valid)
    ]
    assert all(bool((a.clamp(min=-1e38) == b[0].clamp(min=-1e38)).all()) for a, b in zip(before, sums)), "two maxima"
    maxima, sums_exp, target_logits = (torch.stack(part) for part in zip(*sums))
    largest, target_logit = maxima.amax(0), target_logits.sum(0)
    sum_exp = (sums_exp * (maxima - largest).exp()).sum(0)
    loss = sum_exp.log() + largest - target_logit
    grads = [
        registry.cross_entropy_backward(
            shard,
            target,
            own_max,
            sum_exp * (largest - own_max).exp(),
            target_logit,
            grad_loss,
            vocab_start=start,
            num_valid=n,
            in_place=in_place,
            overwritten=in_place,
        )
        for shard, start, n, own_max in zip(shards, starts, valid, maxima)
    ]
    if in_place:
        assert all(grad is shard for grad, shard in zip(grads, shards)), "contiguous logits were not overwritten"
    return loss, torch.cat(grads, -1)


def cross_entropy_of_strided_rows(device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """Targets that are every other number of a tensor, and one loss gradient seen from every row, as sum() gives it."""
    logits = random((6, 9), device, dtype)
    target = torch.tensor([0, 7, 1, 7, 2, 7, 3, 7, 4, 7, 5, 7], device=device)[::2]
    grad_loss = torch.tensor(0.5, device=device).expand(6)
    wide = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(wide, target, reduction="none")
    (want_grad,) = torch.autograd.grad(want.sum() / 2, wide)
    loss, grad = sharded_cross_entropy(logits, target, grad_loss, (1, 9, 9), registry, in_place=False)
    assert_close(loss, want.detach(), torch.float32, "loss")
    assert_close(grad, want_grad, dtype, "gradient")


def empty_rows_stay_empty(device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """No rows give no rows, and parameter gradients of 0."""
    x = torch.empty(0, 2, 6, device=device, dtype=dtype, requires_grad=True)
    weight = torch.ones(6, device=device, dtype=dtype, requires_grad=True)
    for y in (registry.layer_norm(x, weight, weight), registry.rms_norm(x, weight), registry.swiglu(x)):
        weight.grad = None
        y.sum().backward()
        assert y.shape[:2] == (0, 2)
        assert weight.grad is None or weight.grad.tolist() == [0.0] * 6
    angles = torch.empty(2, 3, device=device)
    assert registry.apply_rotary(x.unsqueeze(0), angles, angles).shape == (1, 0, 2, 6)
    rows = torch.empty(0, 2, device=device)
    target = rows.long()
    assert registry.local_max(x, 6).shape == (0, 2)
    assert [sums.shape for sums in registry.local_softmax_sums(x, target, 0, 6)] == [(0, 2)] * 3
    numbers = (target, rows, rows, rows, rows)
    assert registry.cross_entropy_backward(x, *numbers, vocab_start=0, num_valid=6).shape == x.shape


def gradients_do_not_depend_on_which_are_needed(device: torch.device, dtype: torch.dtype, registry: Registry) -> None:
    """Frozen weights or inputs, one gradient at a time."""
    x, y = random((2, 5), device, dtype), random((2, 5), device, dtype, seed=1)
    weight, bias = random((5,), device, dtype, seed=3), random((5,), device, dtype, seed=4)
    check_alone(registry.layer_norm, [x, weight, bias], "layer_norm")
    check_alone(registry.rms_norm, [x, weight], "rms_norm")
    check_alone(partial(registry.gated_activation, kind="swiglu"), [x, y], "gated_activation")


def adam_case(layer_dtype: torch.dtype, *, moments: torch.dtype, device: torch.device, registry: Registry) -> None:
    """Three updates of two parameters against Loshchilov and Hutter 2019, algorithm 2, in float64, with either decay, a
    scale of the gradients and a copy in the dtype of the layers. Moments in bf16 are taken as they were stored."""
    for decoupled, grad_scale in ((True, 0.25), (False, 1.0)):
        fp32 = [[random((n,), device, torch.float32, seed=n + k) for n in (1, 1030)] for k in range(2)]
        values, copies = fp32[0], [one.to(layer_dtype) for one in fp32[0]]
        states = [[torch.zeros(n, device=device, dtype=moments) for n in (1, 1030)] for _ in range(2)]
        for count in (1, 2, 3):
            step = AdamStep(0.1, 0.2, 0.8, 0.95, 1e-6, count, decoupled, grad_scale)
            grads = [random((n,), device, torch.float32, seed=10 * count + n) for n in (1, 1030)]
            before = [[one.double() for one in some] for some in (values, grads, *states)]
            registry.adam([AdamTensors(*one) for one in zip(values, grads, *states, copies)], step)
            for number, wide in enumerate(zip(*before)):
                wanted = adam_formula(*wide, step)
                for found, exact, what in zip((values, *states), wanted, ("value", "average", "square")):
                    if found[number].dtype == torch.float32:
                        assert_close(found[number], exact, torch.float32, f"{what} {count} {decoupled}", floor=3.0)
                    else:  # by the threshold up or down, a unit in the last place at most
                        assert bool(((found[number].double() - exact).abs() <= exact.abs() * 2**-7).all()), what
                assert_close(copies[number], values[number].double(), layer_dtype, "copy")


def adam_formula(value: Tensor, grad: Tensor, average: Tensor, square: Tensor, step: AdamStep) -> tuple[Tensor, ...]:
    """New value and moments, in the dtype of what it is given."""
    grad = step.grad_scale * grad
    if step.decoupled:
        value = value - step.lr * step.weight_decay * value
    else:
        grad = grad + step.weight_decay * value
    average = step.beta1 * average + (1 - step.beta1) * grad
    square = step.beta2 * square + (1 - step.beta2) * grad**2
    average_hat, square_hat = average / (1 - step.beta1**step.count), square / (1 - step.beta2**step.count)
    return value - step.lr * average_hat / (square_hat.sqrt() + step.eps), average, square


def adam_of(moments: torch.dtype) -> Case:
    """The case with moments of a dtype; that of the case is the layers'."""
    return lambda device, dtype, registry: adam_case(dtype, moments=moments, device=device, registry=registry)


def _cases() -> dict[str, Case]:
    """All cases by name."""
    cases: dict[str, Case] = {
        "gradients_alone": gradients_do_not_depend_on_which_are_needed,
        "cross_entropy_strided_rows": cross_entropy_of_strided_rows,
        "empty_rows": empty_rows_stay_empty,
        "swiglu_limits": swiglu_of_large_gates_is_finite,
        "norms_fp32_parameters": norms_accept_other_parameter_dtype,
        "adam": adam_of(torch.float32),
        "adam_bf16_moments": adam_of(torch.bfloat16),
    }
    cases |= FP8_CASES
    for shape in ((1, 1), (3, 2, 37), (1, 1030)):
        name = "x".join(map(str, shape))
        cases[f"layer_norm_{name}"] = partial(layer_norm_case, shape)
        cases[f"rms_norm_{name}"] = partial(rms_norm_case, shape)
    for kind in ("swiglu", "geglu", "reglu"):
        for shape in ((2, 2, 37), (1, 1030)):
            cases[f"{kind}_{'x'.join(map(str, shape))}"] = partial(gated_case, kind, shape)
    for kind in ("gelu", "gelu_tanh", "relu", "squared_relu", "silu"):
        cases[f"activation_{kind}"] = partial(activation_case, kind, (3, 3, 37))
    cases["activation_wide"] = partial(activation_case, "gelu_tanh", (2, 1030))
    cases["swiglu_bias"] = partial(gated_bias_case, "swiglu")
    cases["geglu_bias"] = partial(gated_bias_case, "geglu")
    for heads, rotated, interleaved in (
        ((3, 3), 0, False),
        ((4, 1), 12, False),
        ((6, 2), 6, True),
        ((20, 5), 8, False),
    ):
        name = f"query_key_value_{heads[0]}_{heads[1]}_heads_{rotated}_turned"
        cases[name] = partial(query_key_value_case, heads, rotated, interleaved)
    for interleaved in (False, True):
        for rotated in (12, 6):
            pairing = "interleaved" if interleaved else "halves"
            cases[f"rotary_{pairing}_{rotated}_of_12"] = partial(rotary_case, interleaved, rotated)
    for sizes in ((1, 37, 37), (2, 20, 37), (4, 16, 37), (2, 5000, 9001)):
        for in_place in (False, True):
            name = "cross_entropy_{}x{}_valid_{}".format(*sizes)
            cases[name + ("_in_place" if in_place else "")] = partial(cross_entropy_case, sizes, in_place)
    return cases


CASES = _cases()
