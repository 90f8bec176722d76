"""The first and the last part of a model on a tape: embedding and head, of a GPT and of a BERT."""

from __future__ import annotations

from megatron3d_kernels.cross_entropy import CHUNK_ELEMENTS

from megatron3d.config.run import RunConfig
from megatron3d.planner import operations as op
from megatron3d.planner.sizes import FP32, INT64, Sizes
from megatron3d.planner.tape import Node, Tape, Value

NUM_CLASSES = 2  # of a BERT's pairs of sentences


def residual_norm(tape: Tape, x: Value, config: RunConfig, sizes: Sizes, unit: str) -> Value:
    """A norm of the residual stream."""
    is_rms = config.model.normalization == "RMSNorm"
    return op.norm(tape, x, (sizes.residual_rows, sizes.hidden), sizes, is_rms=is_rms, unit=unit)


def embedding(tape: Tape, config: RunConfig, sizes: Sizes) -> Value:
    """`GPTEmbedding` or `BertEmbedding`: words, positions, token types, and a norm where norms follow."""
    model, is_bert = config.model, config.model.architecture == "bert"
    with tape.at("embedding"):
        x = _words(tape, sizes)
        if model.position_embedding_type == "learned_absolute":
            # The gradient of the rows in use is put into a whole table, and that is widened to be added.
            x = _added(tape, x, sizes, 2 * model.max_position_embeddings * sizes.hidden * sizes.element)
        if is_bert and model.num_token_types:
            # Each rank looks up the types of its own part of the sequence, a copy.
            x = _added(tape, x, sizes, 0, kept=sizes.residual_rows * INT64 if sizes.sharded else 0)
        if is_bert and model.norm_position == "post":
            x = residual_norm(tape, x, config, sizes, "embedding")
        return op.dropout(tape, x, sizes.residual, sizes, drops=model.hidden_dropout > 0)


def _words(tape: Tape, sizes: Sizes) -> Value:
    """The lookup, whose gradients are added to the rows of a buffer, widened where that is wider."""
    count = sizes.rows * sizes.hidden
    widened = count * FP32 if sizes.element != sizes.gradient else 0
    ids, x = tape.memory(sizes.rows * INT64), tape.value(count * sizes.element)
    work = {"weights_temporary": widened, "reads_gradient": True}
    tape.add(Node("lookup", (), (x,), (ids,), unit="embedding.word", contributions=1, **work))
    if sizes.tp > 1:
        x = tape.elementwise("elsewhere", x, count * sizes.element, saves=(tape.memory(sizes.rows),))
    return op.to_residual(tape, x, sizes)


def _added(tape: Tape, x: Value, sizes: Sizes, temporary: int, *, kept: int = 0) -> Value:
    """x plus rows of another table of the embedding, with `kept` bytes of indices."""
    return tape.add(
        Node(
            "rows",
            (x,),
            (tape.value(sizes.residual),),
            (tape.memory(kept),) if kept else (),
            (0,),
            backward_temporary=temporary,
            unit="embedding",
            contributions=1,
        )
    )


def head(tape: Tape, x: Value, config: RunConfig, sizes: Sizes) -> Value:
    """`GPTHead` or `BertHead`, from the last block to the loss."""
    is_bert = config.model.architecture == "bert"
    return _bert_head(tape, x, config, sizes) if is_bert else _gpt_head(tape, x, config, sizes)


def _gpt_head(tape: Tape, x: Value, config: RunConfig, sizes: Sizes) -> Value:
    y = residual_norm(tape, x, config, sizes, "head")
    logits = op.linear(
        tape, y, (sizes.hidden, sizes.vocab), sizes, input_type="V", unit=_table_unit(config), bias=False
    )
    return _loss(tape, logits, sizes.rows, config, sizes, reads=(x.memory,))


def _table_unit(config: RunConfig) -> str:
    return "head" if config.model.untie_embeddings_and_output_weights else "embedding.word"


