"""Export a fine-tuned classifier to one ONNX file, from a checkpoint of any layout.

    python tools/export_onnx.py --load CHECKPOINTS --output sst2.onnx --label-names negative positive
    python tools/export_onnx.py --load CHECKPOINTS --output sst2-int8.onnx --int8 --data-dir glue/SST-2

The file appears under its name only after ONNX Runtime has given what torch gives, within 1e-5. It holds labels and
tokenizer too, so that tools/serve_classifier.py needs nothing else. See docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron3d.config.tool_parser import ToolParser
from megatron3d.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = ToolParser(description="Export a classifier to one ONNX file.")
    p.add_argument("--load", required=True, metavar="DIR", help="directory of checkpoints, or one of them; any layout")
    p.add_argument("--ckpt-step", type=int, metavar="N", help="the checkpoint of this step (default the latest)")
    p.add_argument("--output", required=True, metavar="FILE", help="the file to write, such as model.onnx")
    p.add_argument(
        "--label-names", nargs="+", default=[], metavar="NAME", help="what clients see instead of the labels"
    )
    p.add_argument("--max-length", type=int, metavar="N", help="tokens of a text at most (default as fine-tuned)")
    p.add_argument("--vocab-file", metavar="FILE", help="where the tokenizer's file has moved")
    p.add_argument("--tokenizer-model", metavar="PATH", help="likewise")
    p.add_argument("--override-tokenizer", action="store_true", help="use files with other content than the training's")
    p.add_argument("--int8", action="store_true", help="int8 weights; needs labelled data, to print what they cost")
    data = p.add_argument_group("labelled data to measure on")
    data.add_argument("--data-dir", metavar="DIR", help="the official files of the task the model was fine-tuned on")
    data.add_argument("--dev-file", metavar="FILE", help="your own TSV file with a header line")
    data.add_argument("--text-column", default="sentence", metavar="NAME", help="of --dev-file (default sentence)")
    data.add_argument("--second-text-column", metavar="NAME", help="of --dev-file, for pairs")
    data.add_argument("--label-column", default="label", metavar="NAME", help="of --dev-file (default label)")
    return p


if __name__ == "__main__":
    parser().parse_args()  # --help and mistakes of spelling are answered before the imports below, which take seconds

from megatron3d.serve.classifier import open_classifier
from megatron3d.serve.description import to_metadata
from megatron3d.serve.onnx_file import check, compare, require_exporter, temporary_beside, write
from megatron3d.serve.quantize import metrics, quantize
from megatron3d.serve.trained import ServeOverrides, Trained, load_classifier, open_trained
from megatron3d.tasks.glue.metrics import require_libraries
from megatron3d.tasks.glue.read import SampleTable, read_rows
from megatron3d.tasks.glue.tasks import CUSTOM, CustomColumns, Task, custom_task, find_task
from megatron3d.train.launch import RunContext, run_main


@dataclass(frozen=True)
class Measurement:
    """A task and its labelled files by the ending of their metrics' names."""

    task: Task
    files: dict[str, SampleTable]


