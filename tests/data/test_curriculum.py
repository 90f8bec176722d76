"""The curriculum's stream: bounds that hold, one draw of each sample, and batches that depend on nothing but k."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron3d.config.check import resolve
from megatron3d.config.cli import parse_args
from megatron3d.data.bert import BertForm, BertSample, BertSamples
from megatron3d.data.blend import Blend
from megatron3d.data.build import GPTData, build_gpt_data
from megatron3d.data.curriculum.build import RunLength, identity_of, with_curriculum
from megatron3d.data.curriculum.index import read_index, write_index
from megatron3d.data.curriculum.repeats import expected_distinct
from megatron3d.data.curriculum.stream import AdmittedSets, Curriculum, Plateau
from megatron3d.data.gpt import GPTSamples
from megatron3d.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron3d.data.loader import GlobalBatches
from megatron3d.data.masking import BertVocabulary, MaskingRules
from megatron3d.data.order import derive_seed
from megatron3d.errors import ConfigError, DataError
from tests.data.corpora import counting_documents, write_documents

S = 4
BASE = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 2 --seq-length 4 --max-position-embeddings 4 "
    "--micro-batch-size 1 --vocab-size 60000 --lr 1e-3 --global-batch-size 8 --train-iters 1000 --split 1,0,0"
)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora with an index each, of metrics that are random numbers and do not agree."""
    root = tmp_path_factory.mktemp("curriculum")
    for number, lengths in enumerate(([40, 7, 300, 1500, 153], [900, 101])):
        write_documents(root / f"c{number}", counting_documents(lengths))
        stream = stream_of(root, number)
        for place, metric in enumerate(("hard", "odd")):
            values = np.random.default_rng([number, place]).gamma(2.0, 10.0, stream.num_fixed)
            write_index(root / f"i{number}" / metric, metric, values, identity_of(stream, None), version=1)
    return root


def stream_of(root: Path, number: int) -> GPTSamples:
    dataset = IndexedDataset(root / f"c{number}")
    return GPTSamples(dataset, range(dataset.num_documents), seq_length=S, seed=derive_seed(1234, "train", number))


def data_of(root: Path, options: str, *, num_corpora: int = 1, base: str = BASE) -> GPTData:
    paths = " ".join(str(root / f"c{number}") for number in range(num_corpora))
    indexes = " ".join(str(root / f"i{number}") for number in range(num_corpora))
    ours = "" if "--curriculum-deepspeed-index" in options else f"--curriculum-index {indexes}"
    argv = f"{base} --data-path {paths} {ours} {options}".split()
    run = resolve(parse_args(argv, program="p", description="d", log=lambda line: None), 1)
    plain = build_gpt_data(run.data, seq_length=S, vocab_size=60000, eod_token=None)
    return with_curriculum(plain, run.curriculum, run.data, RunLength(run.train, 1), vocab_size=60000)


def train_of(root: Path, options: str, **more: Any) -> Curriculum:
    found = data_of(root, options, **more).train
    assert isinstance(found, Curriculum)
    return found


def metric_of(root: Path, number: int, metric: str) -> np.ndarray:
    """The metric of each sample, by its number."""
    index = read_index(root / f"i{number}" / metric)
    found = np.empty(index.num_samples, dtype=np.float32)
    found[index.order] = index.value
    return found


BY_VALUE = (
    "--curriculum-metric hard --curriculum-difficulty-type value --curriculum-min-difficulty 5 "
    "--curriculum-max-difficulty 90 --curriculum-steps 400"
)


