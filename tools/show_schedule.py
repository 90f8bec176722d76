"""Show a pipeline schedule as a text timeline, as JSON or as a picture; or compare all schedules at one size.

    python tools/show_schedule.py --pipeline-schedule 1f1b --stages 4 --microbatches 8 --png 1f1b.png
    python tools/show_schedule.py --compare --stages 4 --microbatches 8

Nothing is run or measured: times come from the costs given here (a backward costs two forwards, messages are free).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron3d.config.tool_parser import ToolParser
from megatron3d.errors import Megatron3dError
from megatron3d.pipeline.draw.compare import compare, comparison_headline, render_table, stage_costs
from megatron3d.pipeline.draw.compare_png import draw_comparison_png
from megatron3d.pipeline.draw.png import draw_png
from megatron3d.pipeline.draw.text import headline, render_text
from megatron3d.pipeline.orders.named import ORDERS, build_schedule, virtual_of
from megatron3d.pipeline.schedule import Schedule
from megatron3d.pipeline.simulate import Costs, simulate

_VIRTUAL_OF_A_COMPARISON = 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Show or compare pipeline schedules.")
    p.add_argument(
        "--pipeline-schedule",
        metavar="NAME",
        help=f"one of: {', '.join(ORDERS)}; or your own, as module:function or file.py:function (default 1f1b; "
        "with --compare, one more to compare)",
    )
    p.add_argument("--stages", type=int, required=True, metavar="P", help="pipeline ranks")
    p.add_argument(
        "--virtual",
        type=int,
        metavar="V",
        help="stages on each rank (default: what the schedule needs, or 1; with --compare, "
        f"{_VIRTUAL_OF_A_COMPARISON} where a schedule leaves it open)",
    )
    p.add_argument("--microbatches", type=int, required=True, metavar="M", help="microbatches per step")
    p.add_argument("--group-size", type=int, metavar="N", help="microbatches per group of the interleaved schedule")
    p.add_argument("--compare", action="store_true", help="a table of all schedules that train; with --png, a picture")
    output = p.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the rows and the placement as JSON")
    output.add_argument("--png", type=Path, metavar="FILE", help="draw into FILE")
    p.add_argument("--title", help="heading of the picture (default: the schedule's name)")
    p.add_argument("--width", type=int, default=120, metavar="COLUMNS", help="width of the text (default 120)")
    costs = p.add_argument_group("costs", "of one microbatch, in one time unit of your choice")
    costs.add_argument(
        "--costs-of",
        choices=("rank", "stage"),
        default="rank",
        help="what the costs are for: all stages of a rank, of which each takes 1/V (default), or each single stage",
    )
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


def costs_of(args: argparse.Namespace) -> Costs:
    """The costs as given."""
    return Costs(
        forward=args.forward_cost,
        backward=args.backward_cost,
        input_grad=args.input_grad_cost,
        weight_grad=args.weight_grad_cost,
        stage_factors=tuple(args.stage_factors) if args.stage_factors else None,
        link_latency=args.link_latency,
        link_bandwidth=args.link_bandwidth,
        message_bytes=args.message_bytes,
    )


def show(args: argparse.Namespace) -> str:
    """Show one schedule and return what to print."""
    name = args.pipeline_schedule or "1f1b"
    schedule = build_schedule(
        name,
        num_ranks=args.stages,
        num_microbatches=args.microbatches,
        virtual=_or(args.virtual, virtual_of(name) or 1),
        group_size=args.group_size,
    )
    if args.json:
        return schedule_as_json(schedule)
    costs = costs_of(args)
    timeline = simulate(schedule, stage_costs(costs, schedule) if args.costs_of == "rank" else costs)
    if args.png is None:
        return render_text(timeline, width=args.width)
    draw_png(timeline, args.png, title=args.title)
    return f"{headline(timeline)}; drawn into {args.png}"


def show_comparison(args: argparse.Namespace) -> str:
    """Compare all schedules that train, and the user's own if one is given; return what to print."""
    given = args.pipeline_schedule
    entrants = [(name, virtual_of(name) or _or(args.virtual, _VIRTUAL_OF_A_COMPARISON)) for name in ORDERS]
    if given is not None and given not in ORDERS:
        entrants.append((given, virtual_of(given) or _or(args.virtual, 1)))
    comparison = compare(entrants, num_ranks=args.stages, num_microbatches=args.microbatches, costs=costs_of(args))
    if args.png is None:
        return render_table(comparison)
    draw_comparison_png(comparison, args.png, title=args.title)
    count = len(comparison.contenders)
    return f"{comparison_headline(comparison)}: {count} schedules compared; drawn into {args.png}"


def _or(given: int | None, default: int) -> int:
    """What was given, 0 included, else the default."""
    return default if given is None else given


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    command_line = parser()
    args = command_line.parse_args(argv)
    if args.compare and (args.json or args.costs_of == "stage" or args.group_size):
        command_line.error(
            "--compare goes with text or --png and compares by the costs of a rank; drop the other option"
        )
    try:
        print(show_comparison(args) if args.compare else show(args))
    except Megatron3dError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
