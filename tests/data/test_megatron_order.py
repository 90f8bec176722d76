"""`--sample-order megatron`: sample k is that of Megatron core's own data sets, for every k."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.config.sample_counts import SampleCounts, sample_counts
from megatron3d.config.sections.data import DataConfig
from megatron3d.data.build import GPTData, build_gpt_data
from megatron3d.data.indexed import IndexedDatasetWriter
from megatron3d.data.megatron_blend import neediest_turns, normalized
from megatron3d.data.megatron_samples import MegatronSamples
from megatron3d.errors import ConfigError, DataError
from tests.data.corpora import counting_documents, write_documents

MODEL = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 7 --vocab-size 64 --max-position-embeddings 8 "
    "--micro-batch-size 1 --lr 1e-3 --device cpu"
)


@pytest.fixture
def prefixes(tmp_path: Path) -> tuple[str, str, str]:
    """Three corpora with documents of 0 to 30 tokens, of which the third is small."""
    generator = np.random.default_rng(3)
    for name, count in (("A", 60), ("B", 45), ("C", 9)):
        lengths = generator.integers(0, 31, size=count).tolist()
        write_documents(tmp_path / name, counting_documents(lengths))
    a, b, c = (str(tmp_path / name) for name in "ABC")
    return a, b, c


def counts_of(train: int, valid: int = 12, test: int = 5, *, read: int | None = None) -> SampleCounts:
    return SampleCounts(train, valid, test, train if read is None else read, min(valid, 5))


def ours(counts: SampleCounts, **options: Any) -> GPTData:
    data = DataConfig(sample_order="megatron", **options)
    return build_gpt_data(data, seq_length=7, vocab_size=2000, eod_token=None, counts=counts)


def theirs(counts: SampleCounts, data: DataConfig) -> list[Any]:
    """Megatron core's data sets of train, valid and test for the same options."""
    builder = pytest.importorskip(
        "megatron.core.datasets.blended_megatron_dataset_builder", reason="needs megatron-core"
    )
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="needs megatron-core")
    utils = pytest.importorskip("megatron.core.datasets.utils", reason="needs megatron-core")
    per_split = [data.train_data_path, data.valid_data_path, data.test_data_path]
    blends = [utils.get_blend_from_list(list(words) or None) for words in per_split]
    config = gpt.GPTDatasetConfig(
        random_seed=data.seed,
        sequence_length=7,
        blend=utils.get_blend_from_list(list(data.data_path) or None),
        blend_per_split=blends if any(per_split) else None,
        split=None if any(per_split) else data.split,
        path_to_cache=None,
        mid_level_dataset_surplus=data.mid_level_dataset_surplus,
        tokenizer=SimpleNamespace(vocab_size=2000, eod=1999, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = list(counts.by_split.values())
    return builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, sizes, lambda: True, config).build()


# The words of the data options with a letter for each corpus, and the training samples asked for: less than an epoch,
# just an epoch, epochs whose last one is shuffled with the others and by itself.
CASES = {
    "part of an epoch": ({"data_path": "A", "split": "80,15,5"}, 40),
    "last epoch apart": ({"data_path": "A", "split": "80,15,5"}, 300),
    "last epoch among the others": ({"data_path": "A", "split": "80,15,5", "seed": 7}, 190),
    "fewer tokens than a sample": ({"data_path": "C", "split": "70,20,10"}, 50),
    "one corpus with a weight": ({"data_path": "1 A", "split": "80,15,5"}, 210),
    "weights": ({"data_path": "0.7 A 0.2 B 0.1 C", "split": "70,15,15"}, 700),
    "weights with another surplus": (
        {"data_path": "3 A 2 B", "split": "80,15,5", "mid_level_dataset_surplus": 0.3},
        400,
    ),
    "sizes as weights": ({"data_path": "A B", "split": "70,15,15"}, 100),
    "corpora of each split": ({"train_data_path": "0.3 A 0.7 B", "valid_data_path": "C", "test_data_path": "1 B"}, 500),
}


@pytest.mark.parametrize("case", CASES)
def test_every_sample_is_that_of_megatron_core(case: str, prefixes: tuple[str, str, str]) -> None:
    words, num_samples = CASES[case]
    names = dict(zip("ABC", prefixes))
    options = {
        option: tuple(names.get(word, word) for word in value.split()) if option.endswith("path") else value
        for option, value in words.items()
    }
    counts = counts_of(num_samples)
    data = ours(counts, **options)
    references = theirs(counts, DataConfig(sample_order="megatron", **options))
    for stream, reference in zip((data.train, data.valid, data.test), references, strict=True):
        assert stream is not None and len(stream) == len(reference) > 0
        for number in range(len(reference)):
            sample = reference[number]
            assert stream.sample(number)[:-1].tolist() == sample["tokens"].tolist()
            assert stream.sample(number)[1:].tolist() == sample["labels"].tolist()


def test_cases_have_both_kinds_of_a_last_epoch(prefixes: tuple[str, str, str]) -> None:
    """An order in which the last epoch is apart ends with numbers that all lie in it."""
    kinds = set()
    for case in ("last epoch apart", "last epoch among the others"):
        options, num_samples = CASES[case]
        stream = ours(counts_of(num_samples), data_path=(prefixes[0],), split=options["split"]).train
        assert isinstance(stream, MegatronSamples) and stream.num_epochs > 1
        before = stream._samples_in(stream.num_epochs - 1)
        kinds.add(bool(stream._shuffle[before:].min() >= before))
    assert kinds == {True, False}


@pytest.mark.parametrize("seed", range(6))
def test_turns_are_those_of_the_loop(seed: int) -> None:
    """The rule of the module's text, one sample after the other; stretches that guess wrong are run again."""
    generator = np.random.default_rng(seed)
    weights = normalized(np.exp(generator.normal(size=generator.integers(1, 9)) * 2).tolist())
    size = int(generator.integers(1, 5000))
    turns, _ = neediest_turns(weights, size)
    served = [0] * len(weights)
    for number in range(size):
        errors = [weight * float(max(number, 1)) - count for weight, count in zip(weights, served)]
        neediest = errors.index(max(errors))
        assert turns[number] == neediest
        served[neediest] += 1


def test_sequences_are_split_and_shuffled_where_documents_have_several(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        for first in range(0, 400, 20):
            writer.add_document(list(range(first, first + 20)), [5, 15])
    counts, options = counts_of(30, 3, 1), {"data_path": (str(tmp_path / "d"),), "split": "50,30,20"}
    data = ours(counts, **options)
    references = theirs(counts, DataConfig(sample_order="megatron", **options))
    for stream, reference in zip((data.train, data.valid, data.test), references, strict=True):
        assert [stream.sample(n)[:-1].tolist() for n in range(len(reference))] == [
            reference[n]["tokens"].tolist() for n in range(len(reference))
        ]


def test_location_names_the_very_token(prefixes: tuple[str, str, str]) -> None:
    stream = ours(counts_of(90), data_path=(prefixes[0],), split="80,15,5").train
    assert isinstance(stream, MegatronSamples)
    for number in range(20):
        for position, token in enumerate(stream.sample(number)):
            document = next(k for k in range(60) if token in stream.dataset.document(k))
            offset = int(token) - int(stream.dataset.document(document)[0])
            expected = f"{prefixes[0]}.bin, document {document}, sequence {document}, token {offset}"
            assert stream.locate(number, position) == expected


def test_a_run_that_moves_over_begins_behind_what_was_consumed(prefixes: tuple[str, str, str]) -> None:
    words = ("0.6", prefixes[0], "0.4", prefixes[1])
    whole = ours(counts_of(300), data_path=words).train
    rest = ours(counts_of(300), data_path=words, sample_order_consumed=120).train
    assert whole is not None and rest is not None
    assert [rest.sample(n).tolist() for n in range(180)] == [whole.sample(120 + n).tolist() for n in range(180)]
    assert rest.locate(0, 3) == whole.locate(120, 3)


def test_samples_behind_the_last_are_refused_in_a_sentence(prefixes: tuple[str, str, str]) -> None:
    one_split = {"split": "1,0,0"}
    single, blend = (ours(counts_of(40), data_path=words, **one_split).train for words in (prefixes[:1], prefixes[:2]))
    for stream in (single, blend):
        assert stream is not None
        with pytest.raises(DataError, match=rf"order ends after {len(stream)} samples"):
            stream.sample(len(stream))
        with pytest.raises(IndexError):
            stream.sample(-1)


def test_corpora_by_size_that_end_before_the_run_are_refused_at_the_start(prefixes: tuple[str, str, str]) -> None:
    with pytest.raises(ConfigError, match="but the run reads 5000; shorten it, or give the corpora weights"):
        ours(counts_of(5000), data_path=prefixes[:2], split="1,0,0")
    with pytest.raises(ConfigError, match="but the run reads 5000; shorten it, or raise --sample-order-samples"):
        ours(counts_of(40, read=5000), data_path=prefixes[:1], split="1,0,0", sample_order_samples=40)


def test_a_split_without_a_token_is_refused_where_megatron_core_would_not_return(tmp_path: Path) -> None:
    write_documents(tmp_path / "d", [[], [], [], []])
    with pytest.raises(DataError, match="hold no token"):
        ours(counts_of(10), data_path=(str(tmp_path / "d"),), split="1,0,0")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--train-iters 25 --global-batch-size 8 --eval-interval 10 --eval-iters 3", (200, 72, 24, 200, 24)),
        ("--train-samples 207 --global-batch-size 8 --eval-interval 10 --eval-iters 3", (207, 72, 24, 207, 24)),
        (
            "--train-iters 5 --global-batch-size 8 --eval-interval 10 --eval-iters 1 --sample-order-consumed 100",
            (140, 8, 8, 140, 8),
        ),
        (
            "--train-iters 5 --global-batch-size 8 --eval-interval 10 --eval-iters 1 --sample-order-consumed 100 "
            "--sample-order-samples 800",
            (800, 8, 8, 140, 8),
        ),
    ],
)
def test_samples_asked_for_are_those_of_megatron(options: str, expected: tuple[int, ...]) -> None:
    """Train: iterations x batch; valid: (iterations // interval + 1) x evaluation; test: one evaluation."""
    argv = f"{MODEL} --data-path P --sample-order megatron {options}".split()
    run = resolve(parse_args(argv, program="p", description="d", log=lambda line: None), 1)
    assert sample_counts(run.data, run.train, 1) == SampleCounts(*expected)
