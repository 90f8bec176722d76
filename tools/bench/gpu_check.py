"""Checks one GPU in one call: does it compute what the CPU computes, how fast, and where does the time go?

    python -m tools.bench.gpu_check --out DIR                          # all parts, at most eight minutes
    python -m tools.bench.gpu_check --parts equal layouts --out DIR    # some of them

Every finding is one JSON line on stdout. Each part (`gpu_parts.py`) is a process with a time limit of its own, so that
one that hangs or crashes costs itself alone; the last line says which parts were ok, and the exit code is 1 if one was
not. Without a GPU one line says so, and the exit code is 0. `--device cpu --tiny` runs the same parts on a CPU with
small models, to check the program itself (a minute).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tools.bench.gpu_options import add_options

ROOT = Path(__file__).resolve().parents[2]
# The most seconds that each part may take, in the order in which they run. What usually suffices is half of it.
LIMITS_S = {
    "env": 60,
    "equal": 90,
    "sync": 40,
    "kernels": 90,
    "features": 90,
    "mfu": 170,
    "zero": 60,
    "ckpt": 90,
    "layouts": 100,
}
STOP_S = 5.0


def main() -> int:
    """Run the parts that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(LIMITS_S), default=list(LIMITS_S), help="default all")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds of all parts together (default 480)")
    parser.add_argument("--limit", type=float, help="seconds of each part; default by part")
    add_options(parser)
    args = parser.parse_args()
    options = ["--device", args.device, "--steps", str(args.steps), "--out", str(args.out)]
    options += ["--tiny"] if args.tiny else []
    ends_s, outcomes = time.monotonic() + args.budget, {}
    for part in args.parts:
        limit_s = min(args.limit or LIMITS_S[part], ends_s - time.monotonic())
        if limit_s < 1:
            _show({"part": part, "error": f"not begun: --budget {args.budget:g} s is over"})
        outcomes[part] = "not begun" if limit_s < 1 else run_part(part, options, limit_s)
        if outcomes[part] == "skipped":
            return 0
    _show({"parts": outcomes})
    return 0 if set(outcomes.values()) == {"ok"} else 1


def run_part(part: str, options: list[str], limit_s: float) -> str:
    """Run a part in a process of its own, which prints its findings here: "ok", "skipped" without a GPU, "failed", or
    "timed out" where its time was over before it ended."""
    command = [sys.executable, "-u", "-m", "tools.bench.gpu_parts", part, *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        printed, _ = process.communicate(timeout=limit_s)
        outcome = "ok" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        printed, outcome = _stopped(process), "timed out"
    print(printed, end="", flush=True)
    if outcome == "timed out":
        _show({"part": part, "error": f"not done after {limit_s:.0f} s"})
    elif process.returncode not in (0, 1):
        _show({"part": part, "error": f"its process ended with code {process.returncode}"})
    return "skipped" if printed.startswith('{"skipped"') else outcome


def _stopped(process: subprocess.Popen[str]) -> str:
    """End a process and those that it started; what it has printed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=STOP_S)[0]
        except subprocess.TimeoutExpired:
            continue
    return ""


def _show(finding: dict[str, object]) -> None:
    print(json.dumps(finding), flush=True)


if __name__ == "__main__":
    sys.exit(main())
