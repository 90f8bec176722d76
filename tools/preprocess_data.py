"""Make token files for training from text: the command line of Megatron-LM's tool of this name.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix my \
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --append-eod --workers 8

writes my_text_document.bin and my_text_document.idx; with --split-sentences, which BERT needs, my_text_sentence.bin
and .idx. The work is done in megatron3d/data/prepare/preprocess.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron3d.comm.launch import limit_tokenizers_to_one_thread
from megatron3d.config.tool_parser import ToolParser
from megatron3d.data.prepare.encode import EncodeRequest, SentenceSplitting
from megatron3d.data.prepare.encoder import Encoder
from megatron3d.data.prepare.executors import EXECUTORS, Processes, Ray
from megatron3d.data.prepare.inputs import INPUT_HELP, check_json_keys, find_inputs
from megatron3d.data.prepare.output import DEFAULT_CHECKPOINT_S
from megatron3d.data.prepare.preprocess import PreprocessProgress, RunOptions, output_prefix, preprocess, rejects_path
from megatron3d.data.prepare.rejects import add_bad_record_arguments, limits_from_arguments
from megatron3d.data.prepare.shard import Shard, parse_shard
from megatron3d.data.tiktoken_file import add_tiktoken_arguments, tiktoken_from_arguments
from megatron3d.data.tokenizer import TOKENIZER_TYPES, TokenizerSpec
from megatron3d.errors import ConfigError
from megatron3d.process.command import run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Make token files from text.")
    data = p.add_argument_group("input and output")
    data.add_argument("--input", nargs="+", required=True, metavar="FILE", help=INPUT_HELP)
    data.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys to read, a.b for b inside a (default text)",
    )
    data.add_argument("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.bin, .idx")
    data.add_argument("--dataset-impl", choices=["mmap"], help="accepted; the format is always the mapped one")
    add_bad_record_arguments(p.add_argument_group("bad records, which P_rejects.jsonl lists"))
    tokenizer = p.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES, help="kind of tokenizer")
    tokenizer.add_argument("--vocab-file", metavar="FILE", help="vocab.json of GPT-2 or vocab.txt of BERT")
    tokenizer.add_argument("--merge-file", metavar="FILE", help="merges.txt of GPT-2")
    tokenizer.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="sentencepiece model, or a Hugging Face directory or its tokenizer.json",
    )
    tokenizer.add_argument("--vocab-size", type=int, metavar="N", help="of the NullTokenizer (786) or TikTokenizer")
    add_tiktoken_arguments(tokenizer)
    tokenizer.add_argument("--append-eod", action="store_true", help="end each document with the tokenizer's token")
    tokenizer.add_argument(
        "--tokenizer-hf-include-special-tokens",
        action="store_true",
        help="put before and behind each text what the HuggingFaceTokenizer's description says, such as a begin token",
    )
    sentences = p.add_argument_group("sentences")
    sentences.add_argument("--split-sentences", action="store_true", help="a sequence for each sentence (BERT)")
    sentences.add_argument("--keep-newlines", action="store_true", help="keep line ends at the end of sentences")
    sentences.add_argument("--lang", default="english", metavar="L", help="language of the sentences")
    work = p.add_argument_group("work")
    work.add_argument("--workers", type=int, default=1, metavar="N", help="processes that encode (default 1)")
    work.add_argument(
        "--encoder",
        choices=[str(encoder) for encoder in Encoder],
        default=str(Encoder.AUTO),
        help="library that finds the ids, which are the same by each: auto takes gigatoken where it is installed and "
        "gives the ids of the tokenizer's own library (reference) for a sample of the input and for hostile texts",
    )
    _add_run_arguments(p)
    work.add_argument("--partitions", type=int, default=1, metavar="N", help="accepted; see the note it prints")
    work.add_argument("--keep-sequential-samples", action="store_true", help="accepted; the order is always kept")
    work.add_argument("--log-interval", type=int, default=1000, metavar="N", help="documents between progress lines")
    return p


def _add_run_arguments(p: argparse.ArgumentParser) -> None:
    """Which part of the work is done, where, and from where on."""
    run = p.add_argument_group("machines and interruption")
    run.add_argument("--executor", choices=EXECUTORS, default="processes", help="what runs the encoders")
    run.add_argument("--ray-address", metavar="A", help="a Ray cluster, such as auto (default: one is started here)")
    run.add_argument("--shard", metavar="I/N", help="do part I of N, counted from 0; merge_datasets.py --shards joins")
    run.add_argument("--resume", action="store_true", help="go on from what a run that was ended has written")
    run.add_argument(
        "--checkpoint-interval",
        type=float,
        default=DEFAULT_CHECKPOINT_S,
        metavar="S",
        help=f"seconds of work that a killed run can lose (default {DEFAULT_CHECKPOINT_S:g})",
    )


class ProgressLines:
    """Prints a line to the error stream when another `interval` documents are done."""

    def __init__(self, interval: int) -> None:
        """Begin at no documents."""
        self._interval, self._next = interval, interval

    def __call__(self, progress: PreprocessProgress) -> None:
        """Print what is done, how fast, and the time left."""
        if progress.num_documents < self._next:
            return
        self._next = (progress.num_documents // self._interval + 1) * self._interval
        parts = [f"{progress.num_documents:,} documents"]
        if progress.input_share is not None:
            parts.append(f"{progress.input_share:.1%} of the input")
        parts += [f"{progress.documents_per_s:,.0f} docs/s", f"{progress.megabytes_per_s:.2f} MB/s"]
        if progress.left_s is not None:
            parts.append(f"{progress.left_s:,.0f} s left")
        print(", ".join(parts), file=sys.stderr, flush=True)


def check(args: argparse.Namespace) -> None:
    """Raises: ConfigError for what the options alone show to be impossible."""
    check_json_keys(args.json_keys)
    for flag, value in (
        ("--workers", args.workers),
        ("--partitions", args.partitions),
        ("--log-interval", args.log_interval),
    ):
        if value < 1:
            raise ConfigError(f"{flag} {value} is not at least 1.")
    if not args.checkpoint_interval >= 0:
        raise ConfigError(f"--checkpoint-interval {args.checkpoint_interval:g} is not a number of seconds from 0 up.")
    if args.ray_address is not None and args.executor != "ray":
        raise ConfigError(f"--ray-address {args.ray_address} needs --executor ray.")
    if args.tokenizer_hf_include_special_tokens and args.tokenizer_type != "HuggingFaceTokenizer":
        raise ConfigError(
            f"--tokenizer-hf-include-special-tokens: a {args.tokenizer_type} puts nothing around a text; leave it out, "
            "or use --tokenizer-type HuggingFaceTokenizer with a directory that describes the tokenizer."
        )
    if args.partitions > 1:
        print(
            f"--partitions {args.partitions}: nothing is partitioned, the input is streamed and never held in memory; "
            f"--workers {args.workers} processes encode it in order.",
            file=sys.stderr,
        )


def run(args: argparse.Namespace) -> None:
    """Do what the arguments ask and print what was written."""
    check(args)
    limits = limits_from_arguments(args)
    limit_tokenizers_to_one_thread()
    spec = TokenizerSpec(
        args.tokenizer_type,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
        tokenizer_model=args.tokenizer_model,
        vocab_size=786 if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None else args.vocab_size,
        tiktoken=tiktoken_from_arguments(args),
    )
    splitting = SentenceSplitting(args.lang, args.keep_newlines) if args.split_sentences else None
    request = EncodeRequest(
        spec,
        tuple(dict.fromkeys(args.json_keys)),
        args.append_eod,
        splitting,
        args.tokenizer_hf_include_special_tokens,
        Encoder(args.encoder),
    )
    options = RunOptions(
        Ray(args.workers, args.ray_address) if args.executor == "ray" else Processes(args.workers),
        parse_shard(args.shard) if args.shard is not None else Shard(),
        args.resume,
        args.checkpoint_interval,
        limits,
    )
    done = preprocess(
        find_inputs(args.input, note=note),
        args.output_prefix,
        request=request,
        options=options,
        report=ProgressLines(args.log_interval),
        note=note,
    )
    targets = [
        output_prefix(args.output_prefix, key, split_sentences=args.split_sentences, shard=options.shard)
        for key in request.json_keys
    ]
    if done is None:
        print(
            f"--resume: {' and '.join(targets)} are complete, made with the same options and input; there is nothing "
            "to do. Without --resume they are made again."
        )
        return
    for target in targets:
        print(f"wrote {target}.bin and .idx")
    if options.shard.count > 1:
        for target in targets:
            name = target.removesuffix(options.shard.suffix)
            print(f"when all are there: python tools/merge_datasets.py --shards {name} --output-prefix {name}")
    if done.rejected:
        print(f"{done.rejected}; they are listed in {rejects_path(args.output_prefix, options.shard)}")
    sentences = f", {done.num_sequences:,} sentences" if args.split_sentences else ""
    empty = f" ({done.num_empty:,} texts without a token)" if done.num_empty else ""
    print(
        f"{done.num_documents:,} documents{empty}{sentences}, {done.num_tokens:,} tokens in {done.elapsed_s:.1f} s: "
        f"{done.documents_per_s:,.0f} docs/s, {done.megabytes_per_s:.2f} MB/s"
    )


def note(line: str) -> None:
    """A line for people, beside what is printed as the result."""
    print(line, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = parser().parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
