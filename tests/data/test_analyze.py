"""tools/analyze_data.py: each metric against another computation, and parts that survive a kill."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron3d.data.curriculum import analyze as analyze_module
from megatron3d.data.curriculum.index import MetricIndex, read_index
from megatron3d.data.curriculum.readability import mtld, reading_ease, syllables, words_of
from megatron3d.errors import ConfigError, DataError
from tests.data.corpora import write_documents
from tools.analyze_data import parser, run

TEXTS = [
    "The cat sat on the mat. The cat sat on the mat. The cat sat on the mat. The cat sat on the mat.",
    "Photosynthesis converts luminous energy into chemical energy, notwithstanding considerable inefficiency.",
    "We went to the market. It was a fine day! Did we buy bread? Yes, and some old cheese as well.",
    "",
    "Zebras quickly vex jumping foxes while dwarves glibly toss big quartz bricks under heavy oak planks.",
] * 3
S = 32
EOD = 256  # of the ByteTokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("analyze") / "corpus"
    write_documents(prefix, [[*text.encode(), EOD] if text else [] for text in TEXTS])
    return prefix


def analyzed(corpus: Path, output: Path, metrics: str, *more: str) -> dict[str, MetricIndex]:
    words = f"--data-path {corpus} --seq-length {S} --split 1,0,0 --metrics {metrics} --tokenizer-type ByteTokenizer"
    run(parser().parse_args([*words.split(), "--output", str(output), *more]))
    return {name: read_index(output / name.rpartition(":")[2]) for name in metrics.split(",")}


def row_of(corpus: Path) -> np.ndarray:
    return np.fromfile(f"{corpus}.bin", dtype="<u2").astype(np.int64)


def by_number(index: MetricIndex) -> np.ndarray:
    found = np.empty(index.num_samples, dtype=np.float32)
    found[index.order] = index.value
    return found


def test_metrics_equal_other_computations_of_the_same_tokens(corpus: Path, tmp_path: Path) -> None:
    (own := tmp_path / "own.py").write_text("def first(sample):\n    return float(sample.tokens[0])\n")
    names = f"length,rarity,compression,mtld,flesch,{own}:first"
    found = {name: by_number(index) for name, index in analyzed(corpus, tmp_path / "out", names).items()}
    tokens = row_of(corpus)
    chunks = [tokens[first : first + S] for first in range(0, len(tokens) - S, S)]
    texts = [bytes(chunk[chunk != EOD].tolist()).decode() for chunk in chunks]
    counts, total = Counter(tokens.tolist()), len(tokens)
    ends = np.flatnonzero(tokens == EOD)
    for number, (chunk, text) in enumerate(zip(chunks, texts, strict=True)):
        documents = Counter(int(np.searchsorted(ends, number * S + place)) for place in range(S))
        wanted = {
            "length": sum(size * size for size in documents.values()) / S,
            "rarity": -sum(math.log(counts[token] / total) for token in chunk.tolist()),
            "compression": len(zlib.compress(text.encode(), 6)) / len(text.encode()),
            "mtld": mtld(words_of(text)),
            "flesch": 100 - reading_ease(text),
            f"{own}:first": chunk[0],
        }
        for name, value in wanted.items():
            assert found[name][number] == pytest.approx(value, rel=1e-6), (name, number)


def test_an_index_is_sorted_and_the_same_for_any_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    alone, together = (
        analyzed(corpus, tmp_path / workers, "rarity,mtld", "--workers", workers) for workers in ("1", "3")
    )
    for name, index in alone.items():
        assert (np.diff(index.value) >= 0).all() and sorted(index.order) == list(range(index.num_samples))
        assert index.order.tobytes() == together[name].order.tobytes()
        assert index.value.tobytes() == together[name].value.tobytes()
    files = {path.name for path in (tmp_path / "3").rglob("*") if path.is_file()}
    assert files == {"order.u32", "value.f32", "index.json"}


def test_a_run_that_was_ended_goes_on_with_what_is_missing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        analyze_module, "_parts", lambda count: [range(i, min(i + 4, count)) for i in range(0, count, 4)]
    )
    whole = analyzed(corpus, tmp_path / "whole", "rarity,flesch")
    real, measured_parts = analyze_module.measure_part, []

    def dying(request: analyze_module.AnalyzeRequest, folder: Path, part: range) -> range:
        if len(measured_parts) == 3:
            raise KeyboardInterrupt
        measured_parts.append(part)
        return real(request, folder, part)

    monkeypatch.setattr(analyze_module, "measure_part", dying)
    with pytest.raises(KeyboardInterrupt):
        analyzed(corpus, tmp_path / "again", "rarity,flesch")
    assert not (tmp_path / "again" / "rarity").exists()
    with pytest.raises(ConfigError, match="holds parts of another analysis"):
        analyzed(corpus, tmp_path / "again", "rarity")
    rest: list[range] = []
    monkeypatch.setattr(analyze_module, "measure_part", lambda *args: rest.append(args[2]) or real(*args))
    again = analyzed(corpus, tmp_path / "again", "rarity,flesch")
    assert not set(rest) & set(measured_parts) and len(measured_parts) == 3
    for name, index in whole.items():
        assert index.order.tobytes() == again[name].order.tobytes()
        assert index.value.tobytes() == again[name].value.tobytes()


def test_losses_go_on_under_the_same_checkpoint_alone_and_damage_is_named(corpus: Path, tmp_path: Path) -> None:
    request = analyze_module.AnalyzeRequest(str(corpus), S, "1,0,0", ("loss", "rarity"), None, 300, checkpoint="a")

    def losses(rows: np.ndarray) -> np.ndarray:
        return rows[:, :-1].mean(1)

    def analyze(request: analyze_module.AnalyzeRequest, losses: analyze_module.Losses) -> None:
        analyze_module.analyze(
            request, tmp_path, workers=1, tokenizer_digest=None, losses=losses, report=lambda done, parts: None
        )

    def ended(rows: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(request, ended)
    with pytest.raises(ConfigError, match=r"another analysis.*the checkpoint of that one"):
        analyze(dataclasses.replace(request, checkpoint="b"), losses)
    (part,) = (tmp_path / ".parts").glob("part_*.npy")
    part.unlink()
    analyze_module._log_probabilities_of.cache_clear()
    for name in ("counts.npy", "loss_000000000000.npy"):  # the losses are read last, when the counts are whole again
        (damaged := part.with_name(name)).write_bytes(b"x")
        with pytest.raises(DataError, match=f"{damaged.name} is damaged"):
            analyze(request, losses)
        damaged.unlink()
    analyze(request, losses)
    values = by_number(read_index(tmp_path / "loss"))
    np.testing.assert_allclose(values, row_of(corpus)[: len(values) * S].reshape(-1, S).mean(1), rtol=1e-6)


def test_syllables_and_reading_ease_follow_the_rules_of_english() -> None:
    """Counts of a dictionary; the sentence and its 115.1 are of the literature on the score."""
    counts = {"cat": 1, "table": 2, "make": 1, "makes": 1, "boxes": 2, "walked": 1, "wanted": 2, "energy": 3, "see": 1}
    assert {word: syllables(word) for word in counts} == counts
    assert reading_ease("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6)
    assert reading_ease("This is fine. So it is") == pytest.approx(206.835 - 1.015 * 3 - 84.6)


def test_mtld_of_a_text_by_hand() -> None:
    """a b a ends a factor at 2/3, and a is a rest of 0. Backwards a a ends one at 1/2, and b a is a rest of 0."""
    assert mtld(["a", "b", "a", "a"]) == pytest.approx((4 / 1 + 4 / 1) / 2)
    assert mtld(["a", "b", "c", "d"]) == 4.0 and mtld([]) == 0.0
    assert mtld(["a", "b", "c", "d", "a"]) == pytest.approx(5 / ((1 - 4 / 5) / 0.28))


BAD: dict[str, tuple[str, ...]] = {
    "--metrics longness is not known; use some of length, rarity": ("longness",),
    "--metrics loss needs a model; give --load CHECKPOINT": ("loss",),
    "must name at least one metric, and each once": ("mtld,mtld",),
    "--workers 0 is outside its range; it must be at least 1": ("length", "--workers", "0"),
    "--split 'x' is not one to three numbers": ("length", "--split", "x"),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_options_are_named(corpus: Path, tmp_path: Path, sentence: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        analyzed(corpus, tmp_path, *BAD[sentence])
    assert sentence in str(caught.value)


def test_a_metric_of_the_users_own_that_fails_is_named_with_its_sample(corpus: Path, tmp_path: Path) -> None:
    (own := tmp_path / "own.py").write_text(
        "def odd(sample):\n    return 1 / (sample.number - 2)\n\n\ndef lost(sample):\n    return float('nan')\n"
    )
    with pytest.raises(DataError, match="odd failed at sample 2: division by zero"):
        analyzed(corpus, tmp_path / "out", f"{own}:odd")
    with pytest.raises(DataError, match="lost gave nan for sample 0; it must be a finite number"):
        analyzed(corpus, tmp_path / "other", f"{own}:lost")


def test_the_description_names_what_the_samples_are_of(corpus: Path, tmp_path: Path) -> None:
    analyzed(corpus, tmp_path, "length")
    described = json.loads((tmp_path / "length" / "index.json").read_text())
    samples = described["samples"]
    assert described["metric"] == "length" and described["metric_version"] == 1
    assert samples["documents"] == [0, len(TEXTS)] and samples["seq_length"] == S and samples["kind"] == "tokens"
    assert len(samples["dataset"]) == len(samples["tokenizer"]) == 64
