"""How evenly the routers of a step sent tokens to experts, by layer: what a step reports of its experts.

expert_load/layer_3        tokens of the fullest expert over the mean; 1 is even, and E is one expert for all
router_entropy/layer_3     entropy of a token's scores, the mean over tokens, in nats; log E is undecided
dropped_share/layer_3      choices that experts had no room for, of all, where they have a capacity
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron3d.config.sections.model import ModelConfig
from megatron3d.models.counts import num_active_parameters
from megatron3d.moe.layer import MixtureOfExperts
from megatron3d.moe.router import DROPPED, ENTROPY, LOAD
from megatron3d.train.progress import format_count
from megatron3d.train.setup import TrainingSetup


def expert_shares(parts: TrainingSetup) -> torch.Tensor:
    """This rank's share of the loads of a step whose totals have been reduced, fp64 [3 * layers], on the device; shares
    add up over all ranks. Empty for a dense model."""
    model = parts.config.model
    num_layers = model.num_layers if model.num_expert_layers else 0
    found = torch.zeros(3, num_layers, dtype=torch.float64, device=parts.model.device)
    if parts.mesh.grad.rank == parts.mesh.tp.rank == 0:  # ranks that hold the same layers have the same totals
        for stage in parts.model.stages.values():
            for module in stage.modules():
                if isinstance(module, MixtureOfExperts):
                    found[:, module.layer] = _load_of(module)
    return found.flatten()


def expert_loads(model: ModelConfig, sums: Sequence[float]) -> dict[str, float]:
    """The sums of the shares of all ranks, by name; nothing of a dense model."""
    layers = [layer for layer in range(model.num_layers) if model.experts_of(layer)]
    if not layers:
        return {}
    names, num_layers = ("expert_load", "router_entropy", "dropped_share"), model.num_layers
    values = {name: sums[number * num_layers :][:num_layers] for number, name in enumerate(names)}
    if model.moe_expert_capacity_factor is None:
        del values["dropped_share"]
    return {f"{name}/layer_{layer}": of_layers[layer] for name, of_layers in values.items() for layer in layers}


def expert_notes(model: ModelConfig) -> Iterator[str]:
    """What a run's start reports about its experts; nothing of a dense model."""
    layers = model.num_expert_layers
    if not layers:
        return
    counts = " ".join(model.num_experts_by_layer) or model.num_experts
    yield (
        f"{counts} experts in {layers} of {model.num_layers} layers, of which a token passes "
        f"{model.moe_router_topk}: {format_count(num_active_parameters(model))} parameters are active"
    )
    if "aux_loss" in dict(model.balance_losses):
        yield (
            "--moe-router-load-balancing-type aux_loss is a loss of each micro-batch, so losses differ between layouts "
            "that cut the batch in other ways; seq_aux_loss does not depend on that"
        )
    if model.moe_router_force_load_balancing:
        yield (
            "--moe-router-force-load-balancing sends tokens to every expert in turn, whatever the router says: what "
            "this run measures is speed, of an even load"
        )


def _load_of(module: MixtureOfExperts) -> torch.Tensor:
    """Load, entropy and dropped share of one layer, fp64 [3]."""
    load_E, entropy, dropped = (module.router.get_buffer(name) for name in (LOAD, ENTROPY, DROPPED))
    total = load_E.sum().clamp_min(1)
    tokens = total / module.config.moe_router_topk
    return torch.stack([load_E.max() * len(load_E) / total, entropy[0] / tokens, dropped[0] / total])
