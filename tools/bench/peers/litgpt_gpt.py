"""litgpt's GPT in GPT-NeoX's form, the nearest that it has to GPT-2: rotary positions, an output table of its own."""

from __future__ import annotations

from litgpt.config import Config
from litgpt.model import GPT

from tools.bench.peers.trainee import Trainee, module_trainee
from tools.bench.peers.work import Work


def build(work: Work) -> Trainee:
    """The model in one process."""
    config = Config(
        name="benchmark",
        block_size=work.seq_length,
        vocab_size=work.vocab_size,
        padded_vocab_size=work.vocab_size,
        n_layer=work.num_layers,
        n_head=work.num_attention_heads,
        n_embd=work.hidden_size,
        intermediate_size=4 * work.hidden_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=True,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
    )
    model = GPT(config)
    return module_trainee(model, model, work)
