"""A GPU that is not there: whole training steps on tensors without memory, and a list of what a GPU would have done.

For a process of its own, since a device once named stays. The device is torch's PrivateUse1 under the name "fakegpu":
fake tensors of `cuda` cannot run a backward without a driver. FakeTensorMode refuses operations that mix devices.

What counts:

- **A kernel** is a launch of a Triton kernel, or an operation of torch that makes or changes a tensor on the device
  (no view, and no allocation). Attention is one kernel forward and one backward, whatever a library makes of it. An
  operation on a list of tensors takes as many launches as torch's own limits ask for (`_launches_of_lists`).
- **Bytes** of a torch operation are those of its inputs and its results, so what works in place counts read and
  written; of one that only writes (a fill, a copy's target), its result alone; of a table, the rows that are taken or
  changed. Bytes of a Triton kernel are those that it loads and those that it stores (`triton_traffic.py`). Broadcast
  elements count once. Traffic inside of a kernel, and what a cache saves, does not count.
- **Products** (matrix times matrix) and attention are apart: their time is that of their operations. All other
  bytes are called element-wise.
- **A read** is a moment at which Python takes a value from the device and so waits for it; a copy between host and
  device waits unless it is `non_blocking`.

Code that asks for a GPU must ask `tensor.is_cuda`, which is true here; a comparison of `device.type` sees "fakegpu".
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron3d_kernels import launch as triton_door
from megatron3d_kernels.attention_backends import AttentionChoice
from megatron3d_kernels.products import TORCH
from megatron3d_kernels.selection import REFERENCE, TRITON_DTYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from megatron3d.comm import device as devices
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.run import RunConfig
from megatron3d.data.batch import BertBatch, GPTBatch, Samples
from megatron3d.models.zoo import architecture_of
from megatron3d.nn import attention_core
from megatron3d.params.normal import fill_normal
from megatron3d.planner.kernels_without_memory import GpuKernels
from megatron3d.train import setup
from megatron3d.train import step as steps
from megatron3d.train.setup import TrainingSetup
from tools.bench.triton_traffic import bytes_in_place, bytes_moved, size_of

NAME = "fakegpu"
PRODUCT, ATTENTION, ELEMENTWISE = "product", "attention", "element-wise"
# Names of products to the place of the first factor among their arguments.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_scaled_mm": 0, "_scaled_mm_v2": 0, "_grouped_mm": 0}
_PRODUCTS |= {"addmm_": 1, "baddbmm_": 1, "_scaled_grouped_mm": 0, "_int_mm": 0}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEWS = _words(
    "view _unsafe_view t transpose permute expand slice select split split_with_sizes unsqueeze squeeze detach alias "
    "as_strided unbind chunk _reshape_alias unflatten reshape view_as lift_fresh empty empty_strided new_empty "
    "new_empty_strided empty_like is_same_size unfold set_ resize_ _local_scalar_dense device is_pinned sym_size "
    "data_ptr movedim diagonal narrow flatten record_stream _conj"
)
_ONLY_WRITTEN = _words("zero_ fill_ zeros ones full arange rand randn normal_ uniform_ random_ zeros_like")
_ONLY_WRITTEN |= _words("ones_like full_like new_zeros new_ones new_full bernoulli_ copy_")
_TAKES_ROWS = _words("embedding index_select gather index")
_CHANGES_ROWS = _words("index_put_ index_add_ scatter_add_ _index_put_impl_")
_READS = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default})
_WIDE_SUMS = frozenset({torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out})
_COPIES = frozenset({"_to_copy", "copy_"})


@dataclass(frozen=True)
class FakeKernel:
    """One kernel: its name, what it is (a product, attention, or element-wise), bytes, operations and the dtype of its
    operands; `launches` of them where it works on a list. `in_place_bytes` are those of tensors that a Triton kernel
    both reads and writes, which `num_bytes` has twice."""

    name: str
    sort: str
    num_bytes: int
    operations: float = 0.0
    dtype: torch.dtype | None = None
    launches: int = 1
    in_place_bytes: int = 0


@dataclass(frozen=True)
class HostTraffic:
    """A read of a value, or a copy to or from the device, whether the host waits for it, and whether it came within the
    loop over micro-batches."""

    what: str
    waits: bool
    is_inside: bool


@dataclass
class Traffic(TorchDispatchMode):
    """What a device did, and what went between it and the host."""

    kernels: list[FakeKernel] = field(default_factory=list)
    host: list[HostTraffic] = field(default_factory=list)
    is_inside: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Note an operation; answer reads, since a fake tensor has no values."""
        kwargs = kwargs or {}
        if func in _READS:
            return self._answer(func, args[0])
        # torch 2.11 refuses these for fake tensors.
        out = kwargs["out"] if func in _WIDE_SUMS else func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name not in _VIEWS:
            self._note(func, name, args, kwargs, out)
        return out

    def _answer(self, func: Any, tensor: Tensor) -> object:
        if tensor.device.type == NAME:
            self.note_host(str(func), waits=True)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if tensor.is_floating_point() else 1
        return tensor.new_empty((3, tensor.dim()), dtype=torch.int64)

    def _note(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        inputs = _tensors((args, {key: value for key, value in kwargs.items() if key != "out"}))
        outputs = _tensors(out) or _written(func, args, kwargs)
        if NAME not in {one.device.type for one in (*inputs, *outputs)}:
            return
        if name in _COPIES and len({one.device.type for one in (*inputs, *outputs) if one.dim()}) > 1:
            to_host = outputs[0].device.type == "cpu"
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            self.note_host(f"{func} to the {'host' if to_host else 'device'}", waits=waits)
        elif name in _PRODUCTS:
            first, second = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
            self.note(name, PRODUCT, (*inputs, *outputs), 2.0 * first.numel() * second.shape[-1], first.dtype)
        else:
            launches = _launches_of_lists(args) if name.startswith(("_foreach", "_fused_")) else 1
            num_bytes = sum(map(size_of, _moved(name, inputs, outputs)))
            self.kernels.append(FakeKernel(name, ELEMENTWISE, num_bytes, launches=launches))

    def note(
        self, name: str, sort: str, moved: Iterable[Tensor], operations: float = 0.0, dtype: torch.dtype | None = None
    ) -> None:
        """One kernel; `moved` are the tensors that it reads and writes."""
        self.kernels.append(FakeKernel(name, sort, sum(map(size_of, moved)), operations, dtype))

    def note_host(self, what: str, *, waits: bool) -> None:
        """One read or copy."""
        self.host.append(HostTraffic(what, waits, self.is_inside))

    def reads(self, *, inside: bool | None = None) -> list[str]:
        """What Python waited for, in the loop over micro-batches, outside of it, or both."""
        waited = [one for one in self.host if one.waits and not one.what.endswith("to the device")]
        return [one.what for one in waited if inside in (None, one.is_inside)]


class FakeGpu:
    """The device of this process, made once."""

    def __init__(self, implementation: str = "") -> None:
        """`implementation` "reference" runs the kernels' references, which are torch's operations.

        `on_launch` may be set to a function that sees kernel, arguments and compile-time constants of each launch.
        """
        _setup_privateuseone_for_python_backend(NAME)
        # What `torch.utils.checkpoint` asks of a device before it recomputes.
        torch.get_device_module(NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
        self.device = torch.device(NAME, 0)
        self.implementation = implementation
        self.traffic = Traffic()
        self.on_launch: Callable[[Any, tuple[object, ...], dict[str, Any]], None] = lambda *launch: None
        self._replace_what_needs_a_gpu()

    def _replace_what_needs_a_gpu(self) -> None:
        make, one = torch.tensor, self

        class Kernels(FakeGpuKernels):
            gpu = one

        def tensor(data: object, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
            made = make(data, dtype=dtype)
            return made if device is None else torch.empty(made.shape, dtype=made.dtype, device=device)

        def tolist(tensor: Tensor) -> Any:
            if tensor.device.type == NAME:
                self.traffic.note_host("tolist", waits=True)
            return _ones(tensor.shape)

        torch.tensor = tensor  # makes real memory on the device
        FakeTensor.tolist = tolist  # pyright: ignore[reportAttributeAccessIssue]
        is_cuda = property(lambda tensor: tensor.device.type == NAME)
        torch.Tensor.is_cuda = is_cuda  # pyright: ignore[reportAttributeAccessIssue]
        # Seeds for the fused attention's own dropout, which no generator of this device takes.
        torch.random.fork_rng = lambda *arguments, **options: contextlib.nullcontext()
        torch.manual_seed = lambda seed: None
        setup.Registry = Kernels
        attention_core.draws_by_place = lambda device_type: device_type == "cpu"
        steps.run = _within(steps.run, self)
        self._replace_in_all_modules(triton_door.launch, self._launch)
        self._replace_in_all_modules(fill_normal, lambda *arguments, **options: None)  # many small draws of no value
        self._replace_in_all_modules(devices.synchronize, lambda device: self.traffic.note_host("wait", waits=True))

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **constants: Any
    ) -> None:
        """A launch of a Triton kernel, which does nothing; an empty grid is none."""
        if 0 not in grid:
            name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.strip('_')}"
            num_bytes = bytes_moved(kernel, arguments, constants)
            in_place = bytes_in_place(kernel, arguments, constants)
            self.traffic.kernels.append(FakeKernel(name, ELEMENTWISE, num_bytes, in_place_bytes=in_place))
            self.on_launch(kernel, arguments, constants)

    def _replace_in_all_modules(self, old: object, new: object) -> None:
        """Whoever has imported the function gets the other one."""
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("megatron3d"):
                for name in [name for name, value in vars(module).items() if value is old]:
                    setattr(module, name, new)

    def step(self, config: RunConfig) -> tuple[Traffic, TrainingSetup]:
        """Build the model of a resolved config of one rank on the device and make one training step with it."""
        self.traffic = Traffic()
        with FakeTensorMode(allow_non_fake_inputs=True):
            builder = architecture_of(config.model).build_stage
            parts = setup.build_parts(config, make_mesh(Layout()), self.device, builder)
            with self.traffic:
                steps.train_step(parts, _batch(config), steps.Rates(1e-4, 0.01), step=0)
                parts.engine.finish_update()
        return self.traffic, parts

    def leave(self) -> None:
        """End the process: autograd has made a thread for the device, which does not end with it."""
        sys.stdout.flush()
        os._exit(0)


def _within(run: Any, gpu: FakeGpu) -> Any:
    """The loop over micro-batches, which says when it runs."""

    def counted(*arguments: Any, **options: Any) -> Any:
        gpu.traffic.is_inside = True
        result = run(*arguments, **options)
        gpu.traffic.is_inside = False
        return result

    return counted


def _tensors(tree: object) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operation without results changes. The fused optimizers declare that they write gradients, and do so only
    where they also scale them."""
    declared = [one for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    given = dict(zip([one.name for one in func._schema.arguments], args)) | kwargs
    names = [one.name for one in declared if one.name != "grads" or given.get("grad_scale") is not None]
    return _tensors([given[name] for name in names if name in given])


def _moved(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    """The tensors that an element-wise operation reads and writes."""
    if name in _ONLY_WRITTEN:
        return [*inputs[1:], *outputs] if name == "copy_" else outputs
    if name in _TAKES_ROWS:
        return [*inputs[1:], *outputs, *outputs]
    if name in _CHANGES_ROWS:  # the values, and as many rows read and written
        return [*inputs[1:], inputs[-1], inputs[-1]]
    return [*inputs, *outputs]


def _launches_of_lists(args: tuple[Any, ...]) -> int:
    """Launches of an operation on lists of tensors: torch gives one at most 320 blocks of 65,536 elements, and 110
    tensors of one list, 64 of two, 48 of three, 36 of four, 30 of five.

    Source: torch, aten/src/ATen/native/cuda/MultiTensorApply.cuh.
    """
    lists = [one for one in args if isinstance(one, (list, tuple)) and one and isinstance(one[0], Tensor)]
    if not lists:
        return 1
    tensors, blocks = len(lists[0]), sum(-(-one.numel() // 65536) for one in lists[0])
    return max(-(-tensors // (110, 64, 48, 36, 30)[min(len(lists), 5) - 1]), -(-blocks // 320))


def _ones(shape: torch.Size) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


class FakeGpuKernels(GpuKernels):
    """Triton's wrappers or, as the device says, the references, on its tensors."""

    gpu: FakeGpu

    def __init__(self, force: str | None = None, *, library: str, packed: str, attention: AttentionChoice) -> None:
        super().__init__(attention=attention)
        assert library == packed == TORCH, f"products and packed documents on a GPU are torch's: {library}, {packed}"
        self._possible_keys = frozenset((NAME, dtype) for dtype in TRITON_DTYPES)
        if REFERENCE in (self.gpu.implementation, force):
            self._forced = dict.fromkeys(self._forced, REFERENCE)

    def attention(self, q_BNSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, **options: Any) -> Tensor:
        """One kernel forward and one backward, whose products are 2 and 5 of the scores' size; half of each if causal.

        Source: Dao 2023 (FlashAttention-2), section 4: the backward makes five products, the forward two.
        """
        y_BNSD = super().attention(q_BNSD, k_BGTD, v_BGTD, **options)
        share = 0.5 if options["is_causal"] and options["mask"] is None else 1.0
        operations = share * 4.0 * q_BNSD.numel() * k_BGTD.shape[2]
        sort = "attention with dropout" if options["probability"] else "attention"
        sort += "" if options["mask"] is None else " with mask"
        once = (q_BNSD, k_BGTD, v_BGTD, y_BNSD)
        self.gpu.traffic.note(f"{sort} forward", ATTENTION, once, operations, q_BNSD.dtype)

        def note_backward() -> None:
            self.gpu.traffic.note(f"{sort} backward", ATTENTION, (*once, *once), 2.5 * operations, q_BNSD.dtype)

        return _NotesBackward.apply(y_BNSD, note_backward)


class _NotesBackward(torch.autograd.Function):
    """The same tensor; calls a function when its gradient comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Any) -> Tensor:
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.note()
        return grad, None


def _batch(config: RunConfig) -> Samples:
    shape = config.train.global_batch_size, config.model.seq_length
    tokens, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(shape)
    if config.model.traits.samples == "tokens":
        return GPTBatch(tokens, tokens.clone(), mask)
    pairs = torch.zeros(shape[0], dtype=torch.int64)
    return BertBatch(tokens, tokens.clone(), mask, tokens.clone(), mask.bool(), pairs)
