"""Rows for experts: which row of which expert each choice of a token is, and the sum of what comes back.

A token that chooses K experts has K rows. Rows are sorted by expert, and those of one expert by token; a choice that is
not kept has none. Padded, every expert has equally many rows, of which the last are zeros that nothing comes back
from. Going there copies a token into its rows, and coming back adds them up, weighted,

    y_t = sum over its experts e, in ascending order, of  w_te  row_te          in fp32 at least,

so the sum of a token does not depend on which rows lie beside it. Both ways have a backward of their own, which is the
other way: no gradient is added by concurrent threads.

Source: Gale et al. 2022 (MegaBlocks, arXiv:2211.15841), section 5, for sorted rows instead of [S, E, C] masks.

Shapes: T tokens, K choices of each, R rows, H hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the rows of tokens lie, all of a rank's tokens and all experts.

    Attributes:
        choice_R: which choice each row is, as a number in [T, K] flattened, int64; some choice where it is padding.
        row_TK: the row of each choice, int64; what stands at choices that are not kept is some row.
        kept_TK: which choices are kept; None where all are.
        counts_E: rows of each expert, int64, those that are padding left out.
        filled_R: which rows are choices, and not padding; None where all are.
    """

    choice_R: Tensor
    row_TK: Tensor
    kept_TK: Tensor | None
    counts_E: Tensor
    filled_R: Tensor | None = None

    def first(self, num_rows: int) -> Rows:
        """Without choices that are not kept, which come last: there are `num_rows` others."""
        if num_rows == self.choice_R.shape[0]:
            return self
        row_TK = self.row_TK.clamp_max(max(0, num_rows - 1))
        return Rows(self.choice_R[:num_rows], row_TK, self.kept_TK, self.counts_E)


def sort_rows(expert_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> Rows:
    """The rows of tokens whose experts, int64 in ascending order, are these; `kept_TK` says which choices count, and
    the others come last until `Rows.first` takes them away."""
    key = expert_TK.flatten()
    if kept_TK is not None:
        key = key.masked_fill(~kept_TK.flatten(), num_experts)
    choice_R = key.argsort(stable=True)
    places = torch.arange(key.numel(), device=key.device)
    row = torch.empty_like(choice_R).scatter_(0, choice_R, places)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=key.device)
    counts_E = counts.scatter_add_(0, key, torch.ones_like(key))[:num_experts]
    return Rows(choice_R, row.view_as(expert_TK), kept_TK, counts_E)


def pad_rows(expert_TK: Tensor, num_experts: int, rows_each: int, kept_TK: Tensor | None = None) -> Rows:
    """The same with `rows_each` for every expert, which no more tokens choose; nothing depends on values of the
    device."""
    found = sort_rows(expert_TK, num_experts, kept_TK)
    start_E = found.counts_E.cumsum(0) - found.counts_E
    expert_N, num_rows = expert_TK.flatten(), num_experts * rows_each
    row_N = expert_N * rows_each + found.row_TK.flatten() - start_E[expert_N]
    is_kept_N = torch.ones_like(row_N, dtype=torch.bool) if kept_TK is None else kept_TK.flatten()
    row_N = row_N.masked_fill(~is_kept_N, num_rows)
    choice_R = row_N.new_full((num_rows + 1,), -1)  # the last takes those that are not kept
    choice_R = choice_R.scatter_(0, row_N, torch.arange(len(row_N), device=row_N.device))[:num_rows]
    row_TK = row_N.clamp_max(num_rows - 1).view_as(expert_TK)
    return Rows(choice_R.clamp_min(0), row_TK, kept_TK, found.counts_E, filled_R=choice_R >= 0)


def take_rows(x_TH: Tensor, rows: Rows) -> Tensor:
    """Each token in every row of it, [R, H]."""
    return _TakeRows.apply(x_TH, rows)


def add_rows(y_RH: Tensor, weight_TK: Tensor, rows: Rows, *, dtype: torch.dtype | None = None) -> Tensor:
    """The weighted sum of each token's rows, [T, H] in this dtype, by default that of `y_RH`; `weight_TK` is fp32 or
    wider."""
    return _AddRows.apply(y_RH, weight_TK, rows, dtype or y_RH.dtype)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(rows.row_TK, rows.kept_TK)
        taken_RH = x_TH.index_select(0, rows.choice_R // rows.row_TK.shape[1])
        return taken_RH if rows.filled_R is None else taken_RH.mul_(rows.filled_R.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None]:
        row_TK, kept_TK = ctx.saved_tensors
        return _weighted_sum(grad_RH, None, row_TK, kept_TK, grad_RH.dtype), None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, weight_TK: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(y_RH, weight_TK, rows.choice_R, rows.filled_R)
        return _weighted_sum(y_RH, weight_TK, rows.row_TK, rows.kept_TK, dtype)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RH, weight_TK, choice_R, filled_R = ctx.saved_tensors
        weight_R1 = weight_TK.flatten()[choice_R].unsqueeze(1)
        if filled_R is not None:
            weight_R1 = weight_R1 * filled_R.unsqueeze(1)
        spread_RH = grad_TH.index_select(0, choice_R // weight_TK.shape[1])
        # One product a row, put at the choice that the row is.
        wide = _sum_dtype(y_RH)
        products_R11 = torch.bmm(y_RH.to(wide).unsqueeze(1), spread_RH.to(wide).unsqueeze(2))
        products_R = products_R11.view(-1).to(weight_TK.dtype)
        grad_weight = torch.zeros(weight_TK.numel() + 1, dtype=weight_TK.dtype, device=grad_TH.device)
        at_R = choice_R if filled_R is None else choice_R.masked_fill(~filled_R, weight_TK.numel())
        grad_weight = grad_weight.scatter_(0, at_R, products_R)[:-1].view_as(weight_TK)
        return spread_RH.mul_(weight_R1).to(y_RH.dtype), grad_weight, None, None


def _weighted_sum(
    y_RH: Tensor, weight_TK: Tensor | None, row_TK: Tensor, kept_TK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The rows of each token, times their weights if there are any, added one after another."""
    wide = _sum_dtype(y_RH)
    if not y_RH.shape[0]:
        return y_RH.new_zeros(row_TK.shape[0], y_RH.shape[1], dtype=dtype)
    if kept_TK is not None:
        weight_TK = kept_TK.to(wide) if weight_TK is None else weight_TK * kept_TK
    if y_RH.device.type == "cpu" and y_RH.dtype == wide:
        weight_TK = None if weight_TK is None else weight_TK.to(wide)
        total_TH = F.embedding_bag(row_TK, y_RH, per_sample_weights=weight_TK, mode="sum")
        return total_TH.to(dtype)
    sum_TH: Tensor | None = None
    for number, row_T in enumerate(row_TK.unbind(1)):
        rows_TH = y_RH[row_T].to(wide)
        weight_T1 = None if weight_TK is None else weight_TK[:, number : number + 1].to(wide)
        if sum_TH is None:
            sum_TH = rows_TH if weight_T1 is None else rows_TH.mul_(weight_T1)
        elif weight_T1 is None:
            sum_TH.add_(rows_TH)
        else:
            sum_TH.addcmul_(rows_TH, weight_T1)
    assert sum_TH is not None, "a token has at least one expert"
    return sum_TH.to(dtype)


def _sum_dtype(y_RH: Tensor) -> torch.dtype:
    return torch.promote_types(y_RH.dtype, torch.float32)
