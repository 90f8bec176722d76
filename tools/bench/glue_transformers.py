"""Fine-tune a Hugging Face BERT with transformers itself, on the batches that tools/finetune_glue.py would make.

    python tools/bench/glue_transformers.py --task mrpc --data-dir glue/MRPC --hf DIR --epochs 3 --lr 5e-5 --seeds 1 2 3

The reference for docs/glue.md: the same weights, texts, order of samples, optimizer, schedule and metrics; model, loss,
dropout and initial classifier are those of transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from megatron3d.data.tokenizer import Tokenizer, TokenizerSpec
from megatron3d.errors import Megatron3dError
from megatron3d.tasks.glue.encode import Encoded, encode
from megatron3d.tasks.glue.metrics import mean_of, measure, over_seeds
from megatron3d.tasks.glue.order import evaluation_batches, training_steps
from megatron3d.tasks.glue.read import read_rows
from megatron3d.tasks.glue.tasks import Task, find_task

MULTIPLE = 1  # as the tool pads on a CPU


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="Fine-tune with transformers, as a reference.", allow_abbrev=False)
    p.add_argument("--task", required=True, help="a GLUE task, such as mrpc")
    p.add_argument("--data-dir", type=Path, required=True, help="folder of its TSV files")
    p.add_argument("--hf", type=Path, required=True, help="directory of a Hugging Face BERT with vocab.txt")
    p.add_argument("--epochs", type=int, default=3, help="default 3")
    p.add_argument("--lr", type=float, default=5e-5, help="peak learning rate (default 5e-5)")
    p.add_argument("--batch-size", type=int, default=32, help="default 32")
    p.add_argument("--max-length", type=int, default=128, help="tokens of a sample (default 128)")
    p.add_argument("--warmup", type=float, default=0.1, help="share of the steps (default 0.1)")
    p.add_argument("--weight-decay", type=float, default=0.01, help="of matrices (default 0.01)")
    p.add_argument("--seeds", type=int, nargs="+", default=[1], help="one run each (default 1)")
    return p


def rate_at(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then linear decay to 0, as a share of the peak."""
    rising = max(1, round(warmup * total))
    return (step + 1) / rising if step < rising else max(0.0, (total - step) / (total - rising))


def model_inputs(samples: Encoded, indices: np.ndarray, weights: np.ndarray, length: int) -> dict[str, torch.Tensor]:
    """What transformers' BERT takes, without rows that only fill a batch up."""
    batch = samples.batch(indices, weights, length)
    rows = batch.weights_B > 0
    mask = torch.ones_like(batch.tokens_BS) if batch.padding_mask_BS is None else batch.padding_mask_BS.long()
    inputs = {"input_ids": batch.tokens_BS, "token_type_ids": batch.token_types_BS, "attention_mask": mask}
    assert batch.labels_B is not None, "the reference reads labelled files alone"
    return {name: values[rows] for name, values in (inputs | {"labels": batch.labels_B}).items()}


def evaluate(model: nn.Module, samples: Encoded, task: Task) -> dict[str, float]:
    """The task's metrics on one file."""
    model.eval()
    found, labels = [], []
    for batch in evaluation_batches(samples.lengths_N, batch_size=64, multiple=MULTIPLE):
        inputs = model_inputs(samples, batch.indices_R, batch.weights_R, batch.length)
        labels.append(inputs.pop("labels"))
        with torch.no_grad():
            logits = model(**inputs).logits
        found.append(logits[:, 0] if task.is_regression else logits.argmax(-1))
    return measure(task.metrics, torch.cat(found).numpy(), torch.cat(labels).numpy(), num_classes=task.num_outputs)


def finetune(args: argparse.Namespace, task: Task, train: Encoded, dev: Encoded, seed: int) -> dict[str, float]:
    """One run; the metrics of its best epoch."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    model = BertForSequenceClassification.from_pretrained(args.hf, num_labels=task.num_outputs)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    best: dict[str, float] = {}
    step, total = 0, args.epochs * -(-len(train) // args.batch_size)
    for epoch in range(args.epochs):
        model.train()
        sizes = {"step_size": args.batch_size, "group_size": args.batch_size}
        for planned in training_steps(train.lengths_N, **sizes, multiple=MULTIPLE, seed=seed, epoch=epoch):
            (batch,) = planned.batches
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate_at(step, total, args.warmup)
            model(**model_inputs(train, batch.indices_R, batch.weights_R, batch.length)).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        metrics = evaluate(model, dev, task)
        print(f"seed {seed}, epoch {epoch + 1}: {metrics}", file=sys.stderr, flush=True)
        best = metrics if not best or mean_of(metrics) > mean_of(best) else best
    return best


def read(path: Path, task: Task, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """One labelled file as token ids."""
    return encode(read_rows(path, task, labelled=True), tokenizer, max_length=max_length)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code; the last line is JSON."""
    args = parser().parse_args(argv)
    try:
        task = find_task(args.task)
        tokenizer = TokenizerSpec("BertWordPieceLowerCase", vocab_file=str(args.hf / "vocab.txt")).build()
        train = read(args.data_dir / task.train, task, tokenizer, args.max_length)
        dev = read(args.data_dir / task.dev[""], task, tokenizer, args.max_length)
        runs = [finetune(args, task, train, dev, seed) for seed in args.seeds]
        means, spread = over_seeds(runs)
        print(json.dumps({"task": task.name, "metrics": means, "deviation": spread, "runs": runs}))
    except Megatron3dError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