def measurement(args: argparse.Namespace, trained: Trained) -> Measurement | None:
    """The labelled data, read; None where there is none.

    Raises:
        ConfigError: --int8 without any, both kinds given, or a task that has no official files.
        DataError: a file is missing or damaged.
    """
    if args.data_dir and args.dev_file:
        raise ConfigError(f"--data-dir {args.data_dir} and --dev-file {args.dev_file} exclude each other; give one")
    if not (args.data_dir or args.dev_file):
        if args.int8:
            raise ConfigError(
                f"--int8 changes the outputs of {args.load}, and without labelled data nobody knows by how much; give "
                "--data-dir (official files of the task) or --dev-file"
            )
        return None
    require_libraries()
    known, folder = trained.description, Path(args.data_dir or "")
    if args.dev_file:
        columns = (args.text_column, *([args.second_text_column] if args.second_text_column else []))
        if known.num_texts not in (None, len(columns)):
            raise ConfigError(
                f"--dev-file {args.dev_file} gives {len(columns)} text(s) a sample and {known.task} reads "
                f"{known.num_texts}; {'name' if known.num_texts == 2 else 'leave out'} --second-text-column"
            )
        wanted = CustomColumns(columns, args.label_column, trained.classes, known.is_regression, ())
        task = custom_task(wanted, train=None, dev=args.dev_file, test=None)
    elif known.task in (CUSTOM, "imported"):
        raise ConfigError(f"--data-dir {folder}: the model's task, {known.task}, has no official files; use --dev-file")
    else:
        task = find_task(known.task)
        folder = folder / task.folder if (folder / task.folder).is_dir() else folder
    files = {ending: read_rows(folder / name, task, labelled=True) for ending, name in task.dev.items()}
    return Measurement(task, files)


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Write the file and report how it went.

    Raises:
        ConfigError, CheckpointError, DataError: an option, the checkpoint or a data file cannot be used.
        NumericsError: ONNX Runtime does not give what torch gives; nothing was written.
        StorageError: the file system refused.
    """
    require_exporter()
    output = Path(args.output)
    if output.is_dir():
        raise ConfigError(f"--output {output} is a directory; give the name of a file, such as {output / 'model.onnx'}")
    overrides = ServeOverrides(
        tuple(args.label_names), args.max_length, args.vocab_file, args.tokenizer_model, args.override_tokenizer
    )
    trained = open_trained(Path(args.load), args.ckpt_step, overrides)
    data = measurement(args, trained)
    report: dict[str, Any] = {"output": str(output), "checkpoint": str(trained.directory)}
    with temporary_beside(output) as temporary:
        model, most = load_classifier(trained), trained.description.max_length
        write(model, temporary, to_metadata(trained.description, trained.tokenizer), max_length=most)
        agreement = compare(model, temporary, max_length=most)
        check(agreement, output)
        report |= {"largest_difference": agreement.difference, "largest_output": agreement.largest}
        report |= {"bytes": temporary.stat().st_size} | _measured("metrics", temporary, data)
        if args.int8:
            with temporary_beside(temporary) as smaller:
                description = replace(trained.description, precision="int8")
                quantize(temporary, smaller, to_metadata(description, trained.tokenizer))
                report |= {"int8_bytes": smaller.stat().st_size} | _measured("int8_metrics", smaller, data)
    return report


def _measured(key: str, path: Path, data: Measurement | None) -> dict[str, dict[str, float]]:
    if data is None:
        return {}
    classifier = open_classifier(path)
    found: dict[str, float] = {}
    for ending, rows in data.files.items():
        found |= {f"{name}{ending}": value for name, value in metrics(classifier, rows, data.task).items()}
    return {key: found}


def summary(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['output']}: {report['bytes'] / 1e6:.1f} MB in fp32; ONNX Runtime is at most "
        f"{report['largest_difference']:.2g} away from torch (outputs up to {report['largest_output']:.2g})"
    ]
    if "int8_bytes" in report:
        lines.append(f"written with int8 weights: {report['int8_bytes'] / 1e6:.1f} MB")
    for name, value in report.get("metrics", {}).items():
        line = f"{name}: fp32 {value:.4f}"
        if "int8_metrics" in report:
            line += f", int8 {report['int8_metrics'][name]:.4f} ({report['int8_metrics'][name] - value:+.4f})"
        lines.append(line)
    return "\n".join(lines)


def main(context: RunContext) -> None:
    """Export, tell people on standard error, and end with one JSON line on standard output."""
    args = parser().parse_args()
    if context.launch.world_size > 1:
        raise ConfigError(
            f"the export runs in one process, not in {context.launch.world_size}; start it without torchrun"
        )
    report = export(args)
    print(summary(report), file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    run_main(main)
