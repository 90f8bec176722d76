"""A stage on a tape: its embedding, blocks and head, operation by operation as the modules call them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.run import RunConfig
from megatron3d.models.stage import StagePart
from megatron3d.nn.recompute import LayerGroup, plan_recompute
from megatron3d.planner import operations as op
from megatron3d.planner.attention import CoreOptions, core, is_composed, key_count, query_count
from megatron3d.planner.ends import embedding, head, residual_norm
from megatron3d.planner.sizes import FP32, Sizes
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
    train = config.train
    tables = _angles(tape, config, sizes)
    x = None if part.is_first else tape.from_outside(sizes.residual)
    current = embedding(tape, config, sizes) if x is None else x
    groups = plan_recompute(
        len(part.layers),
        granularity=train.recompute_granularity,
        method=train.recompute_method,
        layers_each=train.recompute_num_layers,
    )
    for group in groups:
        current = _group(tape, current, group, (config, sizes, part.layers, tables))
    if part.is_last:
        with tape.at("head"):
            current = head(tape, current, config, sizes)
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
    """`nn.block.Block`: two halves, each added to the residual stream, with a norm before or after."""
    model, entry = config.model, x  # whoever runs the block holds its input until the end
    halves = (_attention, _mlp)
    for half, reads in zip(halves, ((), (entry.memory,)), strict=True):
        if model.norm_position == "post":
            y = half(tape, x, config, sizes, unit, tables)
            y = op.dropout(tape, y, sizes.residual, sizes, drops=_drops(config))
            total = op.add(tape, x, y, sizes.residual, reads=reads)
            x = residual_norm(tape, total, config, sizes, unit)
            continue
        normed = residual_norm(tape, x, config, sizes, unit)
        y = half(tape, normed, config, sizes, unit, tables)
        y = op.dropout(tape, y, sizes.residual, sizes, drops=_drops(config))
        kept = normed if model.apply_residual_connection_post_layernorm else x
        x = op.add(tape, kept, y, sizes.residual, reads=reads)
    return x


def _drops(config: RunConfig) -> bool:
    return config.model.hidden_dropout > 0


def _mlp(tape: Tape, x: Value, config: RunConfig, sizes: Sizes, unit: str, tables: tuple[int, int] | None) -> Value:
    model = config.model
    width, bias = sizes.ffn * (2 if model.is_gated else 1), model.add_bias_linear
    inner = op.linear(tape, x, (sizes.hidden, width), sizes, input_type="V", unit=unit, bias=bias)
    inner = op.activation(tape, inner, sizes, model.activation)
    return op.row_linear(tape, inner, sizes.ffn, sizes, unit=unit, bias=bias)


def _attention(
    tape: Tape, x: Value, config: RunConfig, sizes: Sizes, unit: str, tables: tuple[int, int] | None
) -> Value:
    model = config.model
    queries, keys = query_count(sizes), key_count(sizes)
    projected = keys // sizes.kv_copies  # elements of this rank's part of the keys
    width = sizes.heads * sizes.head + 2 * sizes.groups * sizes.head // sizes.kv_copies
    bias = model.add_bias_linear or model.add_qkv_bias
    whole = op.linear(tape, x, (sizes.hidden, width), sizes, input_type="V", unit=unit, bias=bias)
    q, k, v = (tape.view(whole.memory) for _ in range(3))
    tape.add(Node("split", (whole,), (q, k, v), gradients=((queries + 2 * projected) * sizes.element,)))
    if sizes.kv_copies > 1:
        k, v = _gathered(tape, k, v, projected * sizes.element, sizes)
    if model.qk_layernorm:
        is_rms = model.normalization == "RMSNorm"
        q = op.norm(tape, q, (queries // sizes.head, sizes.head), sizes, is_rms=is_rms, unit=unit)
        k = op.norm(tape, k, (keys // sizes.head, sizes.head), sizes, is_rms=is_rms, unit=unit)
    if tables is not None:
        q, k = op.rotary(tape, q, queries, sizes, tables), op.rotary(tape, k, keys, sizes, tables)
    options = CoreOptions(drops=model.attention_dropout > 0, mask_rows=_mask_rows(config))
    with tape.recomputed(config.train.recompute_granularity == "selective"):
        y = core(tape, (q, k, v), sizes, options)
    if model.qk_layernorm or is_composed(options, sizes):
        # Normed heads lie head by head, and so does the result; the projection reads them token by token.
        y = tape.elementwise("side by side", y, queries * sizes.element)
    return op.row_linear(tape, y, sizes.heads * sizes.head, sizes, unit=unit, bias=model.add_bias_linear)


def _gathered(tape: Tape, k: Value, v: Value, part: int, sizes: Sizes) -> tuple[Value, Value]:
    """Keys and values of whole heads, from the `part` bytes that a rank projects of each."""
    gathered = 2 * part * sizes.kv_copies
    both, whole = tape.value(2 * part), tape.value(gathered)
    tape.add(Node("stack", (k, v), (both,), gradients=(part, part)))
    copies = (
        2 if sizes.on_cpu else 1
    )  # the result lies by rank first; gloo's gathers take as much again while they move
    tape.add(Node("gather", (both,), (whole,), gradients=(2 * part,), forward_temporary=copies * gathered))
    k, v = (tape.view(whole.memory) for _ in range(2))
    tape.add(Node("unbind", (whole,), (k, v), gradients=(gathered,)))
    return k, v


def _mask_rows(config: RunConfig) -> int:
    """Rows of the mask of a sample: a BERT masks its padding for all queries alike."""
    if config.model.architecture == "bert":
        return 1
    return config.model.seq_length if config.data.reset_attention_mask else 0
