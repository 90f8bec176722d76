"""megatron-core's GPTDataset, whose index files are built in the first start and read from their cache after it."""

from __future__ import annotations

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from tools.bench.peers.trainee import Trainee, num_samples, sample_numbers
from tools.bench.peers.work import SAMPLES_PER_STEP, Work


class NamedTokenizer:
    """What a data set asks of a tokenizer: numbers, and what its cache files are named after."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eod, self.pad = vocab_size, vocab_size - 1, vocab_size - 1
        self.unique_identifiers = {"class": "NamedTokenizer", "vocab_size": str(vocab_size)}


def build(work: Work) -> Trainee:
    """A step reads SAMPLES_PER_STEP samples."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=work.seq_length,
        blend=([work.corpus], None),
        split="1,0,0",
        path_to_cache=f"{work.corpus}_cache",
        tokenizer=NamedTokenizer(work.vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [num_samples(work), 0, 0]
    dataset, *_ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    numbers = sample_numbers(work)

    def step() -> float:
        for _ in range(SAMPLES_PER_STEP):
            dataset[next(numbers)]
        return 0.0

    return Trainee(step, num_parameters=0)
