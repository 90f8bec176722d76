"""A benchmark's work as this project's command line has it; free of torch, for those who only start the command."""

from __future__ import annotations

from tools.bench.peers.work import LEARNING_RATE, Work


def flags_of(work: Work, *, mock_data: bool = True) -> list[str]:
    """The options of pretrain_gpt.py."""
    flags = (
        f"--num-layers {work.num_layers} --hidden-size {work.hidden_size} --seq-length {work.seq_length} "
        f"--num-attention-heads {work.num_attention_heads} --vocab-size {work.vocab_size} "
        f"--micro-batch-size {work.micro_batch_size} --global-batch-size {work.num_sequences} --train-iters 1 "
        f"--lr {LEARNING_RATE} --clip-grad 0 --hidden-dropout 0 --attention-dropout 0 --activation gelu --device cpu "
        f"--zero-stage {work.zero_stage} --tensor-model-parallel-size {work.tensor_ranks} "
        f"--pipeline-model-parallel-size {work.pipeline_ranks}"
    )
    chosen = {"--mock-data": mock_data, "--sequence-parallel": work.layout == "tp_sp", "--bf16": work.dtype == "bf16"}
    return flags.split() + [flag for flag, wanted in chosen.items() if wanted] + work.options.split()
