"""Texts to vectors with a BERT, one row a text.

    python tools/embed_text.py --hf all-MiniLM-L6-v2 --normalize --input sentences.txt --output vectors.npy
    python tools/embed_text.py --load CHECKPOINTS --vocab-file vocab.txt --pooling cls \
        --text "A sentence." "Another one." --output vectors.jsonl

The weights come from a checkpoint of any layout (`--load`) or straight from a Hugging Face directory (`--hf`). Under
torchrun, data-parallel replicas read different texts. See docs/huggingface.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron3d.config.tokenizer_copy import beside_checkpoint
from megatron3d.config.tool_parser import ToolParser
from megatron3d.data.tokenizer import TOKENIZER_TYPES, Tokenizer, TokenizerSpec
from megatron3d.errors import ConfigError, DataError
from megatron3d.storage.atomic import atomic_path
from megatron3d.storage.refusals import storage_errors

POOLING_NAMES = ("mean", "cls", "pooler")  # as in inference.embed, which imports torch


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Texts to vectors with a BERT.")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--load", metavar="DIR", help="directory of checkpoints, or one of them")
    source.add_argument("--hf", metavar="DIR", help="a Hugging Face directory: config.json, weights, tokenizer")
    p.add_argument("--ckpt-step", type=int, metavar="N", help="with --load: the checkpoint of this step")
    p.add_argument(
        "--input", nargs="+", default=[], metavar="FILE|TEXT", help="files with one text a line, or texts of more words"
    )
    p.add_argument("--text", nargs="+", default=[], metavar="TEXT", help="texts as they stand, whatever they look like")
    p.add_argument("--output", required=True, metavar="FILE", help="F.npy: fp32 [texts, hidden]; F.jsonl: one a line")
    how = p.add_argument_group("how a text becomes a vector")
    how.add_argument("--pooling", choices=POOLING_NAMES, default="mean", help="mean of all (default), or of [CLS]")
    how.add_argument("--normalize", action="store_true", help="scale vectors to length 1: products are cosines")
    how.add_argument("--max-length", type=int, metavar="N", help="tokens of a text, [CLS] and [SEP] included; longer")
    how.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="tokens worked on at once")
    tokenizer = p.add_argument_group("tokenizer, where it is not as or where run.json says")
    tokenizer.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES)
    tokenizer.add_argument("--vocab-file", metavar="FILE")
    tokenizer.add_argument("--tokenizer-model", metavar="PATH")
    tokenizer.add_argument(
        "--override-tokenizer", action="store_true", help="use files with other content than the model was trained with"
    )
    run = p.add_argument_group("where it runs")
    run.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="ranks that share a layer")
    run.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="ranks that share depth")
    run.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is one, else cpu")
    run.add_argument("--bf16", action="store_true", help="compute in bf16 (default fp32)")
    return p


if __name__ == "__main__":
    parser().parse_args()  # --help and mistakes of spelling are answered before the imports below, which take seconds

import numpy as np
from torch import Tensor

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.load import tensor_shapes
from megatron3d.comm.agree import digest_of
from megatron3d.config.architectures import named
from megatron3d.config.placeholders import untrained_run
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.parallel import GivenParallel
from megatron3d.convert.hf import digest_of_tensors, read_model
from megatron3d.convert.tokenizer_choice import with_given
from megatron3d.data.content import require_same_tokenizer
from megatron3d.files.text import TextError, read_lines
from megatron3d.inference.embed import EmbedOptions, embed, load_encoder
from megatron3d.inference.load import generation_config
from megatron3d.models.zoo import architecture_of
from megatron3d.train.compare import SavedRun, read_saved_run
from megatron3d.train.joining import joined
from megatron3d.train.launch import RunContext, run_main

_FORMATS = (".npy", ".jsonl")


@dataclass(frozen=True)
class Job:
    """What is asked for, settled before a device is touched."""

    config: RunConfig
    weights: Path | Mapping[str, Tensor]
    texts: tuple[str, ...]
    ids: tuple[list[int], ...]
    num_cut: int
    options: EmbedOptions
    output: Path

    def files(self) -> dict[str, str]:
        """Digests of what was read, which all ranks must have alike."""
        found = {"the texts": digest_of(self.ids), "the options of embedding": str(self.options)}
        return found if isinstance(self.weights, Path) else {**found, "the weights": digest_of_tensors(self.weights)}


def settle(args: argparse.Namespace, world_size: int) -> Job:
    """Read everything but a checkpoint's weights, and find what is wrong.

    Raises:
        ConfigError, DataError, CheckpointError: an option, a file or the model cannot be used.
    """
    output = Path(args.output)
    if output.suffix not in _FORMATS:
        raise ConfigError(
            f"--output {output} ends in '{output.suffix}'; give a file that ends in {' or '.join(_FORMATS)}"
        )
    if args.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {args.batch_tokens} leaves nothing to work on; use at least 1")
    texts = read_texts(args.input, args.text)
    saved, weights, names = open_source(args)
    stored = saved.config
    if architecture_of(stored.model).build_encoder is None:
        raise ConfigError(f"{args.load or args.hf} holds {named(stored.model.architecture)}; vectors come from a BERT")
    if args.pooling == "pooler" and "head.pooler.weight" not in names:
        raise ConfigError(f"--pooling pooler: {args.load or args.hf} has no pooler; use --pooling mean or cls")
    parallel = GivenParallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        device=args.device,
    )
    config = generation_config(stored, parallel, world_size=world_size, bf16=args.bf16)
    tokenizer = open_tokenizer(args, config, saved)
    length = length_limit(args.max_length, config)
    ids = tokenizer.encode_batch(texts)
    num_cut = sum(len(one) > length - 2 for one in ids)
    cls, sep = tokenizer.cls, tokenizer.sep
    assert cls is not None and sep is not None, "open_tokenizer returns one that has both"
    framed = tuple([cls, *one[: length - 2], sep] for one in ids)
    options = EmbedOptions(args.pooling, args.normalize, args.batch_tokens, pad=tokenizer.pad or 0)
    return Job(config, weights, tuple(texts), framed, num_cut, options, output)


def open_source(args: argparse.Namespace) -> tuple[SavedRun, Path | Mapping[str, Tensor], frozenset[str]]:
    """The run that a model belongs to, its weights, and their names."""
    if args.hf is not None:
        found = read_model(Path(args.hf), with_tokenizer=args.tokenizer_type is None)
        run = SavedRun(found.directory, untrained_run(found.model, found.data), None)
        return run, found.tensors, frozenset(found.tensors)
    directory = find_checkpoint(Path(args.load), args.ckpt_step)
    names = frozenset(name.removeprefix("model/") for name in tensor_shapes(directory))
    saved = read_saved_run(directory)
    config = replace(saved.config, data=beside_checkpoint(saved.config.data, directory))
    return replace(saved, config=config), directory, names


def read_texts(inputs: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The lines of the files and the texts, in the order given.

    Raises:
        ConfigError: there is none.
        DataError: a file cannot be read or has an empty line.
    """
    found: list[str] = []
    for word in inputs:
        if Path(word).is_file():
            found += _lines(Path(word))
        elif len(word.split()) > 1:
            found.append(word)
        else:
            raise DataError(
                f"--input {word} is no file; give the path of one, or a text of one word with --text {word}"
            )
    found += texts
    if not found:
        raise ConfigError("no text is given; use --input FILE with one text a line, or --text TEXT")
    return found


