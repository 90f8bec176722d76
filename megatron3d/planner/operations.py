"""Operations of our layers on a tape: norms, linear layers, dropout, activations, with what each keeps.

Each function appends what one function of `nn`, `tensor` or the kernels does, for the reference kernels on the CPU and
for the Triton kernels on CUDA. `test_saved.py` holds every one against the tensors that autograd really saves.
"""

from __future__ import annotations

from megatron3d.planner.sizes import FP32, Sizes
from megatron3d.planner.tape import Node, Tape, Value


def norm(tape: Tape, x: Value, shape: tuple[int, int], sizes: Sizes, *, is_rms: bool, unit: str) -> Value:
    """LayerNorm or RMSNorm of [rows, width], widened to fp32 around torch's kernels on the CPU."""
    rows, width = shape
    count = rows * width
    given = {"unit": unit, "contributions": 1 if is_rms else 2}
    if not sizes.on_cpu:
        statistics = tape.memory(rows * FP32 * (1 if is_rms else 2))
        saves = (x.memory, statistics)
        return tape.elementwise("norm", x, count * sizes.element, saves=saves, **given)
    narrow = sizes.element < FP32
    wide = _cast(tape, x, count, FP32, back=sizes.element) if narrow else x
    if is_rms:
        y = _rms_reference(tape, wide, rows, count, unit)
    else:
        statistics = (tape.memory(rows * FP32), tape.memory(rows * FP32))
        parameters = (tape.memory(width * FP32), tape.memory(width * FP32)) if narrow else ()
        saves = (wide.memory, *statistics, *parameters)
        y = tape.elementwise("layer_norm", wide, count * FP32, saves=saves, **given)
    return _cast(tape, y, count, sizes.element, back=FP32) if narrow else y


def _cast(tape: Tape, x: Value, count: int, to: int, *, back: int) -> Value:
    return tape.add(Node("cast", (x,), (tape.value(count * to),), gradients=(count * back,)))


def _rms_reference(tape: Tape, x: Value, rows: int, count: int, unit: str) -> Value:
    """x / sqrt(mean(x^2) + e) * w, as torch composes it of elementwise operations."""
    whole, column = count * FP32, rows * FP32
    square = tape.elementwise("square", x, whole, saves=(x.memory,), backward_temporary=2 * whole)
    mean = tape.add(Node("mean", (square,), (tape.value(column),), gradients=(whole,)))
    inverse_value = tape.value(column)
    inverse = tape.add(Node("rsqrt", (mean,), (inverse_value,), (inverse_value.memory,), (column,)))
    saves = (x.memory, inverse.memory)
    normed = tape.value(whole)
    tape.add(Node("scale", (x, inverse), (normed,), saves, (whole, column), backward_temporary=whole))
    saves = (normed.memory,)
    return tape.elementwise("weigh", normed, whole, saves=saves, backward_temporary=whole, unit=unit, contributions=1)


def weight_work(sizes: Sizes, count: int) -> int:
    """Bytes taken while a linear layer's weight gradient of `count` elements is added to its buffer.

    Where the buffer has the dtype of the layer the product adds up in place. Else it is a tensor of its own, and the
    addition on the CPU widens one of the two first.
    """
    if sizes.element == sizes.gradient:
        return 0
    return count * (sizes.element + (FP32 if sizes.on_cpu else 0))


def linear(
    tape: Tape,
    x: Value,
    features: tuple[int, int],
    sizes: Sizes,
    *,
    input_type: str,
    unit: str,
    bias: bool,
    rows: int | None = None,
) -> Value:
    """`tensor.linear.linear`: [rows, inputs] to [rows, outputs] of this rank, by default of all tokens of a
    micro-batch; `input_type` "V" gathers them."""
    inputs, outputs = features
    rows = sizes.rows if rows is None else rows
    gathers = input_type == "V" and sizes.sharded
    copies = 2 if sizes.on_cpu else 1  # gloo's gathers and scatters take as much again while they move
    whole = rows * inputs * sizes.element
    part = sizes.residual_rows * inputs * sizes.element if gathers else whole
    held = (tape.memory(whole),) if gathers else ()
    return tape.add(
        Node(
            f"linear {inputs}x{outputs}",
            (x,),
            (tape.value(rows * outputs * sizes.element),),
            saves=(x.memory,),
            gradients=(part,),
            forward_temporary=copies * whole if gathers else 0,
            backward_temporary=(1 + copies) * whole if gathers else 0,
            weights_temporary=weight_work(sizes, inputs * outputs),
            weights_gradient=0 if sizes.element == sizes.gradient else inputs * outputs * sizes.element,
            keeps_for_weights=(x.memory, *held),
            unit=unit,
            contributions=2 if bias else 1,
        )
    )


