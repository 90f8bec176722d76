"""Go on from a prompt with a trained GPT.

    python tools/generate_text.py --load CHECKPOINTS --prompt "import " --max-new-tokens 64 --greedy
    torchrun --standalone --nproc-per-node 4 tools/generate_text.py --load CHECKPOINTS --prompts-file prompts.txt \
        --json --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --temperature 0.8 --top-p 0.95

The model's shape and its tokenizer are those of `run.json` in the checkpoint; any layout reads any checkpoint. The
prompts are divided among the data-parallel replicas, unless these share experts. See docs/generation.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron3d.config.tokenizer_copy import TOKENIZER_FOLDER, beside_checkpoint
from megatron3d.config.tool_parser import ToolParser
from megatron3d.data.tiktoken_file import tiktoken_options
from megatron3d.data.tokenizer import TOKENIZER_TYPES, TokenizerSpec
from megatron3d.data.tokenizer_interface import Tokenizer
from megatron3d.errors import ConfigError, DataError
from megatron3d.files.text import TextError, read_lines


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Go on from a prompt with a trained GPT.")
    p.add_argument("--load", required=True, metavar="DIR", help="directory of checkpoints, or one of them")
    p.add_argument("--ckpt-step", type=int, metavar="N", help="the checkpoint of this step (default the latest)")
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    p.add_argument("--prompts-file", metavar="FILE", help="a text file with one prompt a line; empty lines are skipped")
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts worked on at once (default 16)")
    p.add_argument("--json", action="store_true", help="one JSON object a line and prompt, with the token ids")
    _add_sampling(p.add_argument_group("which token comes next"))
    _add_tokenizer(p.add_argument_group("tokenizer, where it is not as or where run.json says"))
    p.add_argument(
        "--architecture",
        metavar="FILE.py:NAME",
        help="the checkpoint's architecture, where it is code of your own",
    )
    run = p.add_argument_group("where it runs")
    run.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="ranks that share a layer")
    run.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="ranks that share depth")
    run.add_argument(
        "--expert-model-parallel-size", type=int, default=1, metavar="N", help="ranks that hold different experts"
    )
    run.add_argument(
        "--context-parallel-size", type=int, default=1, metavar="N", help="ranks that read each prompt together"
    )
    run.add_argument(
        "--max-position-embeddings",
        type=int,
        metavar="N",
        help="let rotary positions go on to N, at which the model may not have been trained",
    )
    run.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is one, else cpu")
    run.add_argument("--bf16", action="store_true", help="compute in bf16 (default fp32, whatever trained it)")
    run.add_argument(
        "--no-kv-cache", action="store_true", help="read everything again for each token: slow, to compare"
    )
    return p


def _add_sampling(group: Any) -> None:
    group.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="stop after these (default 64)")
    group.add_argument("--greedy", action="store_true", help="always the most probable token")
    group.add_argument("--temperature", type=float, metavar="X", help="below 1 is safer, above 1 bolder (default 1)")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens (default all)")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the tokens that make up P (default 1)")
    group.add_argument("--seed", type=int, default=1234, metavar="N", help="of the draws (default 1234)")
    group.add_argument("--ignore-eod", action="store_true", help="go on after the end of a document")


def _add_tokenizer(group: Any) -> None:
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES)
    group.add_argument("--vocab-file", metavar="FILE")
    group.add_argument("--merge-file", metavar="FILE")
    group.add_argument("--tokenizer-model", metavar="PATH")
    group.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="begin each prompt with the token that begins texts (default as the tokenizer's description says)",
    )
    group.add_argument(
        "--override-tokenizer", action="store_true", help="use files with other content than the model was trained with"
    )


if __name__ == "__main__":
    parser().parse_args()  # --help and mistakes of spelling are answered before the imports below, which take seconds

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.comm.agree import digest_of
from megatron3d.config.architectures import named
from megatron3d.config.run import RunConfig
from megatron3d.config.sections.parallel import GivenParallel
from megatron3d.convert.tokenizer_choice import with_given
from megatron3d.data.content import code_content, code_differences, require_same_tokenizer
from megatron3d.data.hf_description import end_token_ids
from megatron3d.inference.generate import generate, new_token_limits, position_limit
from megatron3d.inference.load import generation_config, load_model
from megatron3d.inference.sampling import SamplingOptions
from megatron3d.train.compare import SavedRun, read_saved_run
from megatron3d.train.joining import joined
from megatron3d.train.launch import RunContext, run_main


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer, the ids before each prompt, the end of a document, and all ids that end a text."""

    tokenizer: Tokenizer
    prefix: tuple[int, ...]
    eod: int | None
    ends: frozenset[int]


