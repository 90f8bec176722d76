"""Which attention a run computes with: settled before the first step, and printed in one line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron3d_kernels import attention_backends as backends
from megatron3d_kernels.attention_backends import AttentionCase, AttentionChoice
from megatron3d_kernels.causal_blocks import LONGEST
from megatron3d_kernels.launch import KernelError

from megatron3d.comm.device import compute_capability
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.errors import ConfigError


@dataclass(frozen=True)
class AttentionUse:
    """What a model's attention is asked for, by all layers of a run.

    Attributes:
        model: whose attention it is.
        train: its options.
        dtype: of the layers.
        device: of this rank.
        within_documents: whether samples are packed documents.
        is_cut: whether ranks share a sample.
    """

    model: ModelConfig
    train: TrainConfig
    dtype: torch.dtype
    device: torch.device
    within_documents: bool = False
    is_cut: bool = False

    @property
    def choice(self) -> AttentionChoice:
        """For the kernels."""
        return attention_choice(self.train, self.device)

    @property
    def case(self) -> AttentionCase:
        """What decides on the kernel: a model that is not causal has a mask of padding."""
        drops, masked = self.model.attention_dropout > 0, not self.model.is_causal
        return AttentionCase(self.device.type, self.dtype, self.choice.capability, masked, drops)

    def settle(self) -> None:
        """Check the choice; with `--attention-backend flash` let the newest FlashAttention run that is there.

        Raises:
            ConfigError: the backend that is asked for takes no such inputs.
        """
        try:
            backends.kernels_for(self.case, self.choice.backend)
        except KernelError as error:
            raise ConfigError(f"--attention-backend {self.train.attention_backend}: {error}") from error
        newest = self._newest_flash
        if newest is not None:
            backends.activate_flash(newest)

    @property
    def _newest_flash(self) -> str | None:
        if self.device.type != "cuda" or self.choice.backend != backends.FLASH or self.case.drops:
            return None
        return backends.newest_flash(self.choice.capability)

    def lines(self) -> list[str]:
        """What runs and why; and where recomputing it saves nothing."""
        said = [f"attention: {self._kernel()} ({backends.reason_for(self.case, self.choice.backend)})"]
        is_fused = self.device.type == "cuda" and backends.MATH not in self._kernels
        if self.train.recompute_granularity == "selective" and is_fused:
            said.append(
                "--recompute-granularity selective recomputes nothing: this attention keeps no scores, so that there "
                "is nothing to save"
            )
        return said

    @property
    def _kernels(self) -> tuple[str, ...]:
        return backends.kernels_for(self.case, self.choice.backend)

    def _kernel(self) -> str:
        on_cpu, is_auto = self.device.type == "cpu", self.choice.backend == backends.AUTO
        if on_cpu and self.case.drops:
            return "two products and a softmax in fp32, with dropout by place"
        if self.is_cut:
            return "torch's kernels on the parts of each sample that a rank holds"
        if self.within_documents:
            takes_one_call = not on_cpu and self.dtype in (torch.float16, torch.bfloat16)
            return "one call for all documents" if takes_one_call else "one call for each document"
        longest = LONGEST.get(self.dtype, 0)
        if on_cpu and is_auto and self.model.is_causal and self.model.seq_length <= longest:
            return "torch's FlashAttention, its backward over blocks of keys"
        if on_cpu and is_auto:
            return backends.TITLES[backends.FLASH]
        titles = [backends.TITLES[name] for name in self._kernels]
        if self._newest_flash is not None:
            titles[0] += f" ({self._newest_flash})"
        return titles[0] + (f", where it takes the inputs, else {' or '.join(titles[1:])}" if len(titles) > 1 else "")


def attention_choice(train: TrainConfig, device: torch.device) -> AttentionChoice:
    """The backend that the options choose, on this device."""
    return AttentionChoice(train.attention_backend, compute_capability(device))
