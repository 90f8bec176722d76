"""Generation from a checkpoint: the learned texts come out at any layout, in any batch, with and without the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron3d.checkpoint.load import read_document
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.parallel import GivenParallel
from megatron3d.config.serialize import from_dict
from megatron3d.errors import ConfigError, NumericsError
from megatron3d.inference import forward
from megatron3d.inference.forward import GrowingBatch
from megatron3d.inference.generate import generate
from megatron3d.inference.load import generation_config, load_model
from megatron3d.inference.sampling import SamplingOptions
from megatron3d.models.gpt import build_gpt_stage
from megatron3d.train import state
from megatron3d.train.setup import Model, build_parts
from tests.dist.pool import Pool
from tests.inference.trained import EOD, MODELS, POSITIONS, TEXTS, VOCAB_SIZE, config_of, ids

Checkpoint = Callable[[str], Path]

# Of the largest logit: single ones are sums that nearly cancel. fp32 sums in another order differ by about 1e-6 of it.
TOLERANCE = 1e-5


def assert_equal_logits(found_BV: Tensor, expected_BV: Tensor) -> None:
    largest = float(expected_BV.abs().max())
    torch.testing.assert_close(found_BV, expected_BV, rtol=0.0, atol=TOLERANCE * largest)


GREEDY = SamplingOptions(60, greedy=True)
# Bold enough that the draws decide, so that a draw which depended on the layout or the batch would show.
DRAWN = SamplingOptions(12, temperature=3.0, top_k=20, top_p=0.9, seed=5)
# Beginnings of different lengths, each of one text alone.
PROMPTS = tuple(text[:length] for text, length in zip(TEXTS, (7, 9, 20, 3, 8, 14), strict=True))
PROMPT_IDS = [ids(prompt) for prompt in PROMPTS]
RESTS = [[*ids(text[len(prompt) :]), EOD] for text, prompt in zip(TEXTS, PROMPTS, strict=True)]


def opened(directory: Path, layout: Layout | None = None, *, bf16: bool = False) -> tuple[Model, RunConfig]:
    """The model of a checkpoint at a layout of all ranks there are."""
    layout = layout or Layout()
    parallel = GivenParallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        device="cpu",
    )
    stored = from_dict(read_document(directory, "run"))
    config = generation_config(stored, parallel, world_size=layout.world_size, bf16=bf16)
    return load_model(config, make_mesh(layout), torch.device("cpu"), directory), config


@pytest.mark.parametrize("model", MODELS)
def test_greedy_goes_on_as_learned_and_ends_with_the_document(checkpoint: Checkpoint, model: str) -> None:
    assert generate(*opened(checkpoint(model)), PROMPT_IDS, GREEDY, EOD) == RESTS


def test_a_text_ends_at_the_first_of_several_ends(checkpoint: Checkpoint) -> None:
    """Full stop, comma and the end of a document: each of the six texts meets one of them first."""
    ends = {ord("."), ord(","), EOD}
    expected = [rest[: 1 + min(rest.index(end) for end in ends if end in rest)] for rest in RESTS]
    assert {rest[-1] for rest in expected} == {ord("."), ord(",")}
    assert generate(*opened(checkpoint("gpt2")), PROMPT_IDS, GREEDY, ends) == expected


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("model", MODELS)
def test_a_batch_gives_what_each_prompt_gives_alone(
    checkpoint: Checkpoint, model: str, options: SamplingOptions
) -> None:
    loaded, config = opened(checkpoint(model))
    together = generate(loaded, config, PROMPT_IDS, options, EOD)
    in_small_batches = generate(loaded, config, PROMPT_IDS, options, EOD, batch_size=1)
    assert together == in_small_batches
    assert len(set(map(tuple, together))) == len(together)


@pytest.mark.parametrize("model", MODELS)
def test_logits_of_a_padded_batch_equal_those_of_each_prompt_alone(checkpoint: Checkpoint, model: str) -> None:
    loaded, config = opened(checkpoint(model))
    width = max(map(len, PROMPT_IDS))
    rows = [[0] * (width - len(prompt)) + prompt for prompt in PROMPT_IDS]
    padding = torch.tensor([width - len(prompt) for prompt in PROMPT_IDS])
    together = last_logits(loaded, config, torch.tensor(rows), padding)
    alone = [last_logits(loaded, config, torch.tensor([p]), torch.zeros(1, dtype=torch.int64)) for p in PROMPT_IDS]
    assert_equal_logits(together, torch.cat(alone))


def last_logits(model: Model, config: RunConfig, tokens_BT: Tensor, padding_B: Tensor) -> Tensor:
    """Logits of the token after the last, read in one go."""
    logits_BV = GrowingBatch(model, config.model, padding_B, tokens_BT.shape[1]).read(tokens_BT, tokens_BT.shape[1])
    assert logits_BV is not None and logits_BV.shape == (len(tokens_BT), VOCAB_SIZE)
    return logits_BV


@pytest.mark.parametrize("tokens_at_once", [9, 2048], ids=["prompt-in-pieces", "prompt-whole"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("model", MODELS)
def test_logits_with_the_cache_equal_a_full_recomputation(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, model: str, is_padded: bool, tokens_at_once: int
) -> None:
    monkeypatch.setattr(forward, "MAX_TOKENS_READ_AT_ONCE", tokens_at_once)
    loaded, config = opened(checkpoint(model))
    tokens_BT = torch.randint(0, VOCAB_SIZE, (3, 40), generator=torch.Generator().manual_seed(0))
    padding_B = torch.tensor([0, 7, 11] if is_padded else [0, 0, 0])
    cached = GrowingBatch(loaded, config.model, padding_B, 40)
    recomputed = GrowingBatch(loaded, config.model, padding_B, 40, use_cache=False)
    for stop in (12, *range(13, 41)):
        with_cache, without = cached.read(tokens_BT, stop), recomputed.read(tokens_BT, stop)
        assert with_cache is not None and without is not None
        assert_equal_logits(with_cache, without)


def _logits_of_reads(rank: int, world_size: int, directory: Path, layout: Layout, stops: list[int]) -> list[Tensor]:
    """Body of a worker, and what one process does: the logits after each read of three sequences of different lengths,
    nine places of a rank at once."""
    loaded, config = opened(directory, layout)
    tokens_BT = torch.randint(0, VOCAB_SIZE, (3, 43), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "MAX_TOKENS_READ_AT_ONCE", 9 * len(tokens_BT))
        batch = GrowingBatch(loaded, config.model, torch.tensor([0, 5, 11]), 43)
        found = [batch.read(tokens_BT, stop) for stop in stops]
    return [logits_BV for logits_BV in found if logits_BV is not None]


@pytest.mark.parametrize("model", MODELS)
def test_prompts_read_by_two_context_ranks_give_the_logits_of_one_process(
    checkpoint: Checkpoint, pool: Pool, model: str
) -> None:
    """Lengths that do not divide, parts that are read after others, and single places."""
    stops = [13, 33, 39, 40, 41]
    expected = _logits_of_reads(0, 1, checkpoint(model), Layout(), stops)
    for found in pool.run(2, _logits_of_reads, checkpoint(model), Layout(cp=2), stops):
        for one_BV, expected_BV in zip(found, expected, strict=True):
            assert_equal_logits(one_BV, expected_BV)


LAYOUTS = {
    "gpt2": (Layout(tp=2, pp=2), Layout(tp=4), Layout(pp=4), Layout(pp=2, dp=2)),
    "llama": (Layout(tp=2, pp=2), Layout(pp=4), Layout(tp=4, kv_copies=2), Layout(pp=2, cp=2)),
}


def _generate_at(rank: int, world_size: int, directory: Path, layouts: tuple[Layout, ...]) -> list[list[list[int]]]:
    """Body of a worker: greedy and drawn at each layout, the greedy one from five prompts, which divide by nothing."""
    found = []
    for layout in layouts:
        model, config = opened(directory, layout)
        found += [
            generate(model, config, PROMPT_IDS[:5], GREEDY, EOD),
            generate(model, config, PROMPT_IDS, DRAWN, EOD, batch_size=4),
        ]
    return found


@pytest.mark.parity
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_gives_the_text_of_one_process(checkpoint: Checkpoint, pool: Pool, model: str) -> None:
    loaded, config = opened(checkpoint(model))
    expected = [RESTS[:5], generate(loaded, config, PROMPT_IDS, DRAWN, EOD)]
    for rank, found in enumerate(pool.run(4, _generate_at, checkpoint(model), LAYOUTS[model])):
        for number, layout in enumerate(LAYOUTS[model]):
            assert found[2 * number : 2 * number + 2] == expected, f"rank {rank} at {layout}"


CONTEXT_LAYOUTS = (Layout(tp=2, cp=2), Layout(cp=4), Layout(cp=2, dp=2))


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("model", MODELS)
def test_context_ranks_give_the_text_of_one_process(checkpoint: Checkpoint, pool: Pool, model: str) -> None:
    loaded, config = opened(checkpoint(model))
    expected = [RESTS[:5], generate(loaded, config, PROMPT_IDS, DRAWN, EOD)]
    for rank, found in enumerate(pool.run(4, _generate_at, checkpoint(model), CONTEXT_LAYOUTS)):
        for number, layout in enumerate(CONTEXT_LAYOUTS):
            assert found[2 * number : 2 * number + 2] == expected, f"rank {rank} at {layout}"


@pytest.mark.slow
def test_experts_generate_what_they_learned_at_every_layout(checkpoint: Checkpoint, pool: Pool) -> None:
    """A step of one token for each sequence is less than two tensor-parallel ranks can share."""
    model, config = opened(checkpoint("experts"))
    alone = generate(model, config, PROMPT_IDS, GREEDY, EOD)
    assert sum(text == rest for text, rest in zip(alone, RESTS, strict=True)) >= len(RESTS) - 1
    for layout in (Layout(tp=2), Layout(pp=2), Layout(cp=2)):
        for found in pool.run(2, _generate_at, checkpoint("experts"), (layout,)):
            assert found[0] == alone[:5], str(layout)


def _generate_in_training(rank: int, world_size: int, directory: Path) -> tuple[list[list[int]], bool]:
    """Body of a worker: text of a model in training under sequence parallelism; whether its weights stayed theirs."""
    options = "--sequence-parallel --tensor-model-parallel-size 2 --finetune --load"
    config = config_of("llama", *options.split(), str(directory), world_size=world_size)
    parts = build_parts(config, make_mesh(Layout(tp=2, dp=world_size // 2)), torch.device("cpu"), build_gpt_stage)
    state.restore(parts)
    found = generate(parts.model, config, PROMPT_IDS[:3], GREEDY, EOD)
    gradients = [parameter.grad for stage in parts.model.stages.values() for parameter in stage.parameters()]
    return found, all(gradient is None for gradient in gradients)


def test_a_model_in_training_generates_from_its_own_weights_under_sequence_parallelism(
    checkpoint: Checkpoint, pool: Pool
) -> None:
    assert pool.run(2, _generate_in_training, checkpoint("llama")) == [(RESTS[:3], True)] * 2


def test_bf16_weights_are_read_from_the_same_checkpoint(checkpoint: Checkpoint) -> None:
    model, config = opened(checkpoint("llama"), bf16=True)
    assert {parameter.dtype for parameter in model.stages[0].parameters()} == {torch.bfloat16}
    assert generate(model, config, PROMPT_IDS, GREEDY, EOD) == RESTS


def test_ignoring_the_end_of_document_goes_on_to_the_number_of_tokens(checkpoint: Checkpoint) -> None:
    options = replace(GREEDY, max_new_tokens=20, ignore_eod=True)
    found = generate(*opened(checkpoint("llama")), PROMPT_IDS[:1], options, EOD)
    assert len(found[0]) == 20
    tokens_to_end = len(generate(*opened(checkpoint("llama")), PROMPT_IDS[3:4], GREEDY, EOD)[0])
    beyond = generate(*opened(checkpoint("llama")), PROMPT_IDS[3:4], replace(options, max_new_tokens=40), EOD)[0]
    assert beyond[:tokens_to_end] == RESTS[3] and len(beyond) == 40


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_positions_of_the_model_end_a_text(checkpoint: Checkpoint, kind: str) -> None:
    options = replace(GREEDY, max_new_tokens=60, ignore_eod=True)
    prompts = [PROMPT_IDS[0], PROMPT_IDS[2]]
    found = generate(*opened(checkpoint(kind)), prompts, options, EOD)
    assert [len(p) + len(new) for p, new in zip(prompts, found, strict=True)] == [POSITIONS, POSITIONS]


def test_a_prompt_that_fills_all_positions_is_refused_with_both_numbers(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"prompt 1 has 48 tokens .* is 48, .* at most 47"):
        generate(*opened(checkpoint("gpt2")), [[1], [1] * POSITIONS], GREEDY, EOD)


def test_an_empty_prompt_and_an_id_outside_the_vocabulary_are_refused(checkpoint: Checkpoint) -> None:
    model, config = opened(checkpoint("gpt2"))
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        generate(model, config, [[]], GREEDY, EOD)
    with pytest.raises(ConfigError, match="token id 257, but the model has ids from 0 to 256"):
        generate(model, config, [[1], [VOCAB_SIZE]], GREEDY, EOD)


def test_weights_that_are_not_finite_end_with_a_sentence(checkpoint: Checkpoint) -> None:
    model, config = opened(checkpoint("gpt2"))
    model.stages[0].parameters_by_name()["layers.0.mlp.up.bias"].parameter.data[0] = torch.nan
    with pytest.raises(NumericsError, match="new token 0 are not finite"):
        generate(model, config, PROMPT_IDS[:1], GREEDY, EOD)


def test_no_gradient_buffer_or_graph_is_made(checkpoint: Checkpoint) -> None:
    model, _ = opened(checkpoint("gpt2"))
    assert not any(parameter.requires_grad for parameter in model.stages[0].parameters())


def test_a_layout_that_does_not_fit_names_every_problem(checkpoint: Checkpoint) -> None:
    stored = from_dict(read_document(checkpoint("llama"), "run"))
    parallel = GivenParallel(tensor_model_parallel_size=3, pipeline_model_parallel_size=8)
    with pytest.raises(ConfigError) as caught:
        generation_config(stored, parallel, world_size=3, bf16=False)
    for part in ("--num-query-groups 2", "--num-layers 4 can fill", "A world of 3 ranks"):
        assert part in str(caught.value)
