"""Files of a measured timeline: a picture, and a trace for https://ui.perfetto.dev or chrome://tracing.

The trace is in the Trace Event Format (Google, "Trace Event Format", 2016): one process per pipeline rank, with one
thread for its steps and one for its waiting and the starts of its reductions.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron3d.pipeline.draw.png import draw_png
from megatron3d.pipeline.draw.text import OP_WORDS
from megatron3d.pipeline.measured import Measured, TimedWait, comparison_line
from megatron3d.pipeline.schedule import Reduce, Send
from megatron3d.pipeline.simulate import Timeline
from megatron3d.storage.refusals import storage_errors

_COMPUTE, _WAITS = 0, 1  # threads of a rank
_THREADS = {_COMPUTE: "compute", _WAITS: "waits"}
_MICROSECONDS = 1e6  # in a second; the unit of the format


def write_profile(measured: Measured, folder: Path, *, name: str = "pipeline") -> str:
    """Write `name`.png and `name`.trace.json into the folder, made if need be; return what came out in a line.

    Raises:
        StorageError: a file cannot be written.
    """
    trace, picture = folder / f"{name}.trace.json", folder / f"{name}.png"
    with storage_errors("write the trace", trace, way_out="choose another folder for --profile-pipeline"):
        folder.mkdir(parents=True, exist_ok=True)
        trace.write_text(json.dumps(trace_events(measured)))
    schedule = measured.timeline.schedule.name
    draw_png(in_milliseconds(measured.timeline), picture, title=f"{schedule} schedule, measured", unit="ms")
    return f"{comparison_line(measured)}; see {picture} and {trace}"


def trace_events(measured: Measured) -> dict[str, Any]:
    """The timeline in the Trace Event Format."""
    timeline = measured.timeline
    events: list[dict[str, Any]] = []
    for rank in range(timeline.schedule.num_ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"pipeline rank {rank}"}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        for thread, words in _THREADS.items():
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": words}})
    for rank, step, start, end in timeline.steps:
        args = {"op": step.op.value, "stage": step.stage, "microbatch": step.mb}
        words = f"{OP_WORDS[step.op]} {step.mb}"
        events.append(_slice(words, start, end, pid=rank, tid=_COMPUTE, cat="compute", args=args))
    for wait in measured.waits:
        words, category, args = _describe_wait(wait)
        events.append(_slice(words, wait.start, wait.end, pid=wait.rank, tid=_WAITS, cat=category, args=args))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def in_milliseconds(timeline: Timeline) -> Timeline:
    """A timeline in seconds on the scale on which steps are easy to read."""
    steps = tuple(timed._replace(start=timed.start * 1e3, end=timed.end * 1e3) for timed in timeline.steps)
    busy = tuple(busy * 1e3 for busy in timeline.busy)
    return replace(timeline, steps=steps, span=timeline.span * 1e3, busy=busy)


def _slice(words: str, start: float, end: float, **others: Any) -> dict[str, Any]:
    """A complete event of the format."""
    return {"ph": "X", "name": words, "ts": start * _MICROSECONDS, "dur": (end - start) * _MICROSECONDS, **others}


def _describe_wait(wait: TimedWait) -> tuple[str, str, dict[str, int]]:
    """Name, category and details of what is no step."""
    what = wait.what
    if isinstance(what, Reduce):
        return f"start reduction of stage {what.stage}", "reduction", {"stage": what.stage}
    details = {"stage": what.stage, "microbatch": what.mb, "peer": what.peer}
    if isinstance(what, Send):
        return f"wait until {what.what} {what.mb} has left", "wait", details
    return f"wait for {what.what} {what.mb}", "wait", details
