"""Options that `gpu_check.py` hands on to its parts; free of torch."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, for a CPU")
    parser.add_argument("--steps", type=int, default=4, help="steps of a timing, of which the first warms up")
    parser.add_argument("--out", type=Path, default=Path("out/gpu_check"), help="directory of the profiles")
