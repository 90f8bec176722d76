"""Whether a run can work, reported before any process group or device exists: all problems at once, each with its fix.

`check` collects sentences, `checked` raises them or returns the run with every derived value filled in, and
`with_vocab_size` adds what is known only once the tokenizer is open. `resolve` is for runs that give --vocab-size.
"""

from __future__ import annotations

from dataclasses import replace

from megatron3d.config.derive import complete, derive, what_was_given
from megatron3d.config.rules.bounds import single_option_problems, with_defaults_where_wrong, wrong_options
from megatron3d.config.rules.context import context_problems
from megatron3d.config.rules.doubt import NO_DOUBT, Doubt
from megatron3d.config.rules.model import model_and_layout_problems
from megatron3d.config.rules.offload import offload_problems
from megatron3d.config.rules.run import required_problems, run_problems
from megatron3d.config.run import DraftRun, GivenRun, RunConfig
from megatron3d.config.sections.model import GivenModel
from megatron3d.config.sections.train import GivenTrain
from megatron3d.errors import ConfigError


def check(config: GivenRun, world_size: int, *, doubt: Doubt = NO_DOUBT) -> list[str]:
    """A sentence for each problem of this run on `world_size` ranks; an empty list if it can work.

    Values that are outside their own range are reported and then taken as not given, so that one mistake does not
    hide another. Sentences that only follow from such a value, or from what is in `doubt`, are left out.
    """
    doubt = doubt.with_unread(wrong_options(config))
    given = with_defaults_where_wrong(config)
    run = derive(given, world_size)
    problems = [
        *required_problems(config),
        *model_and_layout_problems(given, run),
        *context_problems(run.model, run.parallel, run.train),
        *offload_problems(run.parallel, run.optim, run.train),
        *run_problems(given, run),
    ]
    return [*single_option_problems(config), *(problem for problem in problems if not doubt.explains(problem))]


def model_problems(model: GivenModel) -> list[str]:
    """A sentence for each reason why no model can have this shape, in whichever run; an empty list if one can."""
    wanted = GivenRun(model=model, train=GivenTrain(micro_batch_size=1))
    given = with_defaults_where_wrong(wanted)
    run = derive(given, 1)
    return [*single_option_problems(wanted), *model_and_layout_problems(given, run)]


def resolve(config: GivenRun, world_size: int) -> RunConfig:
    """The run with all derived values (FFN width, layout, batch, decay length ...); resolving twice is once.

    Raises: ConfigError with all problems, one a line; or if the size of the vocabulary is known to the tokenizer alone.
    """
    return complete(checked(config, world_size))


def checked(config: GivenRun, world_size: int) -> DraftRun:
    """The run with all derived values but, where only the tokenizer knows it, the size of the vocabulary.

    Raises: ConfigError with all problems, one a line.
    """
    problems = check(config, world_size)
    if problems:
        raise ConfigError("\n".join(problems))
    return derive(config, world_size)


def with_vocab_size(config: DraftRun, vocab_size: int) -> RunConfig:
    """The resolved run, once the tokenizer says it has `vocab_size` ids; settling twice is once.

    A larger `--vocab-size` is kept (rows for tokens to come). NullTokenizer is made from `--vocab-size` and has one id
    more, for the end of a document: unless `--eod-token` names one of the former, the run gets that id.

    Raises: ConfigError if `--vocab-size` is smaller than the tokenizer's vocabulary, or --eod-token is not in it.
    """
    flag, eod = config.model.vocab_size, config.data.eod_token
    if config.data.tokenizer_type == "NullTokenizer":
        settled = flag if flag is not None and eod is not None and eod < flag else vocab_size
        eod = settled - 1 if eod is None else eod
    elif flag is not None and flag < vocab_size:
        raise ConfigError(
            f"--vocab-size {flag} is smaller than the {vocab_size} ids of the tokenizer "
            f"({config.data.tokenizer_type}), whose tokens would have no embedding; use --vocab-size {vocab_size}."
        )
    else:
        settled = max(flag or 0, vocab_size)
    if eod is not None and eod >= settled:
        raise ConfigError(
            f"--eod-token {eod} is not in the vocabulary of {settled} ids; use an id from 0 to {settled - 1}."
        )
    draft = replace(config, model=replace(config.model, vocab_size=settled), data=replace(config.data, eod_token=eod))
    return complete(replace(draft, as_given=what_was_given(config, draft)))
