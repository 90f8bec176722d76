"""The length of each step's samples, and with it the tokens of a run: a sequence-length curriculum as plain levels.

A sample has S = `--seq-length` tokens. While a curriculum is on, step t trains on samples of d(t) of them:

    truncate   the first d tokens of each sample; the rest is not seen
    reshape    each sample becomes S // d rows of d tokens, in order; what is left over is not seen

d(t) is a function of the number of the step alone (`config/pacing.py`), so that every rank of every layout and every
resumed run knows it, and with it the shape of each message between pipeline stages, without asking anyone. `derive`
computes it once, as *levels*: from this step on samples have this length. Tokens are those that were seen.

Source: DeepSpeed's sequence-length curriculum (Li et al. 2022, arXiv:2108.06084). Megatron-DeepSpeed's reshape
(`pretrain_gpt.py`, `data_post_process`) cuts rows of d + 1 tokens, of which the last trains on nothing, and repeats
the end of a sample where d does not divide it; here neighbouring rows share the token between them, as samples do, and
none is repeated.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from megatron3d.config.batch_size import batch_size_at, batch_size_levels
from megatron3d.config.pacing import build_pacing, pacing_problems, plateaus
from megatron3d.config.sections.lengths import LENGTH_PREFIX, LengthConfig
from megatron3d.config.sections.optim import GivenOptim
from megatron3d.config.sections.train import DraftTrain
from megatron3d.errors import ConfigError

LengthLevel = tuple[int, int]


@dataclass(frozen=True)
class SampleShape:
    """What a step makes of a sample: so many rows of so many tokens."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of a sample that a step trains on."""
        return self.rows * self.length


@dataclass(frozen=True)
class ConsumedCounts:
    """What a run has consumed after some steps."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


def length_levels(lengths: LengthConfig, seq_length: int) -> tuple[LengthLevel, ...]:
    """(first step, length) of each level, where steps are counted from 0; empty without a curriculum.

    Lengths are as the options give them: whether a run can have them is for `config/rules/lengths.py`.

    Raises: ConfigError if the options describe no pacing, or the user's own function fails.
    """
    if lengths.seq_length_curriculum is None:
        return ()
    try:
        options = lengths.pacing_options(seq_length)
    except ValueError as error:
        raise ConfigError(
            f"{LENGTH_PREFIX}-difficulties or {LENGTH_PREFIX}-last-steps is no list of whole numbers ({error}); write "
            "them like 64,128,256 and 1000,2000."
        ) from error
    if problems := list(pacing_problems(options, LENGTH_PREFIX)):
        raise ConfigError("\n".join(problems))
    return tuple((first - 1, int(bound)) for first, bound in plateaus(build_pacing(options, LENGTH_PREFIX)))


def sample_shape(train: DraftTrain, step: int, seq_length: int) -> SampleShape:
    """What the step made after `step` steps trains on of each sample."""
    if not train.length_levels:
        return SampleShape(1, seq_length)
    _, length = train.length_levels[bisect_right(train.length_levels, step, key=lambda level: level[0]) - 1]
    return SampleShape(seq_length // length if train.splits_samples else 1, length)


def counts_in_tokens(train: DraftTrain, optim: GivenOptim) -> bool:
    """Whether the learning rate follows the tokens themselves: where all samples have as many, it follows those."""
    return bool(train.length_levels) and (optim.lr_decay_tokens, optim.lr_warmup_tokens) != (None, None)


def counts_at_end(
    train: DraftTrain,
    data_parallel_size: int,
    seq_length: int,
    *,
    start: ConsumedCounts = ConsumedCounts(),
    samples: int | None = None,
    tokens: int | None = None,
) -> ConsumedCounts:
    """The counts at the end of a run that has `start` behind it.

    It ends with the step that reaches `tokens`, which is made whole, or before the batch that would go beyond
    `samples`, whichever comes first; None is no limit, and one must be given.

    Source: Megatron-DeepSpeed `megatron/training.py`, `train`: "while ... consumed_train_tokens < args.train_tokens".
    """
    now = start
    while tokens is None or now.tokens < tokens:
        size = batch_size_at(train, now.samples, data_parallel_size)
        of_sample = sample_shape(train, now.step, seq_length).tokens
        steps = _steps_alike(train, data_parallel_size, now)
        if samples is not None:
            steps.append(max(0, samples - now.samples) // size)
        if tokens is not None:
            steps.append(-(-(tokens - now.tokens) // (size * of_sample)))
        made = min(steps)
        if not made:
            break
        now = ConsumedCounts(now.step + made, now.samples + made * size, now.tokens + made * size * of_sample)
    return now


def _steps_alike(train: DraftTrain, data_parallel_size: int, now: ConsumedCounts) -> list[int]:
    """How many steps from now on have the same batch size, and how many the same length; nothing where all have."""
    size = batch_size_at(train, now.samples, data_parallel_size)
    of_size = [first for first, _ in batch_size_levels(train, data_parallel_size) if first > now.samples]
    of_length = [first for first, _ in train.length_levels if first > now.step]
    return [-(-(first - now.samples) // size) for first in of_size[:1]] + [first - now.step for first in of_length[:1]]


def describe_lengths(train: DraftTrain, seq_length: int) -> str | None:
    """The curriculum in a sentence; None where there is none."""
    if not train.length_levels:
        return None
    (_, first), (last_step, last) = train.length_levels[0], train.length_levels[-1]
    what = "each sample is split into rows" if train.splits_samples else "of each sample the first tokens are used"
    return (
        f"sequence-length curriculum: {what}, {first} tokens at first and {last} of {seq_length} from step "
        f"{last_step + 1} on, in {len(train.length_levels)} levels"
    )
