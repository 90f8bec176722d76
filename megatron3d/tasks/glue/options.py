"""Which options of pretraining a fine-tuning takes, and what is said to the others."""

from __future__ import annotations

import argparse

from megatron3d.config.options import OPTIONS
from megatron3d.config.run import RunConfig
from megatron3d.errors import ConfigError

# Of these sections of the options of pretraining, what fine-tuning takes; others would be without effect.
_TAKEN = {
    "train": {
        *("micro_batch_size", "global_batch_size", "log_interval", "metrics_file", "peak_tflops"),
        *("recompute_granularity", "recompute_activations", "recompute_method", "recompute_num_layers"),
    },
    "data": {"tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "seed"},
    "checkpoint": {"save", "load", "ckpt_step"},
}
_INSTEAD = {
    "train_iters": "use --epochs",
    "train_samples": "use --epochs",
    "rampup_batch_size": "use --global-batch-size",
    "step_batch_size_schedule": "use --global-batch-size",
    "tensorboard_dir": "use --metrics-file",
    "wandb_project": "use --metrics-file",
    "data_path": "use --data-dir",
    "train_data_path": "use --data-dir, or --train-file with --task tsv",
    "mock_data": "use --data-dir",
    "seq_length": "use --max-seq-length",
    "finetune": "the weights alone are taken from --load anyway; leave the option out",
}


def check_options(args: argparse.Namespace, words: RunConfig) -> None:
    """Refuse options of the model's shape, those that other options stand for here, and those without effect.

    Args:
        args: the task's own options.
        words: the options of pretraining as they were given.

    Raises:
        ConfigError: with a sentence for each.
    """
    problems = _problems_of_numbers(args, words)
    for option in OPTIONS:
        value = option.value_in(words)
        if value == option.default or option.name == "architecture":
            continue
        given = f"{option.spelling} {value}"
        if option.name in _INSTEAD:
            problems.append(f"{given} is not for fine-tuning; {_INSTEAD[option.name]}.")
        elif option.section == "model":
            problems.append(f"{given}: the model comes with --load or --hf; leave the option out.")
        elif option.section in _TAKEN and option.name not in _TAKEN[option.section]:
            problems.append(f"{given} has no effect on fine-tuning; leave the option out.")
    if problems:
        raise ConfigError("\n".join(problems))


def _problems_of_numbers(args: argparse.Namespace, words: RunConfig) -> list[str]:
    problems = []
    if args.epochs < 0:
        problems.append(f"--epochs {args.epochs} is below 0; use 0 to measure only, or at least 1.")
    if args.epochs == 0 and words.checkpoint.save is not None:
        problems.append(
            f"--save {words.checkpoint.save} keeps what was learned, and --epochs 0 learns nothing; leave one out."
        )
    if args.pad_to_multiple_of is not None and args.pad_to_multiple_of < 1:
        problems.append(f"--pad-to-multiple-of {args.pad_to_multiple_of} is below 1; use 1 for no such padding.")
    return problems
