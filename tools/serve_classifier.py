"""Serve an exported classifier on a CPU.

    python tools/serve_classifier.py --model sst2.onnx --port 8000
    curl -d '{"text": "worth two hours of my life"}' http://127.0.0.1:8000/classify

It needs onnxruntime, tokenizers, starlette and uvicorn, and no torch. See docs/serving.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron3d.config.tool_parser import ToolParser
from megatron3d.errors import ConfigError, Megatron3dError, install_extra
from megatron3d.serve.batcher import BatchOptions
from megatron3d.serve.classifier import open_classifier
from megatron3d.serve.requests import RequestLimits, Sample

try:
    from megatron3d.serve.app import Service
    from megatron3d.serve.server import ListenAddress, bind, serve
except ModuleNotFoundError as missing:
    if missing.name not in ("starlette", "uvicorn"):
        raise
    print(f"error: serving needs {missing.name}; run: {install_extra('serve')}", file=sys.stderr)
    raise SystemExit(ConfigError.exit_code) from None

_SHORTEST_BODY = 64  # bytes; less has no room for a text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    limits, batching = RequestLimits(), BatchOptions()
    p = ToolParser(description="Serve a classifier over HTTP on a CPU.")
    p.add_argument("--model", required=True, metavar="FILE", help="an ONNX file of tools/export_onnx.py")
    p.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone; there is no password")
    p.add_argument("--port", type=int, default=8000, help="default 8000; 0 is any free one")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="share one batch (default 0, all cores)")
    p.add_argument("--max-batch", type=int, default=batching.max_batch, metavar="N", help="texts answered together")
    p.add_argument(
        "--max-wait-ms", type=float, default=1e3 * batching.max_wait_s, metavar="X", help="for others to come"
    )
    p.add_argument("--max-waiting", type=int, default=batching.max_waiting, metavar="N", help="texts; more get a 503")
    p.add_argument(
        "--max-texts", type=int, default=limits.max_texts, metavar="N", help="of one request; more get a 413"
    )
    p.add_argument("--max-body-bytes", type=int, default=limits.max_body_bytes, metavar="N", help="more get a 413")
    p.add_argument("--truncate", action="store_true", help="cut texts that are too long instead of refusing them")
    p.add_argument("--log-interval", type=float, default=60.0, metavar="S", help="seconds (default 60; 0 is never)")
    return p


def check(args: argparse.Namespace) -> None:
    """Raises: ConfigError with everything that is wrong with the options."""
    lowest = {"threads": 0, "max_batch": 1, "max_wait_ms": 0, "max_waiting": 1, "max_texts": 1, "log_interval": 0}
    lowest |= {"max_body_bytes": _SHORTEST_BODY, "port": 0}
    problems = [
        f"--{name.replace('_', '-')} {vars(args)[name]:g} must be at least {least}"
        for name, least in lowest.items()
        if not vars(args)[name] >= least
    ]
    highest = {"port": 65535, "max_wait_ms": 1000}
    problems += [
        f"--{name.replace('_', '-')} {vars(args)[name]:g} must be at most {most}"
        for name, most in highest.items()
        if vars(args)[name] > most
    ]
    if args.max_waiting < args.max_texts:
        problems.append(f"--max-waiting {args.max_waiting} is less than --max-texts {args.max_texts} of one request")
    if problems:
        raise ConfigError("\n".join(problems))


def main() -> None:
    """Open the model, try it once, and serve.

    Raises:
        ConfigError: an option cannot be used, or the port is in use.
        DataError: the model is missing or damaged.
    """
    args = parser().parse_args()
    check(args)
    bound = bind(args.host, args.port)
    classifier = open_classifier(Path(args.model), threads=args.threads)
    sample = Sample("ready", None if classifier.description.num_texts != 2 else "ready")
    classifier.logits(classifier.encode([sample], truncate=True))
    service = Service(
        classifier,
        RequestLimits(args.max_body_bytes, args.max_texts, args.truncate),
        BatchOptions(args.max_batch, args.max_wait_ms / 1e3, args.max_waiting),
        log=log,
    )
    serve(service, bound, ListenAddress(args.host, args.port, args.log_interval), log=log)


def log(line: str) -> None:
    """A line of the log."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except Megatron3dError as error:
        log(f"error: {error}")
        sys.exit(error.exit_code)