def test_no_sample_of_a_thousand_steps_is_above_the_bound_of_its_step(corpora: Path) -> None:
    """The bound from DeepSpeed's formula, the metric from the file, and the sample by its first token."""
    curriculum, metric = train_of(corpora, BY_VALUE), metric_of(corpora, 0, "hard")
    hardest = []
    for step in range(1, 1001):
        bound = min(np.floor(min(step / 400, 1.0) ** 0.5 * 85 + 5), 90)
        numbers = [int(curriculum.sample((step - 1) * 8 + row)[0]) // S for row in range(8)]
        hardest.append(metric[numbers].max())
        assert hardest[-1] <= bound, f"step {step}"
    assert max(hardest[:50]) < max(hardest) and max(hardest) > 60


def test_with_several_metrics_a_sample_passes_all_bounds(corpora: Path) -> None:
    options = (
        "--curriculum-metric hard odd --curriculum-difficulty-type value percentile --curriculum-min-difficulty 9 40 "
        "--curriculum-max-difficulty 90 100 --curriculum-steps 300 --curriculum-pacing fixed_linear"
    )
    curriculum = train_of(corpora, options)
    hard, odd = metric_of(corpora, 0, "hard"), metric_of(corpora, 0, "odd")
    ranks = np.argsort(np.argsort(odd, kind="stable"), kind="stable")
    for step in (1, 2, 50, 150, 299, 300, 999):
        share = min(step / 300, 1)
        may = (hard <= np.floor(share * 81 + 9)) & (ranks < len(odd) * int(share * 60 + 40) // 100)
        shown = {int(curriculum.sample((step - 1) * 8 + row)[0]) // S for row in range(8)}
        assert shown <= set(np.flatnonzero(may).tolist()), f"step {step}"


def test_on_a_plateau_each_admitted_sample_comes_once_before_any_comes_twice(corpora: Path) -> None:
    options = (
        "--curriculum-metric hard --curriculum-pacing fixed_discrete --curriculum-difficulties 20,50,100 "
        "--curriculum-last-steps 37,200"
    )
    curriculum = train_of(corpora, options)
    order = read_index(corpora / "i0" / "hard").order
    for first, stop, admitted in ((0, 296, 99), (296, 1600, 249), (1600, 3000, 499)):
        numbers = [int(curriculum.sample(slot)[0]) // S for slot in range(first, stop)]
        passes = [numbers[begin : begin + admitted] for begin in range(0, len(numbers), admitted)]
        wanted = sorted(order[:admitted].tolist())
        for one in passes:
            assert len(set(one)) == len(one) and set(one) <= set(wanted)
        assert all(sorted(one) == wanted for one in passes if len(one) == len(wanted))
        assert len(passes) < 2 or passes[0][: len(passes[1])] != passes[1]


def test_batches_are_the_same_after_a_resume_and_at_any_number_of_ranks(corpora: Path) -> None:
    options = f"{BY_VALUE} --curriculum-warmup-fraction 0.3"

    def batches(first_step: int, dp: int) -> list[bytes]:
        found = []
        data = data_of(corpora, options, num_corpora=2)
        assert data.train is not None
        readers = [GlobalBatches(data.reader(data.train), num_workers=0) for _ in range(dp)]
        for step in range(first_step, 400, 7):
            parts = [reader.read(step * 8, 8, rank, dp) for rank, reader in enumerate(readers)]
            rows = [np.concatenate([part.tokens_BS, part.labels_BS], axis=1) for part in parts]
            found.append(np.concatenate(rows).tobytes())
        return found

    whole = batches(0, 1)
    assert batches(140, 1) == whole[20:]
    assert batches(0, 2) == whole
    assert batches(0, 4) == whole
    assert len(set(whole)) == len(whole)


def test_each_corpus_of_a_blend_follows_its_own_index(corpora: Path) -> None:
    curriculum = train_of(corpora, BY_VALUE, num_corpora=2)
    assert isinstance(curriculum.plain, Blend)
    metrics = [metric_of(corpora, number, "hard") for number in range(2)]
    served = [0, 0]
    for slot in range(3000):
        corpus, own = curriculum.plain.choose(slot)
        assert own == served[corpus]
        served[corpus] += 1
        found = curriculum.choose(slot)
        assert found is not None and found[0] == corpus
        step = slot // 8 + 1
        assert metrics[corpus][found[1]] <= min(np.floor(min(step / 400, 1.0) ** 0.5 * 85 + 5), 90)


def test_behind_the_warm_up_the_batches_are_those_without_a_curriculum(corpora: Path) -> None:
    data = data_of(corpora, f"{BY_VALUE} --curriculum-warmup-fraction 0.25")
    curriculum = data.train
    assert isinstance(curriculum, Curriculum) and curriculum.warmup_slots == 2000
    assert data.corpora is None, "a blend with other weights would continue without the curriculum"
    plain = curriculum.plain
    assert all(np.array_equal(curriculum.sample(slot), plain.sample(slot)) for slot in range(2000, 2500))
    assert not all(np.array_equal(curriculum.sample(slot), plain.sample(slot)) for slot in range(1990, 2000))
    assert any("a warm-up up to sample 2,000" in note for note in data.notes)
    assert any("are expected to repeat an earlier one (without a curriculum 7,501)" in note for note in data.notes)


@pytest.mark.parametrize("more", ["", "--curriculum-warmup-fraction 0.03", "--curriculum-seed 7"])
def test_expected_distinct_samples_are_about_those_that_come(corpora: Path, more: str) -> None:
    curriculum = train_of(corpora, f"{BY_VALUE} {more}")
    for num_slots in (120, 600, 1500):
        seen = {int(curriculum.sample(slot)[0]) // S for slot in range(num_slots)}
        expected = expected_distinct(curriculum, num_slots)
        assert expected is not None
        # three standard deviations of as many independent draws, or more
        assert abs(expected - len(seen)) <= 3 * max(4.0, 0.5 * len(seen) ** 0.5), (num_slots, expected, len(seen))


def test_a_ramp_of_the_batch_size_moves_the_plateaus_with_the_steps(corpora: Path) -> None:
    base = BASE.replace("--train-iters 1000", "--train-samples 4000")
    options = (
        "--rampup-batch-size 4 4 400 --curriculum-metric hard --curriculum-pacing fixed_discrete "
        "--curriculum-difficulties 10,100 --curriculum-last-steps 150"
    )
    curriculum = train_of(corpora, options, base=base)
    assert [one.first_slot for one in curriculum.plateaus] == [0, 100 * 4 + 50 * 8]


DISCRETE = "--curriculum-metric hard --curriculum-pacing fixed_discrete --curriculum-last-steps 5"
BAD: dict[str, str] = {
    "admits 0 of the 499 samples": f"{DISCRETE} --curriculum-difficulties 0,90 --curriculum-difficulty-type value",
    "but a step takes 8 of them; raise --curriculum-min-difficulty": f"{DISCRETE} --curriculum-difficulties 1,90",
    "--curriculum-pacing math:exp gives 148.413 at step 5 for hard, which is no percentile": (
        "--curriculum-metric hard --curriculum-pacing math:exp --curriculum-steps 5"
    ),
    "cannot be read (No such file or directory); make it by tools/analyze_data.py": (
        "--curriculum-metric missing --curriculum-steps 9"
    ),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bounds_that_admit_too_little_and_missing_indexes_are_named(corpora: Path, sentence: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        data_of(corpora, BAD[sentence])
    assert sentence in str(caught.value)


def test_there_is_one_index_for_each_corpus(corpora: Path) -> None:
    with pytest.raises(ConfigError, match=r"names 1 directories for 2 corpora"):
        data_of(corpora, f"{BY_VALUE} --curriculum-index {corpora / 'i0'}", num_corpora=2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dataset": "0" * 64}, "the corpus, by its digest is 00000000 there"),
        ({"seq_length": 8}, "--seq-length is 8 there and 4 in this run"),
        ({"documents": (0, 3)}, "the documents of the training split is 0 to 3 there and 0 to 5 in this run"),
        ({"kind": "sentences"}, "the kind of model is sentence"),
    ],
)
def test_an_index_of_other_samples_is_refused(
    corpora: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    identity = replace(identity_of(stream_of(corpora, 0), None), **change)
    write_index(tmp_path / "hard", "hard", np.arange(499.0), identity, version=1)
    with pytest.raises(DataError, match="is of other samples than those of") as caught:
        data_of(corpora, f"{BY_VALUE} --curriculum-index {tmp_path}")
    assert sentence in str(caught.value)


def test_damaged_files_of_an_index_are_named(corpora: Path, tmp_path: Path) -> None:
    identity = identity_of(stream_of(corpora, 0), None)
    write_index(tmp_path, "hard", np.arange(499.0), identity, version=1)
    with open(tmp_path / "value.f32", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"value.f32 holds 1997 bytes, but 499 samples need 1996"):
        read_index(tmp_path)
    for name, numbers, sentence in (
        ("value.f32", np.arange(499.0, dtype="<f4")[::-1], "value.f32 is damaged: its numbers do not rise"),
        ("order.u32", np.full(499, 2**31, dtype="<u4"), "order.u32 is damaged: sample 0 is missing"),
    ):
        write_index(tmp_path, "hard", np.arange(499.0), identity, version=1)
        numbers.tofile(tmp_path / name)
        with pytest.raises(DataError, match=sentence):
            read_index(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 1, "metric": "hard"}')
    with pytest.raises(DataError, match=r"index.json lacks or misspells 'samples'"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_text("[")
    with pytest.raises(DataError, match="is not valid JSON"):
        read_index(tmp_path)


def written_by_deepspeed(prefix: Path, items: list[list[int]], code: int, dtype: str) -> str:
    """The bytes that DeepSpeed's builder writes, from its source: sizes, byte offsets, one bound of documents."""
    sizes = [len(item) for item in items]
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]) * np.dtype(dtype).itemsize
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(items), 1)
    arrays = (np.array(sizes, "<i4"), offsets.astype("<i8"), np.array([0], "<i8"))
    prefix.with_suffix(".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    prefix.with_suffix(".bin").write_bytes(np.concatenate(items).astype(dtype).tobytes())
    return str(prefix)


def test_deepspeeds_files_admit_what_its_sampler_does(corpora: Path, tmp_path: Path) -> None:
    """By value: all items up to the bound. By percentile: the first samples in the order of the items."""
    values = np.random.default_rng(3).integers(1, 40, 499)
    items = [np.flatnonzero(values == value).tolist() for value in np.unique(values)]
    sample = written_by_deepspeed(tmp_path / "to_sample", items, 6, "<u2")
    metric = written_by_deepspeed(tmp_path / "to_metric", [[int(value)] for value in np.unique(values)], 5, "<i8")
    base = f"--curriculum-deepspeed-index {sample} {metric} --curriculum-metric voc"
    discrete = "--curriculum-pacing fixed_discrete --curriculum-last-steps 100"
    by_value = train_of(corpora, f"{base} {discrete} --curriculum-difficulty-type value --curriculum-difficulties 7,39")
    shown = {int(by_value.sample(slot)[0]) // S for slot in range(800)}
    assert shown == set(np.flatnonzero(values <= 7).tolist())
    by_rank = train_of(corpora, f"{base} {discrete} --curriculum-difficulties 20,100")
    assert {int(by_rank.sample(slot)[0]) // S for slot in range(800)} == set(np.concatenate(items)[: 499 // 5].tolist())
    with pytest.raises(DataError, match="is of another corpus, --split or --seq-length"):
        data_of(corpora, f"{base} {discrete} --curriculum-difficulties 20,100", base=BASE.replace("1,0,0", "3,2,0"))
    written_by_deepspeed(tmp_path / "to_sample", [*items[:-1], [0]], 6, "<u2")
    with pytest.raises(DataError, match="but not each from 0 on once"):
        data_of(corpora, f"{base} {discrete} --curriculum-difficulties 20,100")
    Path(f"{sample}.bin").unlink()
    with pytest.raises(DataError, match=r"The DeepSpeed index .*needs .*to_sample\.bin, which cannot be found"):
        data_of(corpora, f"{base} {discrete} --curriculum-difficulties 20,100")


def test_a_bert_sees_the_sentences_that_the_index_admits_under_masks_drawn_anew(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        for _ in range(60):
            sentences = draw.integers(1, 12, size=9).tolist()
            writer.add_document(draw.integers(4, 500, sum(sentences)).tolist(), sentences)
    form = BertForm(35, BertVocabulary.without_tokenizer(500), MaskingRules(), short_seq_prob=0.5)
    stream = BertSamples(IndexedDataset(tmp_path / "d"), range(60), form=form, seed=5)
    lengths = np.array([stream.sample(number).num_tokens for number in range(stream.num_fixed)])
    identity = identity_of(stream, None)
    assert identity.kind == "sentences" and identity.sample_seed == 5 and identity.short_seq_prob == 0.5
    write_index(tmp_path / "length", "length", lengths.astype(float), identity, version=1)
    sets = AdmittedSets([read_index(tmp_path / "length")], ["value"])
    curriculum = Curriculum(stream, [stream], [sets], plateaus=[Plateau(0, 1, (25.0,))], warmup_slots=None, seed=3)
    admitted = int((lengths <= 25).sum())
    assert 8 < admitted < len(lengths)
    first, again = ([curriculum.sample(slot) for slot in range(begin, begin + admitted)] for begin in (0, admitted))
    assert max(sample.num_tokens for sample in first) <= 25

    def texts(samples: list[BertSample]) -> list[bytes]:
        return sorted(np.where(one.predicted, one.labels, one.tokens).tobytes() for one in samples)

    assert texts(first) == texts(again)
    masks = {(text, one.predicted.tobytes()) for one in (*first, *again) for text in texts([one])}
    assert len(masks) > 1.5 * admitted
