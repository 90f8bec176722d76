"""Megatron-core's GPTModel from its local (pure torch) layer spec, on a CPU.

As shipped, megatron-core cannot train without a GPU: it asks `torch.cuda` for the current device and for the states of
random number generators, with no option for another device. `use_cpu_as_the_device` answers those calls for a CPU. Its
figures say what its layers cost, not what a user of the released package gets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import megatron.core.tensor_parallel.random as megatron_random
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from tools.bench.peers.trainee import Trainee, tokens_and_labels
from tools.bench.peers.work import LEARNING_RATE, WEIGHT_DECAY, Work


class MasterAdamW:
    """fp32 copies of a bf16 model's parameters and AdamW on them, as megatron-core's own optimizer keeps them."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._masters = [nn.Parameter(p.detach().float().clone()) for p in self._parameters]
        self._adamw = torch.optim.AdamW(self._masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

    def step(self) -> None:
        """One update from the gradients of the parameters, which are cleared."""
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            assert parameter.grad is not None, "every parameter of this model has a gradient"
            master.grad, parameter.grad = parameter.grad.float(), None
        self._adamw.step()
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in self._parameters], [m.data for m in self._masters])


def use_cpu_as_the_device() -> None:
    """Answer megatron-core's questions to `torch.cuda` for a CPU, in this process."""
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    megatron_random._get_cuda_rng_state = lambda **_: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, **_: torch.set_rng_state(state)
    for name in ("empty", "full", "ones", "tensor", "zeros"):
        setattr(torch, name, _made_on_cpu(getattr(torch, name)))
    # Its optimizer sorts parameters by the names of CUDA's tensor types.
    type_of = torch.Tensor.type
    torch.Tensor.type = lambda self, *to: type_of(self, *to) if to else type_of(self).replace("torch.", "torch.cuda.")
    torch.Tensor.cuda = lambda self, *_, **__: self


def _made_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The factory, with the CPU in the place of a CUDA device."""

    @functools.wraps(factory)
    def made(*args: object, **options: object) -> torch.Tensor:
        if "cuda" in str(options.get("device")):
            options["device"] = "cpu"
        return factory(*args, **options)

    return made


def config_of(work: Work) -> TransformerConfig:
    """The shape, with the fusions off that are CUDA kernels."""
    dtype = torch.bfloat16 if work.dtype == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=work.num_layers,
        hidden_size=work.hidden_size,
        num_attention_heads=work.num_attention_heads,
        ffn_hidden_size=4 * work.hidden_size,
        tensor_model_parallel_size=work.tensor_ranks,
        pipeline_model_parallel_size=work.pipeline_ranks,
        batch_p2p_comm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bf16=work.dtype == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
    )


def gpt_model(work: Work, config: TransformerConfig) -> GPTModel:
    """GPT-2, or this rank's stage of it: learned positions, tied table."""
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=work.vocab_size,
        max_sequence_length=work.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute",
    )


def build(work: Work) -> Trainee:
    """The model in one process, which is a group of one."""
    use_cpu_as_the_device()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    megatron_random.model_parallel_cuda_manual_seed(1)
    model = gpt_model(work, config_of(work))
    if work.dtype == "bf16":
        model = model.bfloat16()
    optimizer = MasterAdamW(model)
    tokens_BS, labels_BS = tokens_and_labels(work)
    hidden_11SS = torch.ones(1, 1, work.seq_length, work.seq_length, dtype=torch.bool).triu(1)
    positions_BS = torch.arange(work.seq_length).expand(work.num_sequences, -1)

    def step() -> float:
        loss = model(tokens_BS, positions_BS, hidden_11SS, labels=labels_BS).float().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Trainee(step, sum(p.numel() for p in model.parameters()))
