"""What must hold among the options of the curriculum; that the indexes are of this data, `data/curriculum` checks."""

from __future__ import annotations

from collections.abc import Iterator

from megatron3d.config.curriculum import MetricBound, plan_of
from megatron3d.config.options import BY_NAME, OPTIONS
from megatron3d.config.pacing import build_pacing
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.data_efficiency import CurriculumConfig
from megatron3d.errors import ConfigError


def curriculum_rule(given: CurriculumConfig, curriculum: CurriculumConfig, data: DataConfig) -> Iterator[str]:
    """Every metric has an index and a pacing that can be computed, and there is data that they are of."""
    if not curriculum.curriculum_metric:
        yield from _without_metric(given)
        return
    yield from _warmup_problems(given)
    yield from _index_problems(curriculum)
    yield from _source_problems(data)
    plan = plan_of(curriculum)
    yield from plan.problems
    if not plan.problems:
        for bound in plan.bounds:
            yield from _bound_problems(bound)


def _without_metric(curriculum: CurriculumConfig) -> Iterator[str]:
    given = [
        one.spelling for one in OPTIONS if one.section == "curriculum" and vars(curriculum)[one.name] != one.default
    ]
    if given:
        yield f"{', '.join(given)} bound nothing without a metric; give --curriculum-metric, or leave them out."


def _warmup_problems(given: CurriculumConfig) -> Iterator[str]:
    share, steps = given.curriculum_warmup_fraction, given.curriculum_warmup_steps
    if share is not None and steps is not None:
        yield (
            f"--curriculum-warmup-fraction {share:g} and --curriculum-warmup-steps {steps} both set the end of the "
            "warm-up; give only one of them."
        )


def _index_problems(curriculum: CurriculumConfig) -> Iterator[str]:
    ours, theirs = curriculum.curriculum_index, curriculum.curriculum_deepspeed_index
    metrics = curriculum.curriculum_metric
    if bool(ours) == bool(theirs):
        what = "are both given" if ours else "are both missing"
        yield (
            f"--curriculum-index and --curriculum-deepspeed-index {what}, but --curriculum-metric {' '.join(metrics)} "
            "is looked up in one of them; give one: tools/analyze_data.py writes the first."
        )
    if theirs and len(theirs) != 2 * len(metrics):
        yield (
            f"--curriculum-deepspeed-index {' '.join(theirs)} has {len(theirs)} words for {len(metrics)} metrics; give "
            "two for each: the prefixes of its index_to_sample and index_to_metric files."
        )
    if len(set(metrics)) < len(metrics):
        yield f"--curriculum-metric {' '.join(metrics)} names a metric twice; name each once."


def _source_problems(data: DataConfig) -> Iterator[str]:
    if data.mock_data:
        yield "--curriculum-metric and --mock-data are both given, but mock data has no index; give --data-path."


def _bound_problems(bound: MetricBound) -> Iterator[str]:
    try:
        build_pacing(bound.pacing)
    except ConfigError as error:
        yield from (f"{line[:-1]} (metric {bound.metric})." for line in str(error).splitlines())
        return
    options = bound.pacing
    ends = options.difficulties if options.kind == "fixed_discrete" else (options.minimum, options.maximum)
    wrong = [end for end in ends if end is not None and not 0 < end <= 100]
    if wrong and bound.difficulty_type == "percentile":
        flags = " and ".join(BY_NAME[f"curriculum_{name}_difficulty"].spelling for name in ("min", "max"))
        yield (
            f"{flags}, or --curriculum-difficulties, give {wrong[0]:g} for {bound.metric}, which is no percentile; "
            "use numbers above 0 and up to 100, or --curriculum-difficulty-type value."
        )
