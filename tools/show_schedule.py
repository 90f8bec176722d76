"""Show a pipeline schedule: as a text timeline, as JSON, or as a picture.

    python tools/show_schedule.py --pipeline-schedule 1f1b --stages 4 --microbatches 8 --png 1f1b.png

Nothing is run or measured: times come from the costs given here (a backward costs two forwards, messages are free).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron3d.errors import Megatron3dError
from megatron3d.pipeline.orders import ORDERS, build_schedule
from megatron3d.pipeline.render import headline, render_text
from megatron3d.pipeline.render_png import draw_png
from megatron3d.pipeline.schedule import Schedule
from megatron3d.pipeline.simulate import Costs, simulate


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="Show a pipeline schedule as text, JSON or PNG.", allow_abbrev=False)
    p.add_argument("--pipeline-schedule", default="1f1b", metavar="NAME", help=f"one of: {', '.join(ORDERS)}")
    p.add_argument("--stages", type=int, required=True, metavar="P", help="pipeline ranks")
    p.add_argument("--virtual", type=int, default=1, metavar="V", help="stages on each rank (default 1)")
    p.add_argument("--microbatches", type=int, required=True, metavar="M", help="microbatches per step")
    output = p.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the rows and the placement as JSON")
    output.add_argument("--png", type=Path, metavar="FILE", help="draw into FILE")
    p.add_argument("--title", help="heading of the picture (default: the schedule's name)")
    p.add_argument("--width", type=int, default=120, metavar="COLUMNS", help="width of the text (default 120)")
    costs = p.add_argument_group("costs", "per microbatch and stage, in one time unit of your choice")
    costs.add_argument("--forward-cost", type=float, default=Costs.forward, help="F (default 1)")
    costs.add_argument("--backward-cost", type=float, default=Costs.backward, help="B, the full backward (default 2)")
    costs.add_argument("--input-grad-cost", type=float, default=Costs.input_grad, help="I (default 1)")
    costs.add_argument("--weight-grad-cost", type=float, default=Costs.weight_grad, help="W (default 1)")
    costs.add_argument("--stage-factors", type=float, nargs="+", metavar="X", help="multiplies the costs, per stage")
    costs.add_argument("--link-latency", type=float, default=Costs.link_latency, help="time units (default 0)")
    costs.add_argument("--link-bandwidth", type=float, default=Costs.link_bandwidth, help="bytes per time unit")
    costs.add_argument("--message-bytes", type=float, default=Costs.message_bytes, help="per message (default 0)")
    return p


def schedule_as_json(schedule: Schedule) -> str:
    """The rows and the placement of stages, in the form other programs read."""
    ranks = [[{"op": step.op.value, "stage": step.stage, "mb": step.mb} for step in row] for row in schedule.rows]
    return json.dumps({"ranks": ranks, "stage_to_rank": list(schedule.stage_to_rank)})


def show(args: argparse.Namespace) -> str:
    """Do what the arguments ask and return what to print."""
    schedule = build_schedule(
        args.pipeline_schedule, num_ranks=args.stages, num_microbatches=args.microbatches, virtual=args.virtual
    )
    if args.json:
        return schedule_as_json(schedule)
    costs = Costs(
        forward=args.forward_cost,
        backward=args.backward_cost,
        input_grad=args.input_grad_cost,
        weight_grad=args.weight_grad_cost,
        stage_factors=tuple(args.stage_factors) if args.stage_factors else None,
        link_latency=args.link_latency,
        link_bandwidth=args.link_bandwidth,
        message_bytes=args.message_bytes,
    )
    timeline = simulate(schedule, costs)
    if args.png is None:
        return render_text(timeline, width=args.width)
    draw_png(timeline, args.png, title=args.title)
    return f"{headline(timeline)}; drawn into {args.png}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    try:
        print(show(parser().parse_args(argv)))
    except Megatron3dError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
