"""Blends that change at a resume: each corpus continues where it stopped, under any name and in any order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from megatron3d.config.sections.data import DataConfig
from megatron3d.data.blend import BlendSegment
from megatron3d.data.blend_history import (
    BlendHistory,
    ContinuedBlend,
    KnownCorpus,
    continued_blend,
    implied_history,
    numbers_of,
)
from megatron3d.data.build import GPTData, build_gpt_data
from megatron3d.data.content import CorpusContent, content_of
from megatron3d.data.gpt import DocumentRules
from megatron3d.data.loader import GlobalBatches
from megatron3d.errors import MisfitError
from megatron3d.train.state import Progress, Restored
from megatron3d.train.training_data import training_data
from tests.data.corpora import write_documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A, B and C: 40 documents of 10 tokens, which say of which corpus they are."""
    for place, name in enumerate("ABC"):
        write_documents(
            tmp_path / name, [list(range(1000 * place + 10 * n, 1000 * place + 10 * n + 10)) for n in range(40)]
        )
    return tmp_path


class Run:
    """One run after another on the corpora of a folder, each resumed from what the one before has stored."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stored, self.consumed = folder, None, 0

    def train(self, words: str, *, num_batches: int, dp: int) -> tuple[ContinuedBlend, list[list[int]]]:
        """Read global batches of 8 samples from where the last run stopped; returns the samples in order."""
        path = tuple(str(self.folder / word) if word.isalpha() else word for word in words.split())
        options = DataConfig(data_path=path, split="100,0,0")
        data = build_gpt_data(options, seq_length=4, vocab_size=5000, eod_token=None)
        corpora, content = data.corpora, content_of(options, vocab_size=5000)
        assert corpora is not None
        before = self.stored or BlendHistory.begun(content.training, corpora.weights)
        blend = continued_blend(before, content.training, corpora.weights, self.consumed)
        samples = self._read(data, blend, num_batches, dp)
        self.stored = BlendHistory.from_json(blend.history.to_json())
        return blend, samples

    def _read(self, data: GPTData, blend: ContinuedBlend, num_batches: int, dp: int) -> list[list[int]]:
        assert data.train is not None and data.corpora is not None
        stream = data.train if blend.is_as_begun else data.corpora.stream(blend)
        samples = []
        with GlobalBatches(data.reader(data.train), num_workers=1) as batches:
            batches.read(self.consumed, 8, 0, dp)  # what is read ahead by the first reader must be forgotten
            batches.read_by(data.reader(stream))
            for _ in range(num_batches):
                for rank in range(dp):
                    samples += batches.read(self.consumed, 8, rank, dp).tokens_BS.tolist()
                self.consumed += 8
        return samples


def own_samples(folder: Path, name: str, number: int, samples: Sequence[list[int]]) -> None:
    """Fail unless the samples of a corpus among `samples` are its first ones in the order of its number."""
    words = [str(folder / name)] * (number + 1)
    data = build_gpt_data(
        DataConfig(data_path=tuple(words), split="100,0,0"), seq_length=4, vocab_size=5000, eod_token=None
    )
    stream = data.train.streams[number] if number else data.train
    found = [sample for sample in samples if sample[0] // 1000 == "ABC".index(name)]
    assert len(found) > 10
    assert found == [stream.sample(k)[:-1].tolist() for k in range(len(found))]


@pytest.mark.parametrize("degrees", [(1, 1, 1, 1), (2, 1, 4, 2)])
def test_each_corpus_continues_where_it_stopped_at_any_data_parallel_size(
    folder: Path, degrees: tuple[int, ...]
) -> None:
    run, samples = Run(folder), []
    for words, dp in zip(("0.7 A 0.3 B", "0.4 B 0.6 A", "0.2 C 0.8 B", "1 A 1 B 1 C"), degrees, strict=True):
        samples += run.train(words, num_batches=6, dp=dp)[1]
    assert len({tuple(sample) for sample in samples[:70]}) == 70, "no sample twice in the first epoch"
    for number, name in enumerate("ABC"):
        own_samples(folder, name, number, samples)
    assert run.stored.segments == (
        BlendSegment(0, (7, 3, 0)),
        BlendSegment(48, (3, 2, 0)),
        BlendSegment(96, (0, 4, 1)),
        BlendSegment(144, (1, 1, 1)),
    )


def test_equal_weights_change_nothing_under_other_names_and_in_another_order(folder: Path) -> None:
    run, straight = Run(folder), Run(folder)
    first = run.train("7 A 3 B", num_batches=3, dp=1)[1]
    for ending in (".bin", ".idx"):
        (folder / f"A{ending}").rename(folder / f"Moved{ending}")
    blend, then = run.train("0.3 B 0.7 Moved", num_batches=3, dp=2)
    assert blend.lines == () and blend.history.segments == (BlendSegment(0, (7, 3)),)
    assert [Path(one.prefix).name for one in run.stored.corpora] == ["Moved", "B"]
    assert first + then == straight.train("0.7 Moved 0.3 B", num_batches=6, dp=1)[1]


def test_a_change_says_of_each_corpus_its_shares_and_what_it_has_served(folder: Path) -> None:
    run = Run(folder)
    run.train("0.7 A 0.3 B", num_batches=5, dp=1)
    blend, _ = run.train("0.5 C 0.5 A", num_batches=1, dp=1)
    assert blend.lines == (
        "the blend of the training data changes after 40 samples; each corpus continues after those that it has "
        "served:",
        f"  {folder}/A: 70.0000% before, 50.0000% now, 28 samples served",
        f"  {folder}/B: 30.0000% before, 0.0000% now, 12 samples served",
        f"  {folder}/C: 0.0000% before, 50.0000% now, 0 samples served",
    )


def test_an_order_that_cannot_continue_refuses_other_weights(folder: Path) -> None:
    """A curriculum and Megatron-LM's order have no corpora to continue."""
    contents = [content_of(DataConfig(data_path=("1", f"{folder}/A", n, f"{folder}/B")), vocab_size=5000) for n in "12"]
    restored = Restored(Progress(1, 8), mock.sentinel.schedule, saved_corpora=contents[0].training)
    data = GPTData(None, None, None, DocumentRules(None), None)
    assert training_data(restored, contents[0], data).history is None
    assert training_data(restored, contents[1], data, may_differ=True).history is None
    with pytest.raises(MisfitError, match="only blends in the usual order of samples continue each corpus"):
        training_data(restored, contents[1], data)


