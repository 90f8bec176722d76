"""BERT inside the promise: the layout changes no loss, gradient norm or gradient of it, and neither does the library.

Rows as in `test_layouts.py`: fp32 against one process, 20 steps at TP, PP, DP, ZeRO and all of them, few at others;
with norms before and after, with and without the sentence head, tied and untied, and micro-batches whose numbers of
masked tokens differ. Then transformers' `BertForPreTraining` with the same weights: logits, both losses and every
gradient, on batches with padding.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.derive import resolve_model
from megatron3d.config.placeholders import untrained_run
from megatron3d.config.sections.model import GivenModel
from megatron3d.data.batch import BertBatch
from megatron3d.data.loader import GlobalBatches
from megatron3d.models.bert import build_bert_stage
from megatron3d.models.stage import MicroBatch, Stage
from megatron3d.params.module import materialize_all
from megatron3d.train.evaluate import Evaluation, evaluate
from megatron3d.train.setup import build_model
from megatron3d.train.step import micro_batches, train_step
from tests.dist.pool import Pool
from tests.models.asking import asking_for_losses
from tests.parity.compare import AT_ONCE, LOSS_TOLERANCE, check_against_one_process
from tests.parity.runs import BERTS, RATES, Case, batches, brief, config_of, data_of, parts_of, trace_cases

SP, ZERO1, ZERO2, ZERO3 = "--sequence-parallel", "--zero-stage 1", "--zero-stage 2", "--zero-stage 3"
SELECTIVE, FULL = "--recompute-granularity selective", "--recompute-granularity full"

KINDS = [
    Case("bert", Layout(tp=2), SP),
    Case("bert", Layout(pp=2)),
    Case("bert-post", Layout(dp=2), ZERO3),
    Case("bert", Layout(tp=2, pp=2, dp=2), f"{SP} {ZERO1}"),
]
OTHERS = [
    Case("bert", Layout(dp=2), ZERO1),
    Case("bert-untied", Layout(tp=2, pp=2), SP),
    Case("bert-masked", Layout(pp=4)),
    Case("bert", Layout(tp=2)),
    Case("bert-post", Layout(tp=2), f"{SP} {FULL}"),
    Case("bert-masked", Layout(tp=2), SP),
    Case("bert-untied", Layout(tp=2), SP),
    Case("bert-post", Layout(pp=2), "--pipeline-schedule gpipe"),
    Case("bert-untied", Layout(pp=2)),
    Case("bert", Layout(tp=4), SP),
    Case("bert-post", Layout(tp=4)),
    Case("bert", Layout(pp=4), "--pipeline-schedule zb-h1"),
    Case("bert-post", Layout(pp=2, dp=2), f"{ZERO1} --pipeline-schedule zb-v"),
    Case("bert", Layout(pp=2, dp=2), "--pipeline-schedule interleaved --num-virtual-stages-per-pipeline-rank 2"),
    Case("bert", Layout(tp=2, pp=2), f"{SP} {SELECTIVE}"),
    Case("bert-post", Layout(tp=2, dp=2), f"{SP} {ZERO2}"),
    Case("bert", Layout(dp=4), ZERO1),
    Case("bert-post", Layout(tp=2, pp=2, dp=2), f"{SP} {ZERO3}"),
    Case("bert-masked", Layout(tp=4, pp=2), SP),
    Case("bert", Layout(dp=8), ZERO1),
]
CASES = [*KINDS, *map(brief, OTHERS)]
SHORT = [Case("bert", Layout(tp=2), SP), Case("bert", Layout(pp=2)), Case("bert-post", Layout(dp=2), ZERO3)]
SLOW = [case for case in map(brief, OTHERS) if case.layout.world_size == 8 or case.layout == Layout(tp=4)]
BATCHES = batches(CASES, short=SHORT, slow=SLOW)

transformers = pytest.importorskip("transformers")

VOCAB, HIDDEN, HEADS, LAYERS, POSITIONS, FFN = 67, 32, 4, 3, 24, 56
TOLERANCE = 1e-5  # fp32 sums in another order differ by about 1e-7 of the largest value; the promise is 1e-5


@pytest.mark.parity
@pytest.mark.parametrize(("world_size", "batch"), BATCHES)
def test_layout_gives_the_losses_norms_and_gradients_of_one_process(
    pool: Pool, parity_table: list[str], world_size: int, batch: list[Case]
) -> None:
    by_rank = pool.run(world_size, trace_cases, batch, timeout_s=240)
    for number, case in enumerate(batch):
        check_against_one_process(case, [traces_of_rank[number] for traces_of_rank in by_rank], parity_table)


@pytest.mark.parametrize("model", BERTS)
def test_one_process_learns_a_batch(model: str) -> None:
    parts = parts_of(Case(model, Layout(), AT_ONCE), make_mesh(Layout()))
    data = data_of(parts.config)
    batch = data.reader(data.train)(0, 8)
    losses = [train_step(parts, batch, RATES, step=step).loss for step in range(20)]
    assert losses[-1] < losses[0] - 0.5, f"what layouts are compared with does not learn: {losses}"


def test_micro_batches_of_the_rows_differ_in_their_numbers_of_masked_tokens() -> None:
    config = config_of(Case("bert", Layout()))
    batch = data_of(config).reader(data_of(config).train)(0, 8)
    assert len({int(part.loss_count()) for part in batch.split(2)}) > 1


def evaluated(rank: int, world_size: int, case: Case) -> Evaluation:
    """The evaluation of two global batches with the initial weights."""
    parts = parts_of(case, make_mesh(case.layout))
    data = data_of(parts.config)
    with GlobalBatches(data.reader(data.valid), num_workers=0) as batches:
        return evaluate(parts, batches, num_batches=2)


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(dp=4)])
def test_losses_and_accuracies_of_an_evaluation_are_those_of_one_process(pool: Pool, layout: Layout) -> None:
    expected = evaluated(0, 1, Case("bert", Layout()))
    assert set(expected.losses) == {"lm", "sentence"}
    assert set(expected.accuracies) == {"masked_accuracy", "sentence_accuracy"}
    for found in pool.run(4, evaluated, Case("bert", layout, SP if layout.tp > 1 else "")):
        assert found.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        assert found.accuracies == pytest.approx(expected.accuracies)
        assert found.unigram_accuracy == pytest.approx(expected.unigram_accuracy)


# --- transformers -----------------------------------------------------------------------------------------------------


def theirs_of() -> nn.Module:
    """transformers' model with random weights; norms and biases too are moved from where they start."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = transformers.BertForPreTraining(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return theirs.eval()


