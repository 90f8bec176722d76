"""Checkpoints: where they go, how often, and what to take from one."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.fields import option, switch


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go and come from."""

    save: str | None = option(None, "--save", "Directory of checkpoints to write.")
    load: str | None = option(
        None,
        "--load",
        "Directory of checkpoints to start from; default --save. Where both hold one, the later step is resumed.",
    )
    pretrained_checkpoint: str | None = option(
        None,
        "--pretrained-checkpoint",
        "Directory of checkpoints whose weights a new run starts from, where --load and --save hold none to resume.",
    )
    save_interval: int | None = option(
        None, "--save-interval", "Steps between checkpoints.", unit="iterations", also=("--persistent-save-interval",)
    )
    async_save: bool = switch(
        "--async-save",
        "Train on while a process of each rank writes the checkpoint of --save-interval from a copy in host memory; "
        "the last one is waited for.",
    )
    keep_last: int | None = option(
        None, "--keep-last", "Keep this many newest checkpoints; default all, or 1 with --save-retain-interval."
    )
    save_retain_interval: int | None = option(
        None,
        "--save-retain-interval",
        "Keep the checkpoints of the multiples of this for ever, and of the others the newest alone (--keep-last).",
        unit="iterations",
    )
    ckpt_step: int | None = option(None, "--ckpt-step", "Load this step instead of the latest.")
    finetune: bool = switch(
        "--finetune",
        "Take the weights of --load alone; start at step 0 with a new optimizer. A checkpoint in --save is resumed.",
    )
    no_load_optim: bool = switch(
        "--no-load-optim",
        "Do not load the optimizer state; that of checkpoints which this command has written to --save is loaded.",
        also=("--disable-load-optim",),
    )
    no_save_optim: bool = switch("--no-save-optim", "Do not save the optimizer state.", also=("--disable-save-optim",))
    override_opt_param_scheduler: bool = switch(
        "--override-opt-param-scheduler",
        "Take learning-rate and decay settings from the flags, not the checkpoint.",
        also=("--override-opt_param-scheduler", "--override-lr-scheduler"),
    )
    use_checkpoint_opt_param_scheduler: bool = switch(
        "--use-checkpoint-opt_param-scheduler",
        "Take learning-rate and decay settings from the checkpoint, ignoring the flags.",
        also=("--use-checkpoint-opt-param-scheduler", "--use-checkpoint-lr-scheduler"),
    )
    fall_back_to_previous_checkpoint: bool = switch(
        "--fall-back-to-previous-checkpoint",
        "If the latest checkpoint is damaged or gone, start from the newest whole one before it.",
    )
    exit_on_missing_checkpoint: bool = switch(
        "--exit-on-missing-checkpoint", "End with an error instead of starting anew where no checkpoint is found."
    )
    override_sample_order: bool = switch(
        "--override-sample-order",
        "Resume with another seed, split, sequence length, masking, tokenizer or other corpora than the checkpoint's: "
        "samples are counted on in the new order, those of each corpus for itself.",
    )
    override_tokenizer: bool = switch(
        "--override-tokenizer",
        "Start from weights that were trained with other content of the tokenizer's files; resume with them, too.",
    )
    use_checkpoint_args: bool = switch(
        "--use-checkpoint-args",
        "Take the model's options, its dropout and its tokenizer from the checkpoint; they override the flags.",
    )

    @property
    def saves_asynchronously(self) -> bool:
        """Whether there are saves that training need not wait for: all but the last one with `async_save`."""
        return self.async_save and self.save is not None and self.save_interval is not None