def _lines(path: Path) -> list[str]:
    try:
        lines = read_lines(path)
    except (OSError, TextError) as error:
        raise DataError(f"--input {path} cannot be read ({error}); name a text file") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"--input {path} line {number} is empty; remove it, or every row after it would be off")
    return lines


def open_tokenizer(args: argparse.Namespace, config: RunConfig, saved: SavedRun) -> Tokenizer:
    """The model's tokenizer, with the files that the options name instead of its own.

    Raises:
        ConfigError: none is known, it has no [CLS] and [SEP], more ids than the model, or other content than the one
            that the model was trained with.
    """
    given = {name: vars(args)[name] for name in ("tokenizer_type", "vocab_file", "tokenizer_model")}
    data = with_given(config.data, given)
    kind = data.tokenizer_type
    if kind is None:
        raise ConfigError(
            f"{args.load or args.hf} names no tokenizer; give its word pieces with --vocab-file vocab.txt"
        )
    vocab_size = config.model.vocab_size
    tokenizer = TokenizerSpec(kind, data.vocab_file, data.merge_file, data.tokenizer_model, vocab_size).build()
    if tokenizer.cls is None or tokenizer.sep is None:
        raise ConfigError(f"--tokenizer-type {kind} has no [CLS] and [SEP], between which a BERT reads; give a BERT's")
    if tokenizer.vocab_size > vocab_size:
        file = data.vocab_file or data.tokenizer_model
        raise ConfigError(
            f"{file} has {tokenizer.vocab_size} tokens, but the model of {args.load or args.hf} has {vocab_size}; give "
            "the vocabulary it was trained with"
        )
    if not args.override_tokenizer:
        require_same_tokenizer(saved.content, data, vocab_size, source=saved.directory)
    return tokenizer


def length_limit(wanted: int | None, config: RunConfig) -> int:
    """Tokens that a text may have. Raises: ConfigError if that is less than three, or more than the positions."""
    ends = config.model.position_embedding_type != "none"
    positions = config.model.max_position_embeddings
    length = positions if wanted is None else wanted
    if length < 3:
        raise ConfigError(f"--max-length {length} leaves no room between [CLS] and [SEP]; use at least 3")
    if ends and length > positions:
        raise ConfigError(
            f"--max-length {length} is longer than the {positions} positions of the model; use {positions}"
        )
    return length


def write(job: Job, vectors_NH: Tensor) -> None:
    """Write the vectors to a temporary name and rename. Raises: StorageError if the file system refuses."""
    with (
        storage_errors("write --output", job.output, way_out="name another file"),
        atomic_path(job.output) as temporary,
        open(temporary, "wb") as file,
    ):
        if job.output.suffix == ".npy":
            np.save(file, vectors_NH.numpy())
        else:
            for text, vector_H in zip(job.texts, vectors_NH.tolist(), strict=True):
                file.write((json.dumps({"text": text, "embedding": vector_H}, ensure_ascii=False) + "\n").encode())


def main(context: RunContext) -> None:
    """Settle what is asked for, load the encoder, embed, write."""
    args = parser().parse_args()
    job = settle(args, context.launch.world_size)
    with joined(job.config, context, save=None, files=job.files()) as (mesh, device):
        model = load_encoder(job.config, mesh, device, job.weights, pooling=job.options.pooling)
        began_s = time.monotonic()
        vectors_NH = embed(model, job.config, job.ids, job.options)
        if mesh.rank == 0:
            elapsed_s = time.monotonic() - began_s
            write(job, vectors_NH)
            rate, size = len(job.texts) / max(elapsed_s, 1e-9), vectors_NH.shape[1]
            cut = f"; {job.num_cut} were cut to {max(map(len, job.ids))} tokens" if job.num_cut else ""
            print(
                f"{len(job.texts)} texts of {size} numbers in {elapsed_s:.2f} s, {rate:.1f} texts/s{cut}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    run_main(main)
