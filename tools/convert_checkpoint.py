"""Models from Hugging Face's directories into checkpoints, checkpoints into such directories, and dense models into
mixtures of experts.

    python tools/convert_checkpoint.py hf-import --hf bert-base-uncased --save CHECKPOINTS
    python tools/convert_checkpoint.py hf-export --load CHECKPOINTS --hf NEW_DIRECTORY
    python tools/convert_checkpoint.py upcycle --load CHECKPOINTS --save NEW_CHECKPOINTS --num-experts 8

Kinds of Hugging Face models: see docs/huggingface.md; upcycling: docs/moe.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron3d.config.options import BY_NAME
from megatron3d.config.tool_parser import ToolParser

DTYPE_NAMES = ("float32", "bfloat16", "float16")  # as in convert.export, which imports torch
EXPERT_OPTIONS = (  # those that decide what a mixture of experts computes of a token
    *("num_experts", "moe_layer_freq", "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor", "moe_router_dtype"),
    "moe_router_enable_expert_bias",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Between Hugging Face's directories and checkpoints, and dense models into experts.")
    kinds = p.add_subparsers(dest="action", required=True)
    take = kinds.add_parser("hf-import", help="a Hugging Face directory into a checkpoint", allow_abbrev=False)
    take.add_argument("--hf", required=True, metavar="DIR", help="config.json, weights and tokenizer")
    take.add_argument("--save", required=True, metavar="DIR", help="where the checkpoint goes; holds none yet")
    take.add_argument(
        "--new-heads", action="store_true", help="give the heads of training that DIR lacks random weights"
    )
    take.add_argument("--no-tokenizer", action="store_true", help="take the weights alone, whatever tokenizer DIR has")
    take.add_argument("--seed", type=int, default=1234, metavar="N", help="of the random weights (default 1234)")
    give = kinds.add_parser("hf-export", help="a checkpoint into a Hugging Face directory", allow_abbrev=False)
    give.add_argument("--load", required=True, metavar="DIR", help="directory of checkpoints, or one of them")
    give.add_argument("--ckpt-step", type=int, metavar="N", help="the checkpoint of this step (default the latest)")
    give.add_argument("--hf", required=True, metavar="DIR", help="a directory that does not exist yet")
    give.add_argument("--dtype", choices=DTYPE_NAMES, help="of the weights (default as they are stored)")
    give.add_argument(
        "--labels", nargs="+", default=[], metavar="NAME", help="names of a classifier's classes, in order"
    )
    give.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    give.add_argument(
        "--architecture",
        metavar="FILE.py:NAME",
        help="the checkpoint's architecture, where it is code of your own",
    )
    give.add_argument("--vocab-file", metavar="FILE", help="where the tokenizer's files are now, if they were moved")
    give.add_argument("--merge-file", metavar="FILE")
    give.add_argument("--tokenizer-model", metavar="PATH")
    mix = kinds.add_parser("upcycle", help="a dense model into a mixture of experts", allow_abbrev=False)
    mix.add_argument("--load", required=True, metavar="DIR", help="directory of checkpoints, or one of them")
    mix.add_argument("--ckpt-step", type=int, metavar="N", help="the checkpoint of this step (default the latest)")
    mix.add_argument("--save", required=True, metavar="DIR", help="where the new one goes; holds none yet")
    mix.add_argument(
        "--moe-upcycling-granularity", type=int, default=1, metavar="G", help="experts that one MLP is cut into"
    )
    mix.add_argument("--seed", type=int, default=1234, metavar="N", help="of the router's weights (default 1234)")
    for name in EXPERT_OPTIONS:
        flag = BY_NAME[name].flag
        if flag.kind == "on":
            mix.add_argument(flag.spellings[0], dest=name, action="store_true", help=flag.help)
        else:
            mix.add_argument(*flag.spellings, dest=name, required=name == "num_experts", metavar="X", help=flag.help)
    return p


if __name__ == "__main__":
    parser().parse_args()  # --help and mistakes of spelling are answered before the imports below, which take seconds

import torch
from torch import Tensor

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.load import read_document
from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.config.placeholders import untrained_run
from megatron3d.config.serialize import from_dict
from megatron3d.config.tokenizer_copy import beside_checkpoint
from megatron3d.convert.export import DTYPES, ExportOptions, export_model
from megatron3d.convert.hf import HfModel, read_model, save_model
from megatron3d.convert.tokenizer_choice import with_given
from megatron3d.convert.upcycle import upcycle
from megatron3d.data.hf_tokenizer import reading_note
from megatron3d.errors import ConfigError
from megatron3d.models.counts import num_active_parameters, num_parameters
from megatron3d.models.zoo import architecture_of
from megatron3d.params.init import initial_shard
from megatron3d.train.launch import RunContext, run_main
from megatron3d.train.setup import build_model


def import_model(args: argparse.Namespace) -> None:
    """Read a directory, complete it if so asked, write the checkpoint, and print what was found."""
    found = read_model(Path(args.hf), with_tokenizer=not args.no_tokenizer)
    if args.new_heads:
        new = new_tensors(found, args.seed)
        found = replace(found, tensors={**found.tensors, **new})
        print(f"random weights, seed {args.seed}: {', '.join(sorted(new)) or 'none, nothing was missing'}")
    directory = save_model(found, Path(args.save))
    count = sum(tensor.numel() for tensor in found.tensors.values())
    print(f"{directory}: {found.model.traits.title} of {count} parameters ({', '.join(sorted(found.components))})")
    if found.left_out:
        print(f"left out, as there is no such head here: {', '.join(found.left_out)}")
    if found.data.tokenizer_type is not None:
        if note := reading_note(Path(args.hf)):
            print(note)
    elif args.no_tokenizer:
        print("without a tokenizer; name its files with --vocab-file or --tokenizer-model when it is used")
    else:
        print(f"{args.hf} has no tokenizer; name its files with --vocab-file or --tokenizer-model when it is used")


def new_tensors(found: HfModel, seed: int) -> dict[str, Tensor]:
    """Initial values of the parameters that training needs and the directory lacks."""
    run = untrained_run(found.model)
    builder = architecture_of(found.model).build_stage
    stages = build_model(run, make_mesh(Layout()), torch.device("cpu"), builder).stages.values()
    declared = {name: one for stage in stages for name, one in stage.parameters_by_name().items()}
    missing = {name: one.spec for name, one in declared.items() if name not in found.tensors}
    # The whole of a parameter, without the rows that pad a vocabulary in memory.
    return {n: initial_shard(s, seed=seed, tp=1, tp_rank=0)[: s.shape[0]].clone() for n, s in missing.items()}


def write_hf(args: argparse.Namespace) -> None:
    """Write a checkpoint as a Hugging Face directory, and print as what."""
    checkpoint = find_checkpoint(Path(args.load), args.ckpt_step)
    moved = {name: vars(args)[name] for name in ("vocab_file", "merge_file", "tokenizer_model")}
    run = from_dict(read_document(checkpoint, "run"), architecture=args.architecture)
    options = ExportOptions(
        dtype=DTYPES.get(args.dtype),
        labels=tuple(args.labels),
        data=with_given(beside_checkpoint(run.data, checkpoint), moved),
        with_tokenizer=not args.no_tokenizer,
        architecture=args.architecture,
    )
    exported = export_model(checkpoint, Path(args.hf), options)
    files = ", ".join(exported.tokenizer_files) or "no tokenizer"
    print(f"{args.hf}: {exported.class_name} of {exported.num_parameters} parameters, with {files}")
    for note in exported.notes:
        print(note)


def write_upcycled(args: argparse.Namespace) -> None:
    """Write a dense checkpoint as a mixture of experts, and print what it is."""
    checkpoint = find_checkpoint(Path(args.load), args.ckpt_step)
    granularity = args.moe_upcycling_granularity
    made = upcycle(checkpoint, Path(args.save), experts=_experts_given(args), granularity=granularity, seed=args.seed)
    model = made.model
    print(
        f"{made.directory}: {model.traits.title} of {num_parameters(model)} parameters, of which "
        f"{num_active_parameters(model)} are active: {model.num_experts} experts of width "
        f"{model.expert_ffn_hidden_size} in {model.num_expert_layers} of {model.num_layers} layers, "
        f"{model.moe_router_topk} for each token"
    )
    print("it computes what the dense model does; optimizer state is not taken along, so start from it with --finetune")


def _experts_given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of experts that stand on the command line. Raises: ConfigError for values of another type."""
    given = {name: vars(args)[name] for name in EXPERT_OPTIONS if vars(args)[name] not in (None, False)}
    found, problems = {}, []
    for name, value in given.items():
        try:
            found[name] = BY_NAME[name].convert(value)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def main(context: RunContext) -> None:
    """Import, export or upcycle, as the first word says."""
    args = parser().parse_args()
    {"hf-import": import_model, "hf-export": write_hf, "upcycle": write_upcycled}[args.action](args)


if __name__ == "__main__":
    run_main(main)