@dataclass(frozen=True)
class Job:
    """What is asked for, settled before a device is touched: the run, the tokenizer, the prompts."""

    directory: Path
    config: RunConfig
    vocabulary: Vocabulary
    prompts: tuple[str, ...]
    prompt_ids: tuple[list[int], ...]
    options: SamplingOptions
    notes: tuple[str, ...]

    def files(self) -> dict[str, str]:
        """Digests of what was read, which all ranks must have alike."""
        return {
            "the prompts": digest_of(self.prompt_ids),
            "the sampling options": str(self.options),
            "the tokens that end a text": str(sorted(self.vocabulary.ends)),
        }

    def text_of(self, ids: Sequence[int], new: Sequence[int]) -> str:
        """A prompt and what follows it, without what the tokenizer put before the prompt and without the end."""
        tokens = [*ids[len(self.vocabulary.prefix) :], *(new[:-1] if self.is_ended(new) else new)]
        return self.vocabulary.tokenizer.decode(tokens)

    def is_ended(self, new: Sequence[int]) -> bool:
        """Whether a text ended with a token that ends texts."""
        return not self.options.ignore_eod and new[-1] in self.vocabulary.ends


def settle(args: argparse.Namespace, world_size: int) -> Job:
    """Read everything but the weights, and find what is wrong.

    Raises:
        ConfigError, DataError, CheckpointError: an option, a file or the checkpoint cannot be used.
    """
    options = sampling_options(args)
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size} generates nothing; use at least 1")
    if args.no_kv_cache and args.context_parallel_size > 1:
        raise ConfigError(
            "--no-kv-cache reads whole sequences for each token, which --context-parallel-size "
            f"{args.context_parallel_size} does not cut; leave out one of the two"
        )
    prompts = read_prompts(args.prompt, args.prompts_file)
    directory = find_checkpoint(Path(args.load), args.ckpt_step)
    saved = read_saved_run(directory, architecture=args.architecture)
    stored = saved.config
    parallel = GivenParallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        device=args.device,
    )
    if not stored.model.is_causal:
        raise ConfigError(
            f"--load {args.load} holds {named(stored.model.architecture)}, which predicts masked tokens and goes on "
            "with no text; give the checkpoint of a GPT."
        )
    config = generation_config(
        _with_positions(stored, args.max_position_embeddings), parallel, world_size=world_size, bf16=args.bf16
    )
    vocabulary = open_vocabulary(args, config, saved)
    ids = tuple(_encode(prompt, vocabulary) for prompt in prompts)
    new_token_limits(ids, config.model, options)
    changed = (
        [] if saved.content is None else code_differences(saved.content.code, code_content(config.model.architecture))
    )
    return Job(directory, config, vocabulary, prompts, ids, options, notes=tuple(f"changed: {one}" for one in changed))


def _with_positions(stored: RunConfig, wanted: int | None) -> RunConfig:
    """The run with as many positions as are wanted. Raises: ConfigError where they are rows of a table."""
    if wanted is None:
        return stored
    if stored.model.position_embedding_type != "rope":
        raise ConfigError(
            f"--max-position-embeddings {wanted} is about rotary positions, and those of the model are "
            f"{stored.model.position_embedding_type}; leave it out"
        )
    length = min(wanted, stored.model.seq_length)
    return replace(stored, model=replace(stored.model, seq_length=length, max_position_embeddings=wanted))


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """How tokens are chosen. Raises: ConfigError for values out of range, or --greedy with options of drawing."""
    drawing = {"--temperature": args.temperature, "--top-k": args.top_k, "--top-p": args.top_p}
    given = [f"{flag} {value:g}" for flag, value in drawing.items() if value is not None]
    if args.greedy and given:
        raise ConfigError(
            f"--greedy draws nothing, so {' and '.join(given)} would have no effect; give one or the other"
        )
    return SamplingOptions(
        max_new_tokens=args.max_new_tokens,
        greedy=args.greedy,
        temperature=1.0 if args.temperature is None else args.temperature,
        top_k=args.top_k or 0,
        top_p=1.0 if args.top_p is None else args.top_p,
        seed=args.seed,
        ignore_eod=args.ignore_eod,
    )


def read_prompts(given: Sequence[str], file: str | None) -> tuple[str, ...]:
    """The prompts of the command line, then those of the file. Raises: ConfigError if there are none, DataError."""
    prompts = list(given)
    if file is not None:
        try:
            lines = read_lines(Path(file))
        except (OSError, TextError) as error:
            raise DataError(f"--prompts-file {file} cannot be read ({error}); name a text file") from error
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        source = f"--prompts-file {file} has only empty lines" if file else "no prompt is given"
        raise ConfigError(f"{source}; use --prompt TEXT, or --prompts-file FILE with one prompt a line")
    return tuple(prompts)


