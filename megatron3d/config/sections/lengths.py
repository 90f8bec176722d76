"""How long the samples of each step are, where they begin short."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.fields import option
from megatron3d.config.pacing import PACINGS, PacingOptions

LENGTH_PREFIX = "--seq-length-curriculum"


@dataclass(frozen=True)
class LengthConfig:
    """The curriculum over the length of the samples, which `config/lengths.py` turns into levels."""

    seq_length_curriculum: str | None = option(
        None,
        LENGTH_PREFIX,
        "Begin with short samples: the first tokens of each, or each split into several.",
        choices=("truncate", "reshape"),
    )
    seq_length_curriculum_pacing: str = option(
        "fixed_linear",
        f"{LENGTH_PREFIX}-pacing",
        "How the length rises with the steps.",
        choices=PACINGS,
        takes_code=True,
    )
    seq_length_curriculum_min_difficulty: int | None = option(
        None, f"{LENGTH_PREFIX}-min-difficulty", "Length at the beginning.", unit="tokens"
    )
    seq_length_curriculum_max_difficulty: int | None = option(
        None, f"{LENGTH_PREFIX}-max-difficulty", "Length at the end; default --seq-length.", unit="tokens"
    )
    seq_length_curriculum_steps: int | None = option(
        None, f"{LENGTH_PREFIX}-steps", "Steps until the length is at its end.", unit="iterations"
    )
    seq_length_curriculum_difficulty_step: int = option(
        8, f"{LENGTH_PREFIX}-difficulty-step", "Lengths are rounded down to multiples of it.", unit="tokens"
    )
    seq_length_curriculum_root_degree: int = option(
        2, f"{LENGTH_PREFIX}-root-degree", "Degree of fixed_root; 1 is linear."
    )
    seq_length_curriculum_difficulties: str = option(
        "", f"{LENGTH_PREFIX}-difficulties", "Lengths of fixed_discrete, such as 64,128,256."
    )
    seq_length_curriculum_last_steps: str = option(
        "", f"{LENGTH_PREFIX}-last-steps", "Last step of each length of fixed_discrete but the last, such as 1000,2000."
    )

    def pacing_options(self, seq_length: int) -> PacingOptions:
        """The options in the words of `config/pacing.py`. Raises: ValueError if a list is not one of whole numbers."""
        return PacingOptions(
            kind=self.seq_length_curriculum_pacing,
            minimum=self.seq_length_curriculum_min_difficulty,
            maximum=self.seq_length_curriculum_max_difficulty or seq_length,
            total_steps=self.seq_length_curriculum_steps,
            difficulty_step=self.seq_length_curriculum_difficulty_step,
            root_degree=self.seq_length_curriculum_root_degree,
            difficulties=_numbers(self.seq_length_curriculum_difficulties),
            last_steps=_numbers(self.seq_length_curriculum_last_steps),
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(",") if word.strip())
