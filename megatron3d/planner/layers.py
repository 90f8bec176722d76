"""The layers of a GPT on a tape: embedding, block and head, operation by operation as their modules call them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d_kernels.cross_entropy import CHUNK_ELEMENTS

from megatron3d.config.run import RunConfig
from megatron3d.models.stage import StagePart
from megatron3d.nn.recompute import LayerGroup, plan_recompute
from megatron3d.planner import operations as op
from megatron3d.planner.attention import CoreOptions, core, is_composed, key_count, query_count
from megatron3d.planner.sizes import FP32, INT64, Sizes
from megatron3d.planner.tape import Node, Tape, Value


@dataclass(frozen=True)
class StageTape:
    """The tape of one stage for one micro-batch, its input (None on the first stage) and its output."""

    tape: Tape
    x: Value | None
    y: Value


def stage_tape(config: RunConfig, part: StagePart, sizes: Sizes) -> StageTape:
    """The whole stage: what comes in, its embedding, its blocks in their recomputed groups, its head."""
    tape = Tape()
    model, train = config.model, config.train
    tables = _angles(tape, config, sizes)
    x = None if part.is_first else tape.from_outside(sizes.residual)
    current = _embedding(tape, config, sizes) if x is None else x
    groups = plan_recompute(
        len(part.layers),
        granularity=train.recompute_granularity,
        method=train.recompute_method,
        layers_each=train.recompute_num_layers,
    )
    for group in groups:
        current = _group(tape, current, group, (config, sizes, part.layers, tables))
    if part.is_last:
        unit = "head" if model.untie_embeddings_and_output_weights else "embedding.word"
        with tape.at("head"):
            current = _head(tape, current, config, sizes, unit)
    return StageTape(tape, x, current)


def _angles(tape: Tape, config: RunConfig, sizes: Sizes) -> tuple[int, int] | None:
    """Memories of the cosines and sines of the positions, fp32, made once for a micro-batch."""
    model = config.model
    if model.position_embedding_type != "rope":
        return None
    half = int(model.kv_channels * model.rotary_percent) // 2
    samples = sizes.batch if config.data.reset_position_ids else 1
    size = samples * sizes.sequence * half * FP32
    return tape.memory(size), tape.memory(size)


def _group(
    tape: Tape, x: Value, group: LayerGroup, given: tuple[RunConfig, Sizes, range, tuple[int, int] | None]
) -> Value:
    config, sizes, layers, tables = given
    with tape.recomputed(group.recompute):
        for position in group.layers:
            name = f"layers.{layers[position]}"
            with tape.at(name):
                x = block(tape, x, config, sizes, unit=name, tables=tables)
    return x


def block(tape: Tape, x: Value, config: RunConfig, sizes: Sizes, *, unit: str, tables: tuple[int, int] | None) -> Value:
    """`nn.block.Block`: two halves, each behind a norm and added to the residual stream."""
    model = config.model
    shape, is_rms = (sizes.residual_rows, sizes.hidden), model.normalization == "RMSNorm"
    after_norm, entry = model.apply_residual_connection_post_layernorm, x  # whoever runs the block holds its input
    normed = op.norm(tape, x, shape, sizes, is_rms=is_rms, unit=unit)
    y = _attention(tape, normed, config, sizes, unit, tables)
    y = op.dropout(tape, y, sizes.residual, drops=model.hidden_dropout > 0)
    x = op.add(tape, normed if after_norm else x, y, sizes.residual)
    normed = op.norm(tape, x, shape, sizes, is_rms=is_rms, unit=unit)
    width, bias = sizes.ffn * (2 if model.is_gated else 1), model.add_bias_linear
    inner = op.linear(tape, normed, (sizes.hidden, width), sizes, input_type="V", unit=unit, bias=bias)
    inner = op.activation(tape, inner, sizes, model.activation)
    y = op.row_linear(tape, inner, sizes.ffn, sizes, unit=unit, bias=bias)
    y = op.dropout(tape, y, sizes.residual, drops=model.hidden_dropout > 0)
    return op.add(tape, normed if after_norm else x, y, sizes.residual, reads=(entry.memory,))


def _attention(
    tape: Tape, x: Value, config: RunConfig, sizes: Sizes, unit: str, tables: tuple[int, int] | None
) -> Value:
    model = config.model
    queries, keys = query_count(sizes), key_count(sizes)
    width = (sizes.heads + 2 * sizes.groups) * sizes.head
    bias = model.add_bias_linear or model.add_qkv_bias
    whole = op.linear(tape, x, (sizes.hidden, width), sizes, input_type="V", unit=unit, bias=bias)
    q, k, v = (tape.view(whole.memory) for _ in range(3))
    tape.add(Node("split", (whole,), (q, k, v), gradients=((queries + 2 * keys) * sizes.element,)))
    if model.qk_layernorm:
        is_rms = model.normalization == "RMSNorm"
        q = op.norm(tape, q, (queries // sizes.head, sizes.head), sizes, is_rms=is_rms, unit=unit)
        k = op.norm(tape, k, (keys // sizes.head, sizes.head), sizes, is_rms=is_rms, unit=unit)
    if tables is not None:
        q, k = op.rotary(tape, q, queries, sizes, tables), op.rotary(tape, k, keys, sizes, tables)
    options = CoreOptions(drops=model.attention_dropout > 0, masked=config.data.reset_attention_mask)
    with tape.recomputed(config.train.recompute_granularity == "selective"):
        y = core(tape, (q, k, v), sizes, options)
    if model.qk_layernorm or is_composed(options, sizes):
        # Normed heads lie head by head, and so does the result; the projection reads them token by token.
        y = tape.elementwise("side by side", y, queries * sizes.element)
    return op.row_linear(tape, y, sizes.heads * sizes.head, sizes, unit=unit, bias=model.add_bias_linear)


def _embedding(tape: Tape, config: RunConfig, sizes: Sizes) -> Value:
    """`models.gpt.GPTEmbedding`; the gradient of the table is a whole table, added to its buffer at the end."""
    model, count = config.model, sizes.vocab * sizes.hidden
    whole = sizes.rows * sizes.hidden * sizes.element
    ids = tape.memory(sizes.rows * INT64)
    table = count * sizes.element + (count * FP32 if sizes.on_cpu and sizes.element != sizes.gradient else 0)
    with tape.at("embedding"):
        x = tape.value(whole)
        tape.add(Node("lookup", (), (x,), (ids,), weights_temporary=table, unit="embedding.word", contributions=1))
        if sizes.tp > 1:
            elsewhere = (tape.memory(sizes.rows),)
            x = tape.elementwise("elsewhere", x, whole, saves=elsewhere)
        x = op.to_residual(tape, x, sizes)
        if model.position_embedding_type == "learned_absolute":
            table = model.max_position_embeddings * sizes.hidden * sizes.element
            node = Node("positions", (x,), (tape.value(sizes.residual),), gradients=(0,), backward_temporary=2 * table)
            x = tape.add(Node(**{**vars(node), "unit": "embedding", "contributions": 1}))
        return op.dropout(tape, x, sizes.residual, drops=model.hidden_dropout > 0)


def _head(tape: Tape, x: Value, config: RunConfig, sizes: Sizes, unit: str) -> Value:
    """`models.gpt.GPTHead`: the norm, the logits and their loss, whose gradient takes the place of the logits."""
    is_rms = config.model.normalization == "RMSNorm"
    y = op.norm(tape, x, (sizes.residual_rows, sizes.hidden), sizes, is_rms=is_rms, unit="head")
    logits = op.linear(tape, y, (sizes.hidden, sizes.vocab), sizes, input_type="V", unit=unit, bias=False)
    row = sizes.rows * FP32
    targets, largest, sums = tape.memory(sizes.rows * INT64), tape.memory(row), tape.memory(2 * row)
    columns = min(config.model.vocab_size, sizes.vocab)
    loss = tape.add(
        Node(
            "cross_entropy",
            (logits,),
            (tape.value(row),),
            (logits.memory, targets, largest, sums),
            (0,),
            in_place=logits.memory,
            forward_temporary=_loss_temporary(columns, sizes, backward=False),
            backward_temporary=_loss_temporary(columns, sizes, backward=True),
            reads=(x.memory,),
        )
    )
    weighed = tape.elementwise("weigh", loss, row)
    return tape.add(Node("sum", (weighed,), (tape.value(FP32),), gradients=(0,)))


def _loss_temporary(columns: int, sizes: Sizes, *, backward: bool) -> int:
    """Bytes of rows of logits that the reference cross-entropy has in fp32 at once.

    It works on some rows at a time, widens them first if they are narrow, and in the backward lets go of the rows
    before only when it has the next ones.
    """
    if not sizes.on_cpu:
        return 0
    copies = 2 if sizes.element < FP32 else 1
    first = min(sizes.rows, max(1, CHUNK_ELEMENTS // columns))
    second = min(first, sizes.rows - first)
    at_once = max(copies * first, first + copies * second if backward else 0)
    return at_once * columns * FP32
