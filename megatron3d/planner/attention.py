"""The attention core on a tape: torch's fused kernel, or its composition of products and a softmax.

torch takes the fused kernel except, on the CPU, where probabilities are dropped. The fused one keeps queries, keys,
values, output and one fp32 number per query and head (Dao et al. 2022, section 3.1); the composed one keeps three
matrices of S x S per head, in fp32 whatever the inputs are.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.planner.sizes import FP32, Sizes
from megatron3d.planner.tape import Node, Tape, Value


@dataclass(frozen=True)
class CoreOptions:
    """What decides how the core is computed: whether probabilities are dropped, and the rows of a mask for each sample:
    0 where there is none, 1 where it is the same for all queries, S where it is not."""

    drops: bool
    mask_rows: int


def core(tape: Tape, qkv: tuple[Value, Value, Value], sizes: Sizes, options: CoreOptions) -> Value:
    """softmax(q k^T / sqrt(D)) v."""
    if is_composed(options, sizes):
        return _composed(tape, qkv, sizes, options)
    return _fused(tape, qkv, sizes, options)


def is_composed(options: CoreOptions, sizes: Sizes) -> bool:
    """Whether torch composes the core of products and a softmax."""
    return options.drops and sizes.on_cpu


def query_count(sizes: Sizes) -> int:
    """Elements of the queries of a micro-batch on this rank."""
    return sizes.rows * sizes.heads * sizes.head


def key_count(sizes: Sizes) -> int:
    """Elements of the keys, or values, of a micro-batch on this rank."""
    return sizes.rows * sizes.groups * sizes.head


def _mask_bytes(sizes: Sizes, options: CoreOptions) -> int:
    """The mask [B, 1, rows, S] in the dtype of the queries, which torch makes of ours."""
    return sizes.batch * options.mask_rows * sizes.sequence * sizes.element


def _fused(tape: Tape, qkv: tuple[Value, Value, Value], sizes: Sizes, options: CoreOptions) -> Value:
    queries, keys = query_count(sizes) * sizes.element, key_count(sizes) * sizes.element
    y = tape.value(queries)
    sums = tape.memory(sizes.rows * sizes.heads * FP32)
    mask = (tape.memory(_mask_bytes(sizes, options)),) if options.mask_rows else ()
    # On CUDA the gradients of shared keys and values are made per query head first, and added up after.
    expanded = 2 * queries if sizes.groups != sizes.heads and not sizes.on_cpu else 0
    return tape.add(
        Node(
            "attention",
            qkv,
            (y,),
            saves=(*(one.memory for one in qkv), y.memory, sums, *mask),
            gradients=(queries, keys, keys),
            backward_temporary=queries + expanded,
        )
    )


def _composed(tape: Tape, qkv: tuple[Value, Value, Value], sizes: Sizes, options: CoreOptions) -> Value:
    wide, narrow = query_count(sizes) * FP32, sizes.element < FP32
    square = sizes.batch * sizes.heads * sizes.sequence**2 * FP32
    mask = _mask_bytes(sizes, options)
    q, k, v = (_wide_heads(tape, one, count, sizes) for one, count in zip(qkv, _counts(sizes), strict=True))
    q, k = (tape.elementwise("scale", one, wide) for one in (q, k))
    scores = tape.add(
        Node("scores", (q, k), (tape.value(square),), (q.memory, k.memory), (wide, wide), forward_temporary=mask)
    )
    soft = tape.value(square)
    tape.add(Node("softmax", (scores,), (soft,), (soft.memory,), (square,)))
    kept = tape.elementwise("drop", soft, square, saves=(tape.memory(square // FP32),))
    if sizes.batch > 1 and not narrow and sizes.groups == sizes.heads:  # else v is one block already, or was made so
        v = tape.elementwise("contiguous", v, wide)
    y = tape.add(
        Node(
            "mix",
            (kept, v),
            (tape.value(wide),),
            (kept.memory, v.memory),
            (square, wide),
            forward_temporary=square // 2 if narrow else 0,
        )
    )
    if narrow:
        y = tape.add(Node("cast", (y,), (tape.value(wide // 2),), gradients=(wide,)))
    return y


def _counts(sizes: Sizes) -> tuple[int, int, int]:
    return query_count(sizes), key_count(sizes), key_count(sizes)


def _wide_heads(tape: Tape, x: Value, count: int, sizes: Sizes) -> Value:
    """Queries, keys or values in fp32, each key and value head repeated for its query heads."""
    if sizes.element < FP32:
        x = tape.add(Node("cast", (x,), (tape.value(count * FP32),), gradients=(count * sizes.element,)))
    if count != query_count(sizes):
        whole = query_count(sizes) * FP32
        x = tape.add(Node("repeat", (x,), (tape.value(whole),), gradients=(count * FP32,)))
    return x