def open_vocabulary(args: argparse.Namespace, config: RunConfig, saved: SavedRun) -> Vocabulary:
    """The tokenizer of the run, with the files that the options name instead of its own, and the end of a document.

    Raises:
        ConfigError: none is known, it has more ids than the model, or other content than the model was trained with.
        DataError: a file of it is missing or damaged; the sentence names the option.
    """
    data, vocab_size, directory = config.data, config.model.vocab_size, saved.directory
    data = with_given(beside_checkpoint(data, directory), vars(args))
    if data.tokenizer_type is None:
        raise ConfigError(
            f"{directory / 'run.json'} names no tokenizer; name it with --tokenizer-type and its files (NullTokenizer "
            "takes token ids as numbers)"
        )
    files = (data.vocab_file, data.merge_file, data.tokenizer_model)
    tokenizer = TokenizerSpec(
        data.tokenizer_type, *files, vocab_size=vocab_size, tiktoken=tiktoken_options(data)
    ).build()
    if data.tokenizer_type == "NullTokenizer":  # Made for all ids of the model, it would count its own end beyond them.
        _refuse_bos(args, "NullTokenizer")
        named = end_token_ids(directory.parent / TOKENIZER_FOLDER)
        return Vocabulary(tokenizer, (), data.eod_token, _ends(data.eod_token, named))
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"--tokenizer-type {data.tokenizer_type} has {tokenizer.vocab_size} ids, but the model of {directory} has "
            f"{vocab_size}; give the tokenizer it was trained with"
        )
    if not args.override_tokenizer:
        require_same_tokenizer(saved.content, data, vocab_size, source=directory)
    prefix = tokenizer.prefix
    if tokenizer.bos is None:
        _refuse_bos(args, data.tokenizer_type)
    elif args.prepend_bos:
        prefix = (tokenizer.bos,)
    if args.prepend_bos is False:
        prefix = ()
    eod = tokenizer.eod if data.eod_token is None else data.eod_token
    return Vocabulary(tokenizer, prefix, eod, _ends(eod, tokenizer.ends))


def _ends(eod: int | None, named: Sequence[int]) -> frozenset[int]:
    return frozenset(named) | (frozenset() if eod is None else {eod})


def _refuse_bos(args: argparse.Namespace, kind: str) -> None:
    if args.prepend_bos:
        raise ConfigError(f"--prepend-bos: the {kind} of this model has no token that begins texts; leave it out")


def _encode(prompt: str, vocabulary: Vocabulary) -> list[int]:
    """Ids of a prompt; an empty one starts where documents start, after the end of the one before."""
    ids = [*vocabulary.prefix, *vocabulary.tokenizer.encode(prompt)]
    return [vocabulary.eod] if not ids and vocabulary.eod is not None else ids


def results(job: Job, new_ids: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """What `--json` prints of each prompt."""
    return [
        {
            "prompt": prompt,
            "prompt_ids": list(ids),
            "token_ids": list(new),
            "text": job.text_of(ids, new),
            "stopped_by": stop_reason(new, job),
        }
        for prompt, ids, new in zip(job.prompts, job.prompt_ids, new_ids, strict=True)
    ]


def stop_reason(new: Sequence[int], job: Job) -> str:
    """Why a text ends where it does."""
    if job.is_ended(new):
        return "end of document"
    return "--max-new-tokens" if len(new) == job.options.max_new_tokens else "--max-position-embeddings"


def report(job: Job, new_ids: Sequence[Sequence[int]], *, as_json: bool, elapsed_s: float) -> None:
    """Print the texts to standard output, and how it went to standard error."""
    found = results(job, new_ids)
    if as_json:
        for one in found:
            print(json.dumps(one, ensure_ascii=False))
    else:
        print("\n\n".join(one["text"] for one in found))
    for number, one in enumerate(found):
        if one["stopped_by"] == "--max-position-embeddings":
            print(
                f"prompt {number} stopped after {len(one['token_ids'])} of {job.options.max_new_tokens} new tokens: "
                f"--max-position-embeddings of the model is {position_limit(job.config.model)}",
                file=sys.stderr,
            )
    num_new = sum(map(len, new_ids))
    print(f"{num_new} new tokens in {elapsed_s:.2f} s, {num_new / elapsed_s:.1f} tokens/s", file=sys.stderr)


def main(context: RunContext) -> None:
    """Settle what is asked for, load the weights, generate, print."""
    args = parser().parse_args()
    job = settle(args, context.launch.world_size)
    with joined(job.config, context, save=None, files=job.files()) as (mesh, device):
        if mesh.rank == 0:
            print(*job.notes, sep="\n", end="\n" if job.notes else "", file=sys.stderr)
        model = load_model(job.config, mesh, device, job.directory)
        began_s = time.monotonic()
        new_ids = generate(
            model,
            job.config,
            job.prompt_ids,
            job.options,
            job.vocabulary.ends,
            batch_size=args.batch_size,
            use_cache=not args.no_kv_cache,
        )
        if mesh.rank == 0:
            report(job, new_ids, as_json=args.json, elapsed_s=time.monotonic() - began_s)


if __name__ == "__main__":
    run_main(main)