def to_residual(tape: Tape, x: Value, sizes: Sizes) -> Value:
    """`tensor.linear.to_residual`: the sum over the tensor-parallel ranks, or this rank's rows of it."""
    if sizes.tp == 1:
        return x
    if not sizes.sharded:
        return tape.add(Node("all_reduce", (x,), (tape.value(sizes.residual),), gradients=(0,)))
    whole = sizes.rows * sizes.hidden * sizes.element
    copied = whole if sizes.on_cpu else 0
    return tape.add(
        Node(
            "reduce_scatter",
            (x,),
            (tape.value(sizes.residual),),
            gradients=(whole,),
            forward_temporary=copied,
            backward_temporary=copied,
        )
    )


def row_linear(tape: Tape, x: Value, inputs: int, sizes: Sizes, *, unit: str, bias: bool) -> Value:
    """`RowParallelLinear`: back to the residual stream, with the bias added once after the sum."""
    y = linear(tape, x, (inputs, sizes.hidden), sizes, input_type="local", unit=unit, bias=False)
    y = to_residual(tape, y, sizes)
    if not bias:
        return y
    return tape.add(Node("bias", (y,), (tape.value(sizes.residual),), gradients=(0,), unit=unit, contributions=1))


def dropout(tape: Tape, x: Value, size_bytes: int, sizes: Sizes, *, drops: bool) -> Value:
    """`kernels.dropout`, whose mask has one byte for each element."""
    if not drops:
        return x
    dropped = tape.elementwise("drop", x, size_bytes, saves=(tape.memory(size_bytes // sizes.element),))
    return tape.elementwise("rescale", dropped, size_bytes)


def add(tape: Tape, x: Value, y: Value, size_bytes: int, *, reads: tuple[int, ...] = ()) -> Value:
    """x + y, whose gradient goes to both; `reads` are memories that live until then."""
    return tape.add(Node("add", (x, y), (tape.value(size_bytes),), gradients=(0, 0), reads=reads))


def activation(tape: Tape, x: Value, sizes: Sizes, kind: str) -> Value:
    """The activation of the MLP, gated or not, between the two linear layers."""
    count = sizes.rows * sizes.ffn
    size = count * sizes.element
    if kind in ("swiglu", "geglu", "reglu"):
        wide = count * FP32
        reference = 4 * wide if sizes.element < FP32 else 2 * wide
        return tape.add(
            Node(
                kind,
                (x,),
                (tape.value(size),),
                saves=(x.memory,),
                gradients=(2 * size,),
                forward_temporary=(3 * wide if sizes.element < FP32 else wide) if sizes.on_cpu else 0,
                backward_temporary=reference if sizes.on_cpu else 0,
            )
        )
    if kind == "relu":
        y = tape.value(size)
        return tape.add(Node(kind, (x,), (y,), (y.memory,), (size,)))
    if kind == "squared_relu":
        y = activation(tape, x, sizes, "relu")
        return tape.elementwise("square", y, size, saves=(y.memory,), backward_temporary=2 * size)
    return tape.elementwise(kind, x, size, saves=(x.memory,))


def rotary(tape: Tape, x: Value, count: int, sizes: Sizes, tables: tuple[int, int]) -> Value:
    """`apply_rotary` of one of queries and keys; it keeps the tables of angles, which all layers share."""
    half = count // 2 * FP32
    temporary = (half if sizes.element == FP32 else 3 * half) if sizes.on_cpu else 0
    return tape.elementwise(
        "rotary",
        x,
        count * sizes.element,
        saves=tables,
        forward_temporary=temporary,
        backward_temporary=temporary,
    )