def named_as_ours(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors (weights or gradients) under our names."""
    ends = {
        "embedding.word": "bert.embeddings.word_embeddings",
        "embedding.position": "bert.embeddings.position_embeddings",
        "embedding.token_type": "bert.embeddings.token_type_embeddings",
        "embedding.norm": "bert.embeddings.LayerNorm",
        "head.transform": "cls.predictions.transform.dense",
        "head.transform_norm": "cls.predictions.transform.LayerNorm",
        "head.pooler": "bert.pooler.dense",
        "head.binary": "cls.seq_relationship",
    }
    layer_names = {
        "attention.projection": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    for layer in range(LAYERS):
        ends |= {f"layers.{layer}.{a}": f"bert.encoder.layer.{layer}.{b}" for a, b in layer_names.items()}
    pairs = [(f"{a}.{part}", f"{b}.{part}") for a, b in ends.items() for part in ("weight", "bias")]
    named = {ours: values[theirs] for ours, theirs in pairs if theirs in values}
    for layer in range(LAYERS):
        for part in ("weight", "bias"):
            fused = [f"bert.encoder.layer.{layer}.attention.self.{one}.{part}" for one in ("query", "key", "value")]
            named[f"layers.{layer}.attention.qkv.{part}"] = torch.cat([values[name] for name in fused])
    return named | {"head.output_bias": values["cls.predictions.bias"]}


def ours_of(theirs: nn.Module) -> Stage:
    """Our model with the same weights."""
    model = GivenModel(
        architecture="bert",
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=FFN,
        seq_length=POSITIONS,
        vocab_size=VOCAB,
        make_vocab_size_divisible_by=16,
        norm_position="post",
        norm_epsilon=theirs.config.layer_norm_eps,
    )
    config = untrained_run(resolve_model(model))
    stage = build_model(config, make_mesh(Layout()), torch.device("cpu"), build_bert_stage).stages[0]
    materialize_all(stage, seed=7, tp=1, tp_rank=0, device=torch.device("cpu"))
    weights, declared = named_as_ours(dict(theirs.named_parameters())), stage.parameters_by_name()
    assert weights.keys() == declared.keys()
    with torch.no_grad():
        for name, one in declared.items():
            one.parameter.fill_(10.0)  # rows of padding would show in any result they reached
            one.parameter[: one.spec.shape[0]].copy_(weights[name])
    return stage


def batch_of() -> BertBatch:
    """Three samples, two of them padded, with a few masked tokens each."""
    generator = torch.Generator().manual_seed(3)
    # transformers gives its padding id 0 no gradient as an input, so no token has it.
    tokens, labels = torch.randint(1, VOCAB, (2, 3, 20), generator=generator)
    lengths = torch.tensor([20, 13, 9])
    real = torch.arange(20) < lengths[:, None]
    masked = (torch.rand(3, 20, generator=generator) < 0.3) & real
    types = ((torch.arange(20) > 6) & real).long()
    return BertBatch(tokens, labels, masked.float(), types, real, torch.tensor([0, 1, 1]))


def both_losses(theirs: nn.Module, batch: BertBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """transformers' objective, whose two means are ours, and its outputs."""
    outputs = theirs(
        batch.tokens_BS,
        attention_mask=batch.padding_mask_BS.long(),
        token_type_ids=batch.token_types_BS,
        labels=batch.labels_BS.masked_fill(batch.loss_mask_BS == 0, -100),
        next_sentence_label=batch.sentence_labels_B,
    )
    return outputs.loss, outputs


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a part of the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def test_token_and_pair_logits_equal_those_of_transformers() -> None:
    theirs, batch = theirs_of(), batch_of()
    ours = ours_of(theirs)
    outputs = both_losses(theirs, batch)[1]
    (micro,) = micro_batches(batch, 3, device=torch.device("cpu"))
    seen: list[Tensor] = []
    ours.head.register_forward_pre_hook(lambda head, inputs: seen.append(head.normed(inputs[0])))
    logits_SBV = ours(None, MicroBatch(**{**vars(micro), "labels_BS": None}))[..., :VOCAB]
    pairs_BC = ours.head.pair_logits(ours.head.pooled(seen[0]))
    real = batch.padding_mask_BS
    assert float(outputs.prediction_logits.detach().std()) > 0.5, "logits that hardly differ would not show a mistake"
    assert difference(logits_SBV.transpose(0, 1)[real], outputs.prediction_logits[real]) < TOLERANCE
    assert difference(pairs_BC, outputs.seq_relationship_logits) < TOLERANCE


def test_both_losses_and_gradients_of_all_parameters_equal_those_of_transformers() -> None:
    theirs, batch = theirs_of(), batch_of()
    ours = ours_of(theirs)
    expected, outputs = both_losses(theirs, batch)
    expected.backward()
    (micro,) = micro_batches(batch, 3, device=torch.device("cpu"))
    counts = {"lm": int(batch.loss_count()), "sentence": int(batch.sentence_count())}
    gradients = {name: 1 / count for name, count in counts.items()}
    micro, losses = asking_for_losses(ours, micro, gradients=gradients, counts_hits=True)
    ours(None, micro).backward()
    loss = sum(float(total) / count for total, count in zip(losses.sums(), counts.values()))
    lm_hits, pair_hits = losses.hits()
    assert loss == pytest.approx(float(expected.detach()), rel=TOLERANCE)
    masked = batch.loss_mask_BS > 0
    assert lm_hits == (outputs.prediction_logits.argmax(-1) == batch.labels_BS)[masked].sum()
    assert pair_hits == (outputs.seq_relationship_logits.argmax(-1) == batch.sentence_labels_B).sum()
    wanted = named_as_ours({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, one in ours.parameters_by_name().items():
        grad = one.parameter.grad
        assert grad is not None, f"{name} got no gradient"
        valid, padding = grad[: one.spec.shape[0]], grad[one.spec.shape[0] :]
        assert difference(valid, wanted[name]) < TOLERANCE, name
        assert not padding.any(), f"{name}: rows of padding got a gradient"