def test_a_change_before_the_first_step_after_another_takes_its_place(folder: Path) -> None:
    run = Run(folder)
    run.train("1 A 1 B", num_batches=2, dp=1)
    run.train("1 A 2 B", num_batches=0, dp=1)
    run.train("1 A 3 B", num_batches=0, dp=1)
    assert run.stored.segments == (BlendSegment(0, (1, 1)), BlendSegment(16, (1, 3)))


def corpus(prefix: str, digest: str | None, share: str = "by size") -> CorpusContent:
    return CorpusContent(prefix, share, digest)


def test_a_corpus_is_known_by_content_and_of_equal_ones_by_prefix() -> None:
    known = [KnownCorpus("a", "1"), KnownCorpus("copy", "1"), KnownCorpus("b", "2")]
    assert numbers_of(known, [corpus("copy", "1"), corpus("moved", "1"), corpus("b", "2")]) == (1, 0, 2)
    assert numbers_of(known, [corpus("b", "new"), corpus("c", "1")]) == (3, 0), (
        "other content under a known name is new"
    )
    assert numbers_of([KnownCorpus("a", None)], [corpus("x", "1"), corpus("a", "2")]) == (1, 0)


def test_a_checkpoint_without_segments_has_one_of_its_shares() -> None:
    saved = [corpus("a", "1", "7/10"), corpus("b", "2", "3/10")]
    assert implied_history(saved, [corpus("b", "2")], [50]).segments == (BlendSegment(0, (7, 3)),)
    assert implied_history([corpus("a", "1", "all")], [corpus("b", "2")], [50]).segments == (BlendSegment(0, (1,)),)
    by_size = [corpus("a", "1"), corpus("b", "2")]
    assert implied_history(by_size, [corpus("b", "2"), corpus("a", "1")], [30, 90]).segments == (
        BlendSegment(0, (3, 1)),
    )
    with pytest.raises(MisfitError, match="a, whose size decided its share, is not among the corpora of this run"):
        implied_history(by_size, [corpus("b", "2")], [30])


@pytest.mark.parametrize(
    "damage",
    [
        {"segments": []},
        {"segments": [{"first_sample": 0, "weights": [1, 2]}]},
        {"corpora": [{"prefix": "a"}]},
        {"corpora": 3},
    ],
)
def test_a_damaged_history_is_refused(damage: dict[str, object]) -> None:
    whole = BlendHistory((KnownCorpus("a", "1"),), (BlendSegment(0, (1,)),)).to_json()
    assert BlendHistory.from_json(whole).to_json() == whole
    with pytest.raises(ValueError, match="the blend of the training data is damaged"):
        BlendHistory.from_json(whole | damage)
