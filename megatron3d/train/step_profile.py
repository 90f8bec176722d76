"""`--profile`: a trace of some steps on some ranks for Perfetto, and where the time of those steps went.

On a CPU every operation of a step, backwards included, runs in the thread of the step, one inside of the other, so the
times that each spent in itself add up to the step. With a device they do not; there the trace alone is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron3d.comm.mesh import Mesh
from megatron3d.config.sections.train import TrainConfig
from megatron3d.errors import StorageError
from megatron3d.storage.atomic import write_text_atomically
from megatron3d.storage.refusals import storage_errors

STEP, DATA = "step", "data"
WAIT = "wait "  # and axis and collective, see `Waiting`
PRODUCTS, ATTENTION, ELEMENTWISE = "products", "attention", "element-wise and reductions"
COMMUNICATION, BUBBLE, OPTIMIZER = "exposed communication", "bubble and messages", "optimizer"
OTHER = "Python and other"
PARTS: tuple[str, ...] = (PRODUCTS, ATTENTION, ELEMENTWISE, COMMUNICATION, BUBBLE, DATA, OPTIMIZER, OTHER)

_PRODUCT_OPERATIONS: str = "mm bmm addmm addmm_ baddbmm baddbmm_ addbmm mv dot _linear_pointwise mkldnn_linear"
_WITHOUT_ARITHMETIC: str = """
    empty empty_like empty_strided view _unsafe_view reshape as_strided slice select transpose t permute expand detach
    detach_ unsqueeze squeeze unbind split split_with_sizes narrow flatten alias resize_ item _local_scalar_dense
    lift_fresh resolve_conj resolve_neg result_type is_nonzero matmul linear
"""
_PART_BY_OPERATION: dict[str, str] = dict.fromkeys(_PRODUCT_OPERATIONS.split(), PRODUCTS)
_PART_BY_OPERATION |= dict.fromkeys(_WITHOUT_ARITHMETIC.split(), OTHER)
_WITH_ALL_INSIDE = frozenset({DATA, ATTENTION, OPTIMIZER, COMMUNICATION, BUBBLE})


@dataclass
class StepProfiler:
    """Profiles the iterations that the options name, if this rank is among those that they name."""

    options: TrainConfig
    mesh: Mesh
    device: torch.device
    _running: profile | None = field(default=None, init=False)
    _first: int = field(default=0, init=False)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one iteration, counted from 0."""
        if not self._records(number):
            yield
            return
        if self._running is None:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running, self._first = profile(activities=activities), number
            self._running.start()
        self.mesh.meter.profiles = True
        try:
            with record_function(STEP):
                yield
        finally:
            self.mesh.meter.profiles = False

    def part(self, name: str) -> AbstractContextManager[Any]:
        """A context whose time counts as that part of the step."""
        return nullcontext() if self._running is None else record_function(name)

    def written(self, next_number: int, *, is_last: bool) -> list[str]:
        """Once the last profiled iteration is over (`next_number` comes next, or nothing): write the files and return
        what came out, or why nothing did, as lines. Empty before that, and afterwards."""
        if self._running is None or (self._records(next_number) and not is_last):
            return []
        running, self._running = self._running, None
        running.stop()
        stem = f"iterations{self._first}-{next_number - 1}.rank{self.mesh.rank}"
        try:
            return self._write(running, Path(self.options.profile_dir) / stem)
        except StorageError as error:
            return [f"no profile was written: {error}"]

    def _write(self, running: profile, stem: Path) -> list[str]:
        trace, table = stem.with_name(f"{stem.name}.trace.json.gz"), stem.with_name(f"{stem.name}.txt")
        lines = [f"rank {self.mesh.rank}'s trace for ui.perfetto.dev is {trace}"]
        with storage_errors("write the profile", stem, way_out="choose another folder for --profile-dir"):
            stem.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(trace))
            if self.device.type == "cpu":
                lines += table_lines(parts_of_steps(running.events() or []))
                write_text_atomically(table, "\n".join(lines) + "\n")
        return lines

    def _records(self, number: int) -> bool:
        options = self.options
        is_time = options.profile_step_start <= number < options.profile_step_end
        return options.profile and is_time and str(self.mesh.rank) in (options.profile_ranks or ("0",))


def parts_of_steps(events: Iterable[Any]) -> dict[str, float]:
    """Microseconds of each of PARTS in all profiled steps, from torch's events; they add up to those of the steps."""
    totals = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.name == STEP:
            _add(event, None, totals)
    return totals


def table_lines(totals: Mapping[str, float]) -> list[str]:
    """Each part with its share, largest first, and their sum."""
    total = sum(totals.values())
    rows = [(name, time) for name, time in sorted(totals.items(), key=lambda row: -row[1]) if time > 0]
    return [
        f"{name:28s} {us / 1e3:10.1f} ms {100 * us / max(total, 1e-9):6.1f} %" for name, us in (*rows, ("sum", total))
    ]


def _add(event: Any, outer: str | None, totals: dict[str, float]) -> None:
    """Add what the event spent in itself, then the events inside of it; some parts keep all that is inside."""
    part = outer or _part_of(event.name)
    totals[part] += event.self_cpu_time_total
    for inner in event.cpu_children:
        _add(inner, part if part in _WITH_ALL_INSIDE else None, totals)


def _part_of(name: str) -> str:
    if name == DATA:
        return DATA
    if name.startswith(WAIT):
        return BUBBLE if name.split()[1] == "pp" else COMMUNICATION
    if name.startswith("Optimizer."):
        return OPTIMIZER
    if "scaled_dot_product" in name or "CausalBlocks" in name:
        return ATTENTION
    room, _, operation = name.partition("::")
    return _PART_BY_OPERATION.get(operation, ELEMENTWISE) if room in ("aten", "mkldnn") else OTHER
