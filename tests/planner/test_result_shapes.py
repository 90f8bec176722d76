"""What operations return without memory, against the operations themselves on a CPU; and what a prediction imports."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from megatron3d.planner.elementwise_shapes import IN_PLACE, OUT
from megatron3d.planner.result_shapes import RESULTS, result_of

aten = torch.ops.aten
Layout = Callable[[torch.dtype], tuple[Tensor, Tensor]]

INTEGERS = {one for one in RESULTS if "bitwise" in str(one)}
TRUTHS = {aten.where.self}
BOUNDED = {aten.clamp.default, aten.clamp_.default}  # both bounds are optional, and one must be given
MASKED = {one for one in RESULTS if "masked_fill" in str(one)}
# What torch says of arguments that an operation does not take: dtypes and shapes that do not go together.
REFUSALS = re.compile(
    "expected dtype|tensor_view_from_dense expects|not implemented for|can't be cast|could not create a primitive"
    "|doesn't match the broadcast shape|more than one element of the written-to tensor"
)
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.int64, torch.float32))


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


LAYOUTS: dict[str, Callable[[torch.dtype, torch.dtype], tuple[Tensor, Tensor]]] = {
    "plain": lambda a, b: (filled(2, 3, 4, dtype=a), filled(2, 3, 4, dtype=b)),
    "transposed": lambda a, b: (filled(4, 3, 2, dtype=a).transpose(0, 2), filled(4, 3, 2, dtype=b).transpose(0, 2)),
    "mixed": lambda a, b: (filled(3, 2, 4, dtype=a).transpose(0, 1), filled(2, 3, 4, dtype=b)),
    "mixed the other way": lambda a, b: (filled(2, 3, 4, dtype=a), filled(4, 2, 3, dtype=b).permute(1, 2, 0)),
    "row": lambda a, b: (filled(2, 3, 4, dtype=a), filled(4, dtype=b)),
    "row of transposed": lambda a, b: (filled(3, 2, 4, dtype=a).transpose(0, 1), filled(4, dtype=b)),
    "both broadcast": lambda a, b: (filled(2, 1, 4, dtype=a), filled(3, 1, dtype=b)),
    "expanded": lambda a, b: (filled(1, 1, dtype=a).expand(2, 3), filled(3, 2, dtype=b).t()),
    "with gaps": lambda a, b: (filled(2, 3, 8, dtype=a)[..., :4], filled(2, 3, 8, dtype=b)[..., 4:]),
    "transposed with gaps": lambda a, b: (filled(3, 2, 8, dtype=a).transpose(0, 1)[..., :4], filled(2, 3, 4, dtype=b)),
    "scalar": lambda a, b: (filled(2, 3, dtype=a), filled(dtype=b)),
}


def argument_kinds(operation: Any) -> list[str]:
    """The types of the arguments that must be given by position."""
    listed = [one for one in operation._schema.arguments if not one.kwarg_only and not one.has_default_value()]
    return [str(one.type) for one in listed]


def is_elementwise(operation: Any) -> bool:
    kinds = argument_kinds(operation)
    pointwise = torch.Tag.pointwise in operation.tags or operation in MASKED
    return pointwise and set(kinds) <= {"Tensor", "number", "Optional[number]"}


ELEMENTWISE = [one for one in RESULTS if is_elementwise(one)]


def elementwise_arguments(operation: Any, tensors: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    found: list[Any] = []
    for kind in argument_kinds(operation):
        number = sum(isinstance(one, Tensor) for one in found)
        found.append(tensors[min(number, 1)] if kind == "Tensor" else 2)
    if operation in BOUNDED:
        found.append(2)
    if operation in TRUTHS:
        found[0] = found[0].bool()
    if operation in MASKED:
        found[1] = tensors[1].bool()
        found[2] = filled() if isinstance(found[2], Tensor) else found[2]
    return tuple(found)


def described(result: Any) -> list[Any]:
    """Shape, strides where they mean anything, and dtype of each tensor."""
    return [
        (tuple(one.shape), [st for st, size in zip(one.stride(), one.shape) if size > 1], one.dtype)
        if isinstance(one, Tensor)
        else one
        for one in tree_leaves(result)
    ]


def without_memory(value: Any) -> Any:
    return tree_map(
        lambda one: (
            torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
            if isinstance(one, Tensor)
            else one
        ),
        value,
    )


def cases(operation: Any, layout: str) -> Iterator[tuple[Any, ...]]:
    for one, other in DTYPES:
        if operation in INTEGERS:
            one = other = torch.int64
        arguments = elementwise_arguments(operation, LAYOUTS[layout](one, other))
        try:
            operation(*arguments) if operation not in OUT else None
        except (RuntimeError, NotImplementedError) as error:
            # torch computes nothing for such arguments, so there is no result to compare; any other error is one.
            if REFUSALS.search(str(error)) is None or (layout == "plain" and one == other):
                raise
            continue
        yield arguments


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elementwise_operations_return_what_they_return_on_a_cpu(layout: str) -> None:
    num_compared = 0
    for operation in ELEMENTWISE:
        for arguments in cases(operation, layout):
            if operation in OUT:
                continue
            shadows = without_memory(arguments)
            found = result_of(operation, shadows, {})
            if found is NotImplemented:
                dtypes = {one.dtype for one in arguments if isinstance(one, Tensor)}
                assert layout != "plain" or len(dtypes) > 1 or operation == aten.pow.Scalar, f"{operation} is left out"
                continue
            expected = operation(*arguments)
            assert described(found) == described(expected), f"{operation} of {described(arguments)}"
            assert (found is shadows[0]) == (operation in IN_PLACE), f"{operation} returns another tensor"
            num_compared += 1
    assert num_compared > len(ELEMENTWISE) / 2


X, SQUARE, IDS = filled(2, 3, 4), filled(4, 4), torch.tensor([1, 0, 1])
NORM = (filled(2, 3, 1), filled(2, 3, 1))
LOGITS, LABELS = filled(2, 3), torch.tensor([0, 2])
HEADS_BNSD = filled(5, 2, 3, 8).permute(1, 2, 0, 3)
OTHERS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.mm.default, (filled(2, 3), filled(4, 3).t()), {}),
    (aten.mm.out, (filled(2, 3), filled(3, 4)), {"out": filled(2, 4)}),
    (aten.mv.default, (filled(2, 3), filled(3)), {}),
    (aten.addmm.default, (filled(4), filled(2, 3), filled(3, 4)), {}),
    (aten.addmm_.default, (filled(2, 4), filled(2, 3), filled(3, 4)), {}),
    (aten.bmm.default, (filled(2, 3, 4), filled(2, 5, 4).transpose(1, 2)), {}),
    *((one, (x,), {}) for one in (aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default)
      for x in (X, X.transpose(0, 2), X[..., :2].transpose(0, 1), filled(1, 3).expand(2, 3))),
    (aten.zeros_like.default, (X,), {"dtype": torch.int64}),
    (aten.clone.default, (X.transpose(0, 1),), {}),
    (aten.clone.default, (X.transpose(0, 1),), {"memory_format": torch.contiguous_format}),
    (aten.cat.default, ([X, filled(2, 3, 1)], -1), {}),
    (aten.cat.default, ([X, filled(3, 2, 4).transpose(0, 1)],), {}),
    (aten.stack.default, ([X, X], -1), {}),
    (aten.stack.default, ([X, X],), {}),
    (aten.embedding.default, (SQUARE, IDS.view(3, 1)), {}),
    (aten.native_layer_norm.default, (X, [4], filled(4), filled(4), 1e-5), {}),
    (aten.native_layer_norm.default, (X, [4], filled(4), None, 1e-5), {}),
    (aten.native_layer_norm_backward.default, (X, X, [4], *NORM, filled(4), filled(4), [True, True, True]), {}),
    (aten.native_layer_norm_backward.default, (X, X, [4], *NORM, filled(4), None, [True, True, False]), {}),
    (aten._softmax.default, (X, -1, False), {}),
    (aten._softmax_backward_data.default, (X, X, -1, torch.float32), {}),
    (aten._log_softmax.default, (X, -1, False), {}),
    (aten._log_softmax_backward_data.default, (X, X, -1, torch.float32), {}),
    (aten.nll_loss_forward.default, (LOGITS, LABELS, None, 1, -100), {}),
    (aten.nll_loss_forward.default, (LOGITS, LABELS, None, 0, -100), {}),
    (aten.nll_loss_backward.default, (filled(), LOGITS, LABELS, None, 1, -100, filled()), {}),
    (aten.sum.default, (X,), {}),
    (aten.sum.default, (IDS,), {}),
    (aten.sum.dim_IntList, (X.transpose(0, 2), [0]), {}),
    (aten.sum.dim_IntList, (X, [0, -1], True), {"dtype": torch.float64}),
    (aten.sum.IntList_out, (X, [1]), {"out": filled(2, 4)}),
    (aten.mean.dim, (X, [-1], True), {}),
    (aten.amax.default, (X, [-1]), {}),
    (aten.linalg_vector_norm.default, (X, 2, [-1], True), {}),
    (aten.arange.default, (5,), {"device": "meta"}),
    (aten.arange.start, (2, 5), {"dtype": torch.float32, "device": "meta"}),
    (aten.arange.start_step, (0, 5, 2), {"device": "meta"}),
    (aten.arange.start_step, (0.0, 5, 2), {"device": "meta"}),
    (aten._scaled_dot_product_flash_attention_for_cpu.default, (HEADS_BNSD, HEADS_BNSD, HEADS_BNSD, 0.0, True), {}),
    (aten.gather.default, (SQUARE, 1, torch.zeros(4, 2, dtype=torch.int64)), {}),
    (aten.index.Tensor, (X, [torch.tensor([1, 0])]), {}),
    (aten.index.Tensor, (SQUARE, [IDS, IDS]), {}),
    (aten.index_select.default, (X, 1, IDS), {}),
    (aten.index_add.default, (SQUARE, 0, IDS, filled(3, 4)), {}),
    (aten.index_add_.default, (filled(4, 4), 0, IDS, filled(3, 4)), {}),
    (aten.index_put_.default, (filled(4, 4), [IDS], filled(3, 4)), {}),
    (aten.scatter_add.default, (SQUARE, 0, torch.zeros(4, 4, dtype=torch.int64), SQUARE), {}),
    (aten.scatter_add_.default, (filled(4, 4), 0, torch.zeros(4, 4, dtype=torch.int64), SQUARE), {}),
    (aten.scatter_.src, (filled(4, 4), 0, torch.zeros(4, 4, dtype=torch.int64), SQUARE), {}),
    (aten.scatter_.value, (filled(4, 4), 0, torch.zeros(4, 4, dtype=torch.int64), 1.0), {}),
    (aten.repeat.default, (filled(3, 4), [2, 1, 2]), {}),
    (aten.sort.default, (X, -1), {}),
    (aten.sort.stable, (X,), {"stable": True, "dim": -1, "descending": True}),
    (aten.topk.default, (X, 2, -1), {}),
    (aten.slice_backward.default, (filled(2, 3), [2, 5], 1, 0, 3, 1), {}),
    (aten.select_backward.default, (filled(2, 3), [4, 2, 3], 0, 0), {}),
    (aten.triu.default, (SQUARE, 1), {}),
    (aten.tril.default, (SQUARE,), {}),
    (aten.tril_.default, (filled(4, 4),), {}),
    (aten.zero_.default, (filled(2),), {}),
    (aten.fill_.Scalar, (filled(2), 1.0), {}),
    (aten.copy_.default, (filled(2), filled(2)), {}),
    (aten.clamp.default, (X, -1, 1), {}),
    (aten.clamp_.default, (filled(2), -1, 1), {}),
    (aten.clamp.out, (X, -1, 1), {"out": filled(2, 3, 4)}),
    *((one, (X, 2.0), {"out": filled(2, 3, 4)}) for one in (aten.add.out, aten.sub.out, aten.mul.out, aten.div.out)),
    *((one, (X, 2.0), {"out": filled(2, 3, 4).bool()}) for one in (aten.ge.Scalar_out, aten.lt.Scalar_out)),
    *((one, (X, X), {"out": filled(2, 3, 4).bool()}) for one in (aten.ge.Tensor_out, aten.lt.Tensor_out)),
    *((one, (IDS, 1), {"out": IDS.clone()}) for one in (
        aten.bitwise_and.Scalar_out, aten.bitwise_right_shift.Tensor_Scalar_out)),
    (aten.bitwise_xor.Tensor_out, (IDS, IDS), {"out": IDS.clone()}),
    (aten.exp.out, (X,), {"out": filled(2, 3, 4)}),
    (aten.pow.Scalar, (10.0, X), {}),
    (aten.floor_divide.default, (IDS, IDS + 1), {}),
    (aten.lerp.Scalar, (X, X, 0.5), {}),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "args", "kwargs"), OTHERS, ids=lambda value: str(value)[:40])
def test_other_operations_return_what_they_return_on_a_cpu(operation: Any, args: Any, kwargs: dict[str, Any]) -> None:
    shadows = without_memory((args, kwargs))
    found = result_of(operation, *shadows)
    expected = operation(*args, **{name: value for name, value in kwargs.items() if name != "device"})
    assert described(found) == described(expected)
    if operation in IN_PLACE or operation in OUT:
        assert found is (shadows[1]["out"] if "out" in shadows[1] else shadows[0][0])


def test_every_operation_of_the_table_is_compared() -> None:
    compared = {*ELEMENTWISE} - {*OUT} | {operation for operation, _, _ in OTHERS}
    assert not RESULTS.keys() - compared, f"not compared: {sorted(map(str, RESULTS.keys() - compared))}"


def test_what_is_not_plain_is_left_to_torch() -> None:
    mask = torch.empty(2, dtype=torch.bool, device="meta")
    x, short = torch.empty(2, 3, device="meta"), torch.empty(2, device="meta")
    assert result_of(aten.index.Tensor, (x, [mask]), {}) is NotImplemented
    assert result_of(aten.add.out, (x, x), {"out": short}) is NotImplemented
    assert result_of(aten.add.Tensor, (x, torch.ones(2, 3)), {}) is NotImplemented
    assert result_of(aten.arange.default, (3,), {}) is NotImplemented, "it is on the CPU"
    assert result_of(aten.cumsum.default, (x, 0), {}) is NotImplemented
