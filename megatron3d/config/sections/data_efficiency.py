"""Which samples a run may see when: easy ones first, by metrics that tools/analyze_data.py computed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.fields import option, options


@dataclass(frozen=True)
class CurriculumConfig:
    """The curriculum over samples. Options of several words have one word for each metric, or one for all.

    `data/curriculum` has what they mean; `config/curriculum.py` reads the words.
    """

    curriculum_metric: tuple[str, ...] = options(
        "--curriculum-metric", "Metrics that bound the samples, by their names in --curriculum-index; all must hold."
    )
    curriculum_index: tuple[str, ...] = options(
        "--curriculum-index", "Directories of tools/analyze_data.py, one for each corpus of --data-path in its order."
    )
    curriculum_deepspeed_index: tuple[str, ...] = options(
        "--curriculum-deepspeed-index",
        "Instead: prefixes of DeepSpeed's index_to_sample and index_to_metric files, two for each metric.",
    )
    curriculum_difficulty_type: tuple[str, ...] = options(
        "--curriculum-difficulty-type", "Whether bounds are values of the metric or percentiles: value, percentile."
    )
    curriculum_min_difficulty: tuple[str, ...] = options(
        "--curriculum-min-difficulty", "Bound at the beginning; default percentile 1."
    )
    curriculum_max_difficulty: tuple[str, ...] = options(
        "--curriculum-max-difficulty", "Bound at the end; default percentile 100."
    )
    curriculum_pacing: tuple[str, ...] = options(
        "--curriculum-pacing", "How bounds rise: fixed_linear, fixed_root, fixed_discrete, or FILE.py:FUNCTION."
    )
    curriculum_steps: tuple[str, ...] = options(
        "--curriculum-steps", "Steps until the bound is at its end; default those of the warm-up."
    )
    curriculum_difficulty_step: tuple[str, ...] = options(
        "--curriculum-difficulty-step", "Bounds are rounded down to multiples of it; default 1."
    )
    curriculum_root_degree: tuple[str, ...] = options(
        "--curriculum-root-degree", "Degree of fixed_root, 1 is linear; default 2."
    )
    curriculum_difficulties: tuple[str, ...] = options(
        "--curriculum-difficulties", "Bounds of fixed_discrete with commas between them, such as 10,50,100."
    )
    curriculum_last_steps: tuple[str, ...] = options(
        "--curriculum-last-steps", "Last step of each bound of fixed_discrete but the last, such as 1000,2000."
    )
    curriculum_warmup_fraction: float | None = option(
        None, "--curriculum-warmup-fraction", "Share of the run after which samples come as without a curriculum."
    )
    curriculum_warmup_steps: int | None = option(
        None, "--curriculum-warmup-steps", "The same in steps; default --curriculum-warmup-fraction of the run's."
    )
    curriculum_seed: int | None = option(
        None, "--curriculum-seed", "Seed of the order of the admitted samples; default --seed."
    )
