"""The papers' updates over whole parameters in fp64, one parameter after another: what every layout must come to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron3d.config.sections.optim import OptimConfig
from megatron3d.params.spec import ParamSpec

QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


class Whole:
    """Whole parameters and their states under one optimizer."""

    def __init__(self, config: OptimConfig, specs: Mapping[str, ParamSpec], weights: Mapping[str, Tensor]) -> None:
        self.config, self.specs, self.count = config, dict(specs), 0
        self.weights = {name: weight.double().clone() for name, weight in weights.items()}
        self.states: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
        self.adafactor: dict[str, torch.optim.Adafactor] = {}

    def step(self, grads: Mapping[str, Tensor], *, lr: float, weight_decay: float) -> None:
        """One update; parameters that do not decay get none."""
        self.count += 1
        for name, spec in self.specs.items():
            decay = weight_decay if spec.decays else 0.0
            rule = self.config.optimizer
            if rule == "muon" and not spec.is_hidden_matrix:
                rule = self.config.muon_scalar_optimizer
            getattr(self, f"_{rule}")(name, grads[name].double(), lr, decay)

    def _state(self, name: str, kind: str) -> Tensor:
        return self.states[name].setdefault(kind, torch.zeros_like(self.weights[name]))

    def _adam_direction(self, name: str, grad: Tensor) -> Tensor:
        config, m, v = self.config, self._state(name, "exp_avg"), self._state(name, "exp_avg_sq")
        m.copy_(config.adam_beta1 * m + (1 - config.adam_beta1) * grad)
        v.copy_(config.adam_beta2 * v + (1 - config.adam_beta2) * grad**2)
        m_hat = m / (1 - config.adam_beta1**self.count)
        v_hat = v / (1 - config.adam_beta2**self.count)
        return m_hat / (v_hat.sqrt() + config.adam_eps)

    def _adam(self, name: str, grad: Tensor, lr: float, decay: float) -> None:
        weight = self.weights[name]
        if not self.config.decoupled_weight_decay:
            weight -= lr * self._adam_direction(name, grad + decay * weight)
        else:
            weight -= lr * (self._adam_direction(name, grad) + decay * weight)

    def _lamb(self, name: str, grad: Tensor, lr: float, decay: float) -> None:
        weight = self.weights[name]
        direction = self._adam_direction(name, grad) + decay * weight
        ratio = weight.norm() / direction.norm() if self.specs[name].decays else 1.0
        weight -= lr * ratio * direction

    def _lion(self, name: str, grad: Tensor, lr: float, decay: float) -> None:
        config, m, weight = self.config, self._state(name, "exp_avg"), self.weights[name]
        sign = torch.sign(config.lion_beta1 * m + (1 - config.lion_beta1) * grad)
        weight -= lr * (sign + decay * weight)
        m.copy_(config.lion_beta2 * m + (1 - config.lion_beta2) * grad)

    def _muon(self, name: str, grad: Tensor, lr: float, decay: float) -> None:
        config, m, weight = self.config, self._state(name, "momentum_buffer"), self.weights[name]
        m.copy_(config.muon_momentum * m + (1 - config.muon_momentum) * grad)
        update = config.muon_momentum * m + (1 - config.muon_momentum) * grad if config.muon_nesterov else m
        parts = self.specs[name].parts if config.muon_split_qkv else ()
        matrices = update.split(parts or (update.shape[0],))
        orthogonal = torch.cat([self._orthogonal(matrix) * max(matrix.shape) ** 0.5 for matrix in matrices])
        weight -= lr * (decay * weight + config.muon_extra_scale_factor * orthogonal)

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        """By singular values: what the polynomial makes of each, without a product of matrices."""
        u, s, vh = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
        for a, b, c in QUINTIC:
            s = a * s + b * s**3 + c * s**5
        return u * s @ vh

    def _adafactor(self, name: str, grad: Tensor, lr: float, decay: float) -> None:
        # torch's own, in fp32: its epsilon depends on the dtype.
        if name not in self.adafactor:
            parameter = nn.Parameter(self.weights[name].float())
            self.adafactor[name] = torch.optim.Adafactor([parameter])
        optimizer = self.adafactor[name]
        (group,) = optimizer.param_groups
        group.update(lr=lr, weight_decay=decay)
        (parameter,) = group["params"]
        parameter.grad = grad.float()
        optimizer.step()
        self.weights[name] = parameter.detach().double()
        state = optimizer.state[parameter]
        self.states[name] = {kind: value.double() for kind, value in state.items() if value.dim() > 0}
        for kind in ("row_var", "col_var"):
            if kind in self.states[name]:
                self.states[name][kind] = self.states[name][kind].flatten()
