"""From the options to the curriculum of a run: indexes opened and compared, plateaus in samples, and what to expect.

All that is wrong is found here, before the first step: an index of other samples, a bound that admits fewer samples
than a step takes, streams whose samples are not fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from megatron3d.config.batch_size import batch_size_at, samples_for_iterations
from megatron3d.config.curriculum import CurriculumPlan, plan_of, total_steps
from megatron3d.config.pacing import build_pacing, plateaus
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.data_efficiency import CurriculumConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.data.bert import BertSamples
from megatron3d.data.blend import Blend
from megatron3d.data.build import BertData, GPTData
from megatron3d.data.content import corpus_digest, tokenizer_content
from megatron3d.data.curriculum.deepspeed_index import read_deepspeed_index
from megatron3d.data.curriculum.index import MetricIndex, SampleIdentity, read_index
from megatron3d.data.curriculum.metrics import directory_name
from megatron3d.data.curriculum.repeats import expected_distinct
from megatron3d.data.curriculum.stream import AdmittedSets, Curriculum, Plateau
from megatron3d.data.gpt import GPTSamples
from megatron3d.data.order import derive_seed
from megatron3d.data.stream import SampleStream
from megatron3d.errors import ConfigError, DataError

_Data = TypeVar("_Data", bound=GPTData | BertData)
_Samples = GPTSamples | BertSamples


@dataclass(frozen=True)
class RunLength:
    """What steps and samples have to do with each other in a run: its batches, and the ranks that share them."""

    train: TrainConfig
    data_parallel_size: int

    def first_slot(self, step: int) -> int:
        """The number of the first sample of `step`, counted from 1."""
        return samples_for_iterations(self.train, step - 1, self.data_parallel_size)

    def batch_size(self, slot: int) -> int:
        """The samples of the step that begins with sample `slot`."""
        return batch_size_at(self.train, slot, self.data_parallel_size)

    @property
    def num_slots(self) -> int | None:
        """The samples of the whole run, where its length is known."""
        steps = total_steps(self.train, self.data_parallel_size)
        return None if steps is None else self.first_slot(steps + 1)


def with_curriculum(
    data: _Data, options: CurriculumConfig, sources: DataConfig, length: RunLength, *, vocab_size: int
) -> _Data:
    """The streams of a run, with the curriculum that the options ask for in place of the training samples.

    Args:
        data: the streams without a curriculum.
        options: of the curriculum; without a metric `data` comes back as it is.
        sources: of the corpora and the tokenizer.
        length: steps and batches of the run.
        vocab_size: of the tokenizer.

    Raises:
        DataError: an index is missing, damaged, or of other samples than those of this run.
        ConfigError: there is not one index for each corpus, or a bound admits less than a step takes.
    """
    if not options.curriculum_metric:
        return data
    assert data.train is not None, "a run has training data"
    corpora = _corpora(data.train)
    plan = plan_of(options)
    content = tokenizer_content(sources, vocab_size=vocab_size)
    tokenizer = None if content is None else content.digest
    types = [bound.difficulty_type for bound in plan.bounds]
    if options.curriculum_deepspeed_index:
        opened = [_deepspeed_indexes(options, corpora, types)]
    else:
        opened = list(_indexes(options, corpora, tokenizer))
    admitted = [AdmittedSets(indexes, types) for indexes in opened]
    seed = sources.seed if options.curriculum_seed is None else options.curriculum_seed
    warmup = None if plan.warmup_steps is None else length.first_slot(plan.warmup_steps + 1)
    curriculum = Curriculum(
        data.train,
        corpora,
        admitted,
        plateaus=_plateaus(plan, length, warmup),
        warmup_slots=warmup,
        seed=derive_seed(seed, "curriculum"),
    )
    _require_full_batches(curriculum, plan, length)
    notes = (*data.notes, *_notes(curriculum, plan, length))
    # The plateaus choose among the samples of a blend that stays as it is, so there are no corpora to continue.
    return replace(data, train=curriculum, notes=notes, corpora=None)


def _corpora(train: SampleStream) -> list[_Samples]:
    """The streams of the corpora. Raises: ConfigError for samples that are not fixed."""
    streams = [one for one in train.streams if one is not None] if isinstance(train, Blend) else [train]
    corpora = [stream for stream in streams if isinstance(stream, GPTSamples | BertSamples)]
    if len(corpora) < len(streams):
        other = next(stream for stream in streams if stream not in corpora)
        raise ConfigError(
            f"--curriculum-metric orders the samples of token files itself, but {other.describe()} has an order or "
            "samples of its own; leave one of the two out."
        )
    return corpora


def identity_of(stream: _Samples, tokenizer: str | None) -> SampleIdentity:
    """What an index of the fixed samples of a stream is of. Raises: DataError if the corpus cannot be read."""
    found = SampleIdentity(
        corpus_digest(stream.dataset.prefix),
        (stream.documents.start, stream.documents.stop),
        stream.seq_length,
        stream.num_fixed,
        tokenizer=tokenizer,
    )
    if isinstance(stream, GPTSamples):
        return found
    form = stream.form
    return replace(
        found,
        kind="sentences",
        sample_seed=stream.seed,
        short_seq_prob=form.short_seq_prob,
        sentence_task=form.sentence_task,
    )


def _indexes(
    options: CurriculumConfig, corpora: Sequence[_Samples], tokenizer: str | None
) -> Iterator[list[MetricIndex]]:
    """For each corpus the index of each metric, compared with its samples."""
    metrics, directories = options.curriculum_metric, options.curriculum_index
    if len(directories) != len(corpora):
        prefixes = ", ".join(corpus.dataset.prefix for corpus in corpora)
        raise ConfigError(
            f"--curriculum-index {' '.join(directories)} names {len(directories)} directories for {len(corpora)} "
            f"corpora ({prefixes}); give one for each, in the order of --data-path."
        )
    problems: list[str] = []
    for corpus, directory in zip(corpora, directories):
        identity, indexes = identity_of(corpus, tokenizer), []
        for metric in metrics:
            index = read_index(Path(directory) / directory_name(metric))
            assert index.identity is not None, "an index of tools/analyze_data.py says what it is of"
            differing = list(index.identity.differences(identity))
            if differing:
                problems.append(
                    f"The index {directory} of {metric} is of other samples than those of {corpus.dataset.prefix}: "
                    f"{'; '.join(differing)}. Use such options, or run tools/analyze_data.py again."
                )
            indexes.append(index)
        if problems:
            continue
        yield indexes
    if problems:
        raise DataError("\n".join(problems))


def _deepspeed_indexes(
    options: CurriculumConfig, corpora: Sequence[_Samples], types: Sequence[str]
) -> list[MetricIndex]:
    """DeepSpeed's files of each metric, compared with the samples as far as they can be."""
    if len(corpora) > 1:
        raise ConfigError(
            f"--curriculum-deepspeed-index has the samples of one corpus, but --data-path names {len(corpora)}; give "
            "one, or make an index of each by tools/analyze_data.py for --curriculum-index."
        )
    words, indexes = options.curriculum_deepspeed_index, []
    for place, (metric, kind) in enumerate(zip(options.curriculum_metric, types, strict=True)):
        to_sample, to_metric = words[2 * place : 2 * place + 2]
        index = read_deepspeed_index(metric, to_sample, to_metric, needs_values=kind == "value")
        if index.num_samples != corpora[0].num_fixed:
            raise DataError(
                f"The index {to_sample} of {metric} has {index.num_samples} samples, but {corpora[0].describe()}: it "
                "is of another corpus, --split or --seq-length."
            )
        indexes.append(index)
    return indexes