def _bert_head(tape: Tape, x: Value, config: RunConfig, sizes: Sizes) -> Value:
    """Only the masked tokens, an expected number of them, come to the vocabulary."""
    model, entry = config.model, x
    predicted = max(1, round(sizes.rows * config.data.mask_prob))
    size = predicted * sizes.hidden * sizes.element
    if model.norm_position == "pre":
        x = residual_norm(tape, x, config, sizes, "head")
    whole = sizes.rows * sizes.hidden * sizes.element
    tokens = x
    if sizes.sharded:
        copied = whole if sizes.on_cpu else 0
        tokens = tape.add(
            Node("whole", (x,), (tape.value(whole),), gradients=(sizes.residual,), forward_temporary=copied)
        )
    index = tape.memory(predicted * INT64)
    y = tape.add(Node("masked tokens", (tokens,), (tape.value(size),), (index,), (whole,)))
    linear = {"input_type": "local", "unit": "head", "rows": predicted}
    y = op.linear(tape, y, (sizes.hidden, sizes.hidden), sizes, bias=True, **linear)
    y = tape.elementwise("gelu", y, size, saves=(y.memory,))
    is_rms = model.normalization == "RMSNorm"
    y = op.norm(tape, y, (predicted, sizes.hidden), sizes, is_rms=is_rms, unit="head")
    table = {**linear, "unit": _table_unit(config)}
    logits = op.linear(tape, y, (sizes.hidden, sizes.vocab), sizes, bias=False, **table)
    biased = tape.view(logits.memory)  # the bias is added within the product, and is of another unit than the table
    tape.add(Node("bias", (logits,), (biased,), gradients=(0,), unit="head", contributions=1))
    losses = [_loss(tape, biased, predicted, config, sizes, reads=(entry.memory,), weights=predicted * FP32)]
    if model.has_binary_head:
        losses.append(_pairs(tape, x, sizes))
    return tape.add(Node("losses", tuple(losses), (tape.value(FP32),), gradients=(FP32,) * len(losses)))


def _pairs(tape: Tape, x: Value, sizes: Sizes) -> Value:
    """The first token of every sample through the pooler to two classes."""
    rows = sizes.batch
    size = rows * sizes.hidden * sizes.element
    # Under sequence parallelism one rank has it; the others mask what they have and take part in the sum.
    first = tape.value(size) if sizes.sharded else tape.view(x.memory)
    mask = (tape.memory(rows * sizes.hidden),) if sizes.sharded else ()
    tape.add(Node("first token", (x,), (first,), mask, (sizes.residual,)))
    given = {"input_type": "local", "unit": "head", "rows": rows, "bias": True}
    y = op.linear(tape, first, (sizes.hidden, sizes.hidden), sizes, **given)
    pooled = tape.value(size)
    tape.add(Node("tanh", (y,), (pooled,), (pooled.memory,), (size,)))
    scores = op.linear(tape, pooled, (sizes.hidden, NUM_CLASSES), sizes, **given)
    saves = (tape.memory(rows * NUM_CLASSES * FP32), tape.memory(FP32))  # log-probabilities, and torch's total weight
    return tape.add(Node("classes", (scores,), (tape.value(FP32),), saves, (rows * NUM_CLASSES * FP32,)))


def _loss(
    tape: Tape,
    logits: Value,
    rows: int,
    config: RunConfig,
    sizes: Sizes,
    *,
    reads: tuple[int, ...],
    weights: int = 0,
) -> Value:
    """The cross-entropy of every row, whose gradient takes the place of the logits, and its sum with weights, of which
    some bytes may be made for it."""
    row, columns = rows * FP32, min(config.model.vocab_size, sizes.vocab)
    copied = rows * INT64 if sizes.batch > 1 else 0  # a single sample's labels lie as the loss wants them
    targets, largest, sums = tape.memory(copied), tape.memory(row), tape.memory(2 * row)
    loss = tape.add(
        Node(
            "cross_entropy",
            (logits,),
            (tape.value(row),),
            (logits.memory, targets, largest, sums),
            (0,),
            in_place=logits.memory,
            forward_temporary=_loss_temporary(rows, columns, sizes, backward=False),
            backward_temporary=_loss_temporary(rows, columns, sizes, backward=True),
            reads=reads,
        )
    )
    weighed = tape.elementwise("weigh", loss, row, saves=(tape.memory(weights),) if weights else ())
    return tape.add(Node("sum", (weighed,), (tape.value(FP32),), gradients=(0,)))


def _loss_temporary(rows: int, columns: int, sizes: Sizes, *, backward: bool) -> int:
    """Bytes of rows of logits that the reference cross-entropy has in fp32 at once.

    It works on some rows at a time, widens them first if they are narrow, and in the backward lets go of the rows
    before only when it has the next ones.
    """
    if not sizes.on_cpu:
        return 0
    copies = 2 if sizes.element < FP32 else 1
    first = min(rows, max(1, CHUNK_ELEMENTS // columns))
    second = min(first, rows - first)
    at_once = max(copies * first, first + copies * second if backward else 0)
    return at_once * columns * FP32
