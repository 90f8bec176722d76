"""Measure the samples of a corpus for a curriculum: an index from the easiest to the hardest for each metric.

    python tools/analyze_data.py --data-path my_text_document --seq-length 1024 --split 969,30,1 \
        --metrics rarity,compression,mtld --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json \
        --merge-file merges.txt --workers 8 --output my_index

Give the --seq-length, --split and tokenizer of the training; the training then takes --curriculum-index my_index
--curriculum-metric rarity. A run that was ended goes on when the same command is given again. docs/data_efficiency.md
has the metrics, and the work is done in megatron3d/data/curriculum/analyze.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron3d.config.tool_parser import ToolParser, too_small
from megatron3d.data.curriculum.metrics import LOSS, METRICS, directory_name
from megatron3d.data.tiktoken_file import add_tiktoken_arguments, tiktoken_from_arguments
from megatron3d.data.tokenizer import TOKENIZER_TYPES, TokenizerSpec
from megatron3d.errors import ConfigError
from megatron3d.process.command import run_command
from megatron3d.storage.refusals import storage_errors

_BETWEEN_LINES_S = 2.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Measure the samples of a corpus for a curriculum.")
    p.add_argument("--data-path", required=True, metavar="P", help="prefix of the token files of one corpus")
    p.add_argument("--output", required=True, metavar="DIR", help="writes DIR/METRIC for each metric")
    names = ", ".join((*METRICS, LOSS))
    p.add_argument(
        "--metrics", required=True, metavar="A,B", help=f"some of {names}, or path/to/file.py:FUNCTION of your own"
    )
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes that measure (default 1)")
    samples = p.add_argument_group("samples, as in training")
    samples.add_argument("--seq-length", type=int, required=True, metavar="S")
    samples.add_argument("--split", default="969,30,1", metavar="SHARES")
    samples.add_argument("--bert", action="store_true", help="samples of a BERT, from a corpus of sentences")
    samples.add_argument("--seed", type=int, default=1234, metavar="N", help="of a BERT's samples")
    samples.add_argument("--place", type=int, default=0, metavar="N", help="of a BERT's corpus in --data-path, from 0")
    samples.add_argument("--short-seq-prob", type=float, default=0.1, metavar="P", help="of a BERT's samples")
    samples.add_argument("--bert-sentence-task", choices=("order", "next", "none"), default="order")
    tokenizer = p.add_argument_group("tokenizer, as in training")
    tokenizer.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES)
    tokenizer.add_argument("--vocab-file", metavar="FILE")
    tokenizer.add_argument("--merge-file", metavar="FILE")
    tokenizer.add_argument("--tokenizer-model", metavar="PATH")
    tokenizer.add_argument("--vocab-size", type=int, metavar="N", help="without a tokenizer, for rarity")
    add_tiktoken_arguments(tokenizer)
    model = p.add_argument_group(f"model, for the metric {LOSS}")
    model.add_argument("--load", metavar="DIR", help="directory of checkpoints, or one of them")
    model.add_argument("--ckpt-step", type=int, metavar="N", help="the checkpoint of this step")
    model.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return p


if __name__ == "__main__":
    parser().parse_args()  # --help and mistakes of spelling are answered before the imports below, which take seconds

from megatron3d.config.sections.data import DataConfig
from megatron3d.data.content import tokenizer_content
from megatron3d.data.curriculum.analyze import AnalyzeRequest, BertOptions, analyze
from megatron3d.inference.sample_loss import SampleLoss


def check(args: argparse.Namespace) -> None:
    """Raises: ConfigError with all that the options alone show to be impossible."""
    problems = too_small(
        (
            ("--workers", args.workers, 1),
            ("--seq-length", args.seq_length, 1),
            ("--seed", args.seed, 0),
            ("--place", args.place, 0),
            ("--vocab-size", args.vocab_size, 1),
        )
    )
    if not 0 <= args.short_seq_prob <= 1:
        problems.append(f"--short-seq-prob {args.short_seq_prob} is outside its range; it must be from 0 to 1.")
    if problems:
        raise ConfigError("\n".join(problems))


def run(args: argparse.Namespace) -> None:
    """Do what the arguments ask and print what was written."""
    check(args)
    spec, digest, vocab_size = _tokenizer(args)
    metrics = tuple(name for name in args.metrics.split(",") if name)
    losses = _losses(args, metrics)
    request = AnalyzeRequest(
        args.data_path,
        args.seq_length,
        args.split,
        metrics,
        spec,
        vocab_size,
        bert=BertOptions(args.short_seq_prob, _task(args.bert_sentence_task)) if args.bert else None,
        seed=args.seed,
        place=args.place,
        checkpoint=None if losses is None else str(losses.directory.resolve()),
    )
    output = Path(args.output)
    with storage_errors("write", output, way_out="choose another --output"):
        identity = analyze(
            request,
            output,
            workers=args.workers,
            tokenizer_digest=digest,
            losses=losses,
            report=ProgressLines(),
        )
    for name in metrics:
        print(f"wrote {output / directory_name(name)}: {identity.num_samples:,} samples by {name}")


def _task(word: str) -> str | None:
    return None if word == "none" else word


def _tokenizer(args: argparse.Namespace) -> tuple[TokenizerSpec | None, str | None, int | None]:
    """The tokenizer, the digest of its files, and the number of ids."""
    if args.tokenizer_type is None:
        return None, None, args.vocab_size
    spec = TokenizerSpec(
        args.tokenizer_type,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
        tokenizer_model=args.tokenizer_model,
        vocab_size=args.vocab_size,
        tiktoken=tiktoken_from_arguments(args),
    )
    vocab_size = spec.build().vocab_size
    data = DataConfig(
        tokenizer_type=args.tokenizer_type,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
        tokenizer_model=args.tokenizer_model,
        tiktoken_pattern=spec.tiktoken.pattern,
        tiktoken_num_special_tokens=spec.tiktoken.num_special_tokens,
        tiktoken_special_tokens=spec.tiktoken.special_tokens,
    )
    content = tokenizer_content(data, vocab_size=vocab_size)
    return spec, None if content is None else content.digest, vocab_size


def _losses(args: argparse.Namespace, metrics: Sequence[str]) -> SampleLoss | None:
    """The loss under the checkpoint, if it is a metric."""
    if LOSS not in metrics or args.load is None:
        return None
    return SampleLoss(args.load, step=args.ckpt_step, device=args.device, seq_length=args.seq_length)


class ProgressLines:
    """Prints how much is measured, how fast and the time left, but for the last line at most every two seconds."""

    def __init__(self) -> None:
        """Begin now, at nothing."""
        self._start_s = self._last_s = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, parts: int) -> None:
        """`done` of `parts` are there; those of an earlier start of the command do not count for the rate."""
        now_s = time.monotonic()
        if self._first is None:
            self._first = done - 1
        if done < parts and now_s - self._last_s < _BETWEEN_LINES_S:
            return
        self._last_s = now_s
        rate = (done - self._first) / max(now_s - self._start_s, 1e-9)
        left_s = (parts - done) / rate
        print(
            f"{done:,} of {parts:,} parts, {done / parts:.0%}, {rate:.1f} parts/s, {left_s:,.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
