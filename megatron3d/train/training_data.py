"""The training data of a run: where it continues each corpus that the run before has read, and a table of its blend.

What is stored and how a blend continues is decided by `data/blend_history.py`; here a resumed run gets its stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron3d.config.batch_size import samples_for_iterations
from megatron3d.config.sections.train import TrainConfig
from megatron3d.data.blend import BlendOrder
from megatron3d.data.blend_history import BlendHistory, ContinuedBlend, continued_blend, implied_history
from megatron3d.data.build import BertData, GPTData, TrainingCorpora
from megatron3d.data.content import Content, CorpusContent, same_corpora
from megatron3d.data.stream import SampleStream
from megatron3d.errors import MisfitError
from megatron3d.train.progress import format_count
from megatron3d.train.state import Progress, Restored


@dataclass(frozen=True)
class TrainingData:
    """The training data from a run's first step on.

    `stream` is None where it is what the options give without a checkpoint. `blend` is None for data without corpora.
    """

    blend: ContinuedBlend | None
    stream: SampleStream | None

    @property
    def history(self) -> BlendHistory | None:
        """What a checkpoint stores of it."""
        return None if self.blend is None else self.blend.history


def training_data(
    restored: Restored, content: Content, data: GPTData | BertData, *, may_differ: bool = False
) -> TrainingData:
    """Continue the corpora of the checkpoint that a run starts from, if it resumes one.

    An order of samples that cannot be continued is counted on if it `may_differ` (--override-sample-order).

    Raises: MisfitError if the blend has changed and its order of samples cannot be continued.
    """
    found, progress = content.training, restored.progress
    corpora = data.corpora
    if corpora is None:
        has_segments = restored.blend is not None and len(restored.blend.segments) > 1
        is_resumed = progress.consumed_samples > 0
        if is_resumed and not may_differ and (has_segments or not same_corpora(restored.saved_corpora, found)):
            raise MisfitError(
                f"{restored.source} has read the corpora with other weights or in another order, and only blends in "
                "the usual order of samples continue each corpus; give the corpora and weights of the checkpoint, or "
                "count the samples on in the new order by --override-sample-order"
            )
        return TrainingData(None, None)
    before = _history_before(restored, found, corpora) if progress.consumed_samples else None
    if before is None:
        before = BlendHistory.begun(found, corpora.weights)
    blend = continued_blend(before, found, corpora.weights, progress.consumed_samples)
    return TrainingData(blend, None if blend.is_as_begun else corpora.stream(blend))


def _history_before(
    restored: Restored, found: tuple[CorpusContent, ...], corpora: TrainingCorpora
) -> BlendHistory | None:
    """What the run before has read; None where it is as if this run's options had been those from the start."""
    saved = restored.saved_corpora
    if restored.blend is not None or not saved or same_corpora(saved, found):
        return restored.blend
    return implied_history(saved, found, corpora.num_tokens)


def samples_of_run(train: TrainConfig, progress: Progress, last_step: int, data_parallel_size: int) -> int:
    """The samples that the run will have consumed after its last step."""
    left = max(0, last_step - progress.step)
    return samples_for_iterations(train, left, data_parallel_size, consumed=progress.consumed_samples)


def blend_table(blend: ContinuedBlend, corpora: TrainingCorpora, *, consumed: int, in_all: int) -> Iterator[str]:
    """Lines with share, size and use of each corpus: samples served so far, and epochs when the run ends."""
    order = BlendOrder(blend.history.segments)
    weights = blend.history.segments[-1].weights
    served, at_end = order.served(consumed), order.served(in_all)
    width = max(len("corpus"), *(len(one.prefix) for one in blend.history.corpora))
    yield f"training data: {in_all} samples in all, {consumed} of them consumed"
    yield f"  {'corpus':{width}}      share   tokens  samples/epoch     served  epochs at the end"
    for place, number in enumerate(blend.numbers):
        per_epoch = corpora.num_samples_per_epoch[place]
        yield (
            f"  {blend.history.corpora[number].prefix:{width}} {weights[number] / sum(weights):>10.4%} "
            f"{format_count(corpora.num_tokens[place]):>8} {per_epoch:>14} {served[number]:>10} "
            f"{at_end[number] / per_epoch:>18.2f}"
        )
