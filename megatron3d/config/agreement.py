"""Which options all ranks of a job must have alike, and in what form they are compared.

What may differ by machine is left out: paths (files are compared by content), the folder of the user's own code, and
what one rank does for itself.
Of directories that are optional, only whether they are given is compared.
"""

from __future__ import annotations

from megatron3d.config.options import BY_KEY, SECTIONS
from megatron3d.config.run import RunConfig
from megatron3d.files.user_code import without_folder

_BY_MACHINE = (
    "tensorboard_dir wandb_project wandb_exp_name wandb_save_dir metrics_file peak_tflops num_workers profile_dir"
)
_BY_PRESENCE = (
    "save load pretrained_checkpoint offload_dir profile_pipeline tokenizer_model vocab_file merge_file data_args_path"
)
_BY_COUNT = "data_path train_data_path valid_data_path test_data_path"


def agreed_options(config: RunConfig) -> dict[str, str]:
    """The resolved options that every rank must have alike, as text by option."""
    found = {}
    for section in SECTIONS:
        for name, value in vars(getattr(config, section)).items():
            if name in _BY_MACHINE.split():
                continue
            if name in _BY_PRESENCE.split():
                value = "not given" if value is None else "given"
            elif name in _BY_COUNT.split():
                value = f"{len(value)} words"
            elif name in ("architecture", "pipeline_schedule") and value is not None:
                value = without_folder(value)
            option = BY_KEY.get((section, name))
            found[name if option is None else option.spelling] = str(value)
    return found