def _plateaus(plan: CurriculumPlan, length: RunLength, warmup: int | None) -> list[Plateau]:
    """Where a bound of some metric changes, in samples of the run; those behind a warm-up are left out.

    Raises: ConfigError if a function of the user's own fails or gives no percentile where one is expected.
    """
    by_metric = [plateaus(build_pacing(bound.pacing)) for bound in plan.bounds]
    for metric, ranges in zip(plan.bounds, by_metric, strict=True):
        step, largest = max(ranges, key=lambda pair: pair[1])
        if metric.difficulty_type == "percentile" and largest > 100:
            raise ConfigError(
                f"--curriculum-pacing {metric.pacing.kind} gives {largest:g} at step {step} for {metric.metric}, which "
                "is no percentile; give numbers up to 100, or --curriculum-difficulty-type value."
            )
    steps = sorted({first for found in by_metric for first, _ in found})
    found = []
    for step in steps:
        slot = length.first_slot(step)
        if warmup is None or slot < warmup:
            bounds = tuple([bound for first, bound in one if first <= step][-1] for one in by_metric)
            found.append(Plateau(slot, step, bounds))
    return found


def _require_full_batches(curriculum: Curriculum, plan: CurriculumPlan, length: RunLength) -> None:
    """Raises: ConfigError for the first plateau that admits less of a corpus than a step takes from it."""
    weights = curriculum.plain.weights if isinstance(curriculum.plain, Blend) else (1,)
    for number, sets in enumerate(curriculum.admitted):
        known: dict[tuple[int, ...], int] = {}
        for plateau in curriculum.plateaus:
            needed = -(-length.batch_size(plateau.first_slot) * weights[number] // sum(weights))
            reaches = sets.reaches(plateau.bounds)
            # A wider set holds at least what a narrower one held.
            least = max((n for narrow, n in known.items() if all(a <= b for a, b in zip(narrow, reaches))), default=0)
            if least >= needed:
                continue
            known[reaches] = len(sets.samples(reaches))
            if known[reaches] < needed:
                raise ConfigError(_too_few(curriculum, plan, plateau, (number, known[reaches], needed)))


def _too_few(curriculum: Curriculum, plan: CurriculumPlan, plateau: Plateau, counts: tuple[int, int, int]) -> str:
    number, admitted, needed = counts
    sets, corpus = curriculum.admitted[number], curriculum.corpora[number]
    bounds = ", ".join(
        f"{bound.metric} up to {'percentile ' if bound.difficulty_type == 'percentile' else ''}{value:g}"
        + (f" (of {index.value[0]:g} to {index.value[-1]:g})" if bound.difficulty_type == "value" else "")
        for bound, value, index in zip(plan.bounds, plateau.bounds, sets.indexes, strict=True)
    )
    return (
        f"The curriculum admits {admitted} of the {corpus.num_fixed} samples of {corpus.describe()} at step "
        f"{plateau.first_step} ({bounds}), but a step takes {needed} of them; raise --curriculum-min-difficulty, or "
        "lower --global-batch-size."
    )


def _notes(curriculum: Curriculum, plan: CurriculumPlan, length: RunLength) -> Iterator[str]:
    """What the run should print: how long the curriculum lasts, and how often samples are expected to repeat."""
    names = ", ".join(bound.metric for bound in plan.bounds)
    last = curriculum.plateaus[-1]
    yield (
        f"Curriculum by {names}: {len(curriculum.plateaus)} bounds from step 1 to step {last.first_step} (sample "
        f"{last.first_slot:,}), where the last one begins."
    )
    if curriculum.warmup_slots is not None:
        yield (
            f"Curriculum: a warm-up up to sample {curriculum.warmup_slots:,}; from step {plan.warmup_steps or 0:,} + 1 "
            "on, samples come as without a curriculum."
        )
    num_slots = length.num_slots
    if num_slots is not None:
        distinct = expected_distinct(curriculum, num_slots)
        if distinct is not None:
            samples = sum(corpus.num_fixed for corpus in curriculum.corpora)
            without = max(0, num_slots - samples)
            yield (
                f"Curriculum: of {num_slots:,} samples of the run about {max(0, num_slots - round(distinct)):,} are "
                f"expected to repeat an earlier one (without a curriculum {without:,}); the corpora have {samples:,}."
            )
