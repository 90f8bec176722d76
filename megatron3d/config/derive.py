"""The values that follow from others: what an option that was not given is once the rest of the run is known.

Nothing here judges: where values do not fit together the result is of no use, and `check.py` says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, TypeVar

from megatron3d.config.activations import GATED_ACTIVATIONS
from megatron3d.config.batch_size import iterations_for_samples, parse_step_schedule, samples_for_iterations
from megatron3d.config.curriculum import warmup_steps_of
from megatron3d.config.lengths import LengthLevel, counts_at_end, counts_in_tokens, length_levels
from megatron3d.config.options import GIVEN
from megatron3d.config.run import DraftRun, GivenRun, RunConfig
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.data_efficiency import CurriculumConfig
from megatron3d.config.sections.lengths import LengthConfig
from megatron3d.config.sections.model import GivenModel, ModelConfig
from megatron3d.config.sections.optim import GivenOptim, OptimConfig
from megatron3d.config.sections.parallel import GivenParallel, ParallelConfig
from megatron3d.config.sections.train import DraftTrain, GivenTrain, TrainConfig
from megatron3d.errors import ConfigError

_Section = TypeVar("_Section", ModelConfig, OptimConfig, TrainConfig)

# Names that Megatron-DeepSpeed has for kinds of ours.
TOKENIZER_ALIASES = {"PretrainedFromHF": "HuggingFaceTokenizer", "HFTokenizer": "HuggingFaceTokenizer"}


def derive(given: GivenRun, world_size: int) -> DraftRun:
    """The run on `world_size` ranks with all derivable values filled in; what cannot be derived stays None."""
    parallel = _derive_pipeline(_derive_parallel(given.parallel, world_size), given.model.num_layers)
    parallel = replace(parallel, context_cut=_context_cut(given.parallel, given.model, given.data))
    train = _derive_train(
        _with_lengths(given.train, given.lengths, given.model.seq_length),
        given.model.seq_length,
        parallel.data_parallel_size,
    )
    draft = DraftRun(
        model=derive_model(given.model),
        parallel=parallel,
        train=train,
        optim=_derive_optim(given.optim, train, given.model.seq_length, parallel.data_parallel_size),
        data=_derive_data(given.data),
        curriculum=_derive_curriculum(given.curriculum, train, parallel.data_parallel_size),
        lengths=given.lengths,
        checkpoint=given.checkpoint,
    )
    return replace(draft, as_given=what_was_given(given, draft))


def what_was_given(before: GivenRun, after: DraftRun) -> Mapping[tuple[str, str], Any]:
    """`DraftRun.as_given` of a run whose values were derived from those of the one before, which may be a draft too."""
    earlier = before.as_given if isinstance(before, DraftRun) else {}
    changed = {
        (section, one.name): was
        for section, kind in GIVEN.items()
        for one in fields(kind)
        if (was := vars(vars(before)[section])[one.name]) != vars(vars(after)[section])[one.name]
    }
    return {**changed, **earlier}


def complete(draft: DraftRun) -> RunConfig:
    """The run of a draft that lacks nothing.

    Raises: ConfigError naming the options whose values are missing.
    """
    return RunConfig(
        model=_narrowed(draft.model, ModelConfig),
        parallel=draft.parallel,
        optim=_narrowed(draft.optim, OptimConfig),
        data=draft.data,
        curriculum=draft.curriculum,
        lengths=draft.lengths,
        train=_narrowed(draft.train, TrainConfig),
        checkpoint=draft.checkpoint,
        as_given=draft.as_given,
    )


def resolve_model(model: GivenModel) -> ModelConfig:
    """The model with activation, head size, groups, FFN width and positions filled in; resolving twice is once.

    Raises: ConfigError naming the sizes that are missing.
    """
    return _narrowed(derive_model(model), ModelConfig)


def _narrowed(section: Any, kind: type[_Section]) -> _Section:
    """The section as its resolved type, in which fewer fields may be None.

    Raises: ConfigError naming the options that are None and must not be.
    """
    values = vars(section)
    missing = [one.name for one in fields(kind) if values[one.name] is None and not str(one.type).endswith("| None")]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigError(f"{flags} {'has' if len(missing) == 1 else 'have'} no value; give {flags}.")
    return kind(**values)


def derive_model(model: GivenModel) -> GivenModel:
    """The model with what follows from the values that are given; what does not stays None."""
    activation = model.activation or _activation_by_switch(model)
    hidden, heads = model.hidden_size, model.num_attention_heads
    groups = model.num_query_groups or (1 if model.group_query_attention else heads)
    counts = [int(word) for word in model.num_experts_by_layer if word.isdecimal()]
    return replace(
        _with_rotary_scaling(model),
        activation=activation,
        num_query_groups=groups,
        kv_channels=model.kv_channels or (hidden // heads if hidden and heads else None),
        ffn_hidden_size=model.ffn_hidden_size or (_ffn_hidden_size(hidden, activation) if hidden else None),
        max_position_embeddings=model.max_position_embeddings or model.seq_length,
        num_token_types=_num_token_types(model),
        num_experts=model.num_experts or max(counts, default=None),
    )


def _with_rotary_scaling(model: GivenModel) -> GivenModel:
    """The model with the scaling that Megatron-LM's options mean, its factor and original length.

    Source: `rope_scaling_factor` and `_apply_scaling` of Megatron-LM's `RotaryEmbedding` for the defaults of llama3.
    """
    scaling, positions, interpolation = (
        model.rotary_scaling,
        model.position_embedding_type,
        model.rotary_seq_len_interpolation_factor,
    )
    factor, original = model.rotary_scaling_factor, model.rotary_original_max_position_embeddings
    if positions == "yarn":
        positions, scaling = "rope", "yarn" if scaling == "none" else scaling
    elif scaling in ("none", "linear") and interpolation is not None and interpolation != 1:
        scaling, factor = "linear", factor or interpolation
    longest = model.max_position_embeddings or model.seq_length
    if scaling == "llama3":
        factor, original = factor or 8.0, original or 8192
    elif scaling != "none" and factor is None and original and longest:
        factor = max(1.0, longest / original)
    return replace(
        model,
        position_embedding_type=positions,
        rotary_scaling=scaling,
        rotary_scaling_factor=factor,
        rotary_original_max_position_embeddings=original,
    )


def _activation_by_switch(model: GivenModel) -> str:
    if model.swiglu:
        return "swiglu"
    if model.squared_relu:
        return "squared_relu"
    return "gelu_tanh" if model.openai_gelu else model.traits.activation


def _num_token_types(model: GivenModel) -> int:
    """Two segments where there are two sentences, as in Megatron-LM; a GPT has none."""
    if model.num_token_types is not None:
        return model.num_token_types
    return 2 if model.has_binary_head else 0


def _ffn_hidden_size(hidden_size: int, activation: str) -> int:
    """4H; with a gate 8H/3 rounded down to a multiple of 64, which keeps the number of weights of a plain MLP.

    Source: Shazeer 2020 (arXiv:2002.05202), section 2; the multiple is Megatron-LM's.
    """
    return 8 * hidden_size // 192 * 64 if activation in GATED_ACTIVATIONS else 4 * hidden_size


def model_parallel_size(parallel: GivenParallel) -> int:
    """Ranks that hold one copy of the model together."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def _derive_parallel(parallel: GivenParallel, world_size: int) -> ParallelConfig:
    stage = 1 if parallel.use_distributed_optimizer and parallel.zero_stage == 0 else parallel.zero_stage
    return ParallelConfig(
        **{
            **vars(parallel),
            "world_size": world_size,
            "data_parallel_size": max(1, world_size // model_parallel_size(parallel)),
            "sequence_parallel": parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
            "zero_stage": stage,
        }
    )


def _context_cut(parallel: GivenParallel, model: GivenModel, data: DataConfig) -> str:
    """How samples are cut: so that ranks have the same area of attention, of a causal model; else as they are."""
    if parallel.cp_cut is not None:
        return parallel.cp_cut
    if parallel.context_parallel_size == 1 or not model.is_causal:
        return "contiguous"
    return "balanced" if data.reset_attention_mask else "zigzag"


def _derive_pipeline(parallel: ParallelConfig, num_layers: int | None) -> ParallelConfig:
    """The number of stages per rank where a number gives it (a written layout is read by `train.plan`), and the order
    of work that goes with it."""
    virtual, ranks = parallel.num_virtual_stages_per_pipeline_rank, parallel.pipeline_model_parallel_size
    layers_each = parallel.num_layers_per_virtual_pipeline_stage
    if virtual is None and layers_each and num_layers:
        virtual = num_layers // (ranks * layers_each)
    order = parallel.pipeline_schedule
    if order is None and parallel.pipeline_model_parallel_layout is None:
        order = "interleaved" if (virtual or 1) > 1 else "1f1b"
    return replace(parallel, virtual_stages=virtual, pipeline_schedule=order)


def _with_lengths(train: GivenTrain, lengths: LengthConfig, seq_length: int | None) -> DraftTrain:
    """What was given of the training, and the levels of a sequence-length curriculum."""
    levels: tuple[LengthLevel, ...] = ()
    if seq_length:
        # The rules of lengths report what is wrong with them together with all other problems.
        with suppress(ConfigError):
            levels = length_levels(lengths, seq_length)
    if any(length < 1 for _, length in levels):
        levels = ()
    splits = bool(levels) and lengths.seq_length_curriculum == "reshape"
    return DraftTrain(**{**vars(train), "length_levels": levels, "splits_samples": splits})


def _derive_train(given: DraftTrain, seq_length: int | None, data_parallel_size: int) -> DraftTrain:
    train = _derive_recomputation(given)
    steps = _step_levels(train.step_batch_size_schedule, seq_length)
    batch = steps[-1][1] if steps else train.global_batch_size
    if batch is None and train.micro_batch_size:
        batch = train.micro_batch_size * data_parallel_size * (train.gradient_accumulation_steps or 1)
    draft = replace(train, global_batch_size=batch, batch_size_steps=steps)
    return replace(draft, train_samples=_train_samples(draft, seq_length, data_parallel_size))


def _train_samples(train: DraftTrain, seq_length: int | None, data_parallel_size: int) -> int | None:
    """The length in samples: of --train-samples and --train-tokens what is reached first.

    The step that reaches the tokens is made whole, so they end with a batch.
    Source: Megatron-DeepSpeed `megatron/training.py`, `train`: "while ... consumed_train_tokens < args.train_tokens".
    """
    if train.train_tokens is None or not seq_length or not train.global_batch_size or not _can_count(train):
        return train.train_samples
    if train.length_levels:
        return counts_at_end(
            train, data_parallel_size, seq_length, samples=train.train_samples, tokens=train.train_tokens
        ).samples
    needed = -(-train.train_tokens // seq_length)
    steps = iterations_for_samples(train, needed, data_parallel_size)
    reached = samples_for_iterations(train, steps, data_parallel_size)
    if reached < needed:
        reached = samples_for_iterations(train, steps + 1, data_parallel_size)
    return reached if train.train_samples is None else min(reached, train.train_samples)


def _run_tokens(train: DraftTrain, seq_length: int | None, data_parallel_size: int) -> int | None:
    """The tokens of the run, where its length is in tokens or samples."""
    if train.train_tokens is not None or train.train_samples is None:
        return train.train_tokens
    if not seq_length or not train.global_batch_size or not _can_count(train):
        return None
    return counts_at_end(train, data_parallel_size, seq_length, samples=train.train_samples).tokens or None


def _can_count(train: GivenTrain) -> bool:
    """Whether a ramp is three numbers, as `check.py` wants it."""
    ramp = train.rampup_batch_size
    return not ramp or (len(ramp) == 3 and all(word.isdecimal() and int(word) > 0 for word in ramp))


def _step_levels(schedule: str | None, seq_length: int | None) -> tuple[tuple[int, int], ...]:
    if schedule is None or not seq_length:
        return ()
    try:
        return parse_step_schedule(schedule, seq_length)
    except ConfigError:
        # check.py reports the malformed text together with all other problems.
        return ()


def _derive_recomputation(train: DraftTrain) -> DraftTrain:
    granularity, method, layers = train.recompute_granularity, train.recompute_method, train.recompute_num_layers
    if granularity is None and train.recompute_activations:
        granularity = "selective"
    elif granularity is None and method is not None:
        granularity = "full"
    if granularity == "full":
        method = method or "uniform"
        layers = layers if layers is not None or method == "block" else 1
    return replace(train, recompute_granularity=granularity, recompute_method=method, recompute_num_layers=layers)


def _derive_optim(optim: GivenOptim, train: DraftTrain, seq_length: int | None, data_parallel_size: int) -> GivenOptim:
    """Decay and warm-up in the unit of the run; tokens become samples, rounded to the nearest, where all samples have
    as many."""
    if counts_in_tokens(train, optim):
        return replace(
            optim, lr_decay_tokens=optim.lr_decay_tokens or _run_tokens(train, seq_length, data_parallel_size)
        )
    decay, warmup = optim.lr_decay_samples, optim.lr_warmup_samples
    if seq_length and optim.lr_decay_tokens is not None:
        decay = decay or max(1, round(optim.lr_decay_tokens / seq_length))
    if seq_length and optim.lr_warmup_tokens is not None:
        warmup = warmup or round(optim.lr_warmup_tokens / seq_length)
    return replace(
        optim,
        lr_decay_iters=optim.lr_decay_iters or train.train_iters,
        lr_decay_samples=decay or train.train_samples,
        lr_warmup_samples=warmup,
    )


def _derive_curriculum(curriculum: CurriculumConfig, train: DraftTrain, data_parallel_size: int) -> CurriculumConfig:
    """The steps of a warm-up that is a share of the run."""
    steps = curriculum.curriculum_warmup_steps
    if steps is None and _can_count(train):
        steps = warmup_steps_of(curriculum, train, data_parallel_size)
    return replace(curriculum, curriculum_warmup_steps=steps)


def _derive_data(data: DataConfig) -> DataConfig:
    """The tokenizer that its files imply, and the split without the quotes that a shell array may leave around it."""
    kind = TOKENIZER_ALIASES.get(data.tokenizer_type or "", data.tokenizer_type)
    if kind is None and data.vocab_file:
        kind = "GPT2BPETokenizer" if data.merge_file else "BertWordPieceLowerCase"
    return replace(data, tokenizer_type=kind, split=data.split.strip("'\" "))
