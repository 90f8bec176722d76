"""Options on data and data efficiency that a run does not read, as lines before it starts.

They depend on the other options alone: what is read of which data, by which tokenizer, and which pacing a curriculum
has. Options that contradict each other are errors, found earlier by `config/rules`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from megatron3d.config.curriculum import plan_of
from megatron3d.config.options import BY_NAME
from megatron3d.config.rules.blend import has_weights
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.data_efficiency import CurriculumConfig
from megatron3d.config.sections.lengths import LENGTH_PREFIX, LengthConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.config.sections.train import TrainConfig
from megatron3d.files.user_code import is_user_code

_Section = DataConfig | CurriculumConfig | LengthConfig | TrainConfig
_OWN = "a function of your own"
# The options of a pacing, which begin with the name of what is paced, and the kinds of pacing that read them.
_READ_BY = {
    "min_difficulty": ("fixed_linear", "fixed_root"),
    "max_difficulty": ("fixed_linear", "fixed_root"),
    "steps": ("fixed_linear", "fixed_root", _OWN),
    "difficulty_step": ("fixed_linear", "fixed_root"),
    "root_degree": ("fixed_root",),
    "difficulties": ("fixed_discrete",),
    "last_steps": ("fixed_discrete",),
}
_TIKTOKEN = ("tiktoken_pattern", "tiktoken_num_special_tokens", "tiktoken_special_tokens")
_TOKENIZER_FILES = ("vocab_file", "merge_file", "tokenizer_model")
_WITHOUT_FILES = ("ByteTokenizer", "NullTokenizer")


def inert_data_options(
    data: DataConfig, model: ModelConfig, *, train: TrainConfig, curriculum: CurriculumConfig, lengths: LengthConfig
) -> Iterator[str]:
    """A sentence for each option on data or data efficiency that was given and is not read."""
    yield from _corpora(data)
    if train.eval_iters == 0:
        names = ["valid_data_path", "test_data_path", "multiple_validation_sets"]
        yield from _unread(data, names, "with --eval-iters 0: nothing is evaluated")
    yield from _tokenizer(data)
    yield from _samples(data, model)
    bounds = plan_of(curriculum).bounds
    if bounds:
        kinds = {bound.pacing.kind for bound in bounds}
        yield from _unread_by(curriculum, "curriculum", kinds, "--curriculum")
    if lengths.seq_length_curriculum is not None:
        kinds = {lengths.seq_length_curriculum_pacing}
        yield from _unread_by(lengths, "seq_length_curriculum", kinds, LENGTH_PREFIX)
    if train.random_ltd:
        yield from _random_ltd(train, model.seq_length)


def _unread(section: _Section, names: Sequence[str], why: str) -> Iterator[str]:
    """A sentence for those of a section's options that differ from their defaults."""
    for option in (BY_NAME[name] for name in names):
        value = vars(section)[option.name]
        if value != option.default:
            words = " ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
            words = "" if isinstance(value, bool) else words
            yield f"{f'{option.spelling} {words}'.rstrip()} has no effect {why}"


def _corpora(data: DataConfig) -> Iterator[str]:
    """What is about several corpora, or about cutting them."""
    paths = (data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path)
    if data.mock_data:
        yield from _unread(data, ["data_temperature", "split"], "with --mock-data, which reads no corpus")
    elif data.data_args_path is None and all(_num_corpora(words) < 2 for words in paths):
        yield from _unread(data, ["data_temperature"], "on a single corpus, which has nothing to be weighed against")
        if data.sample_order == "megatron":
            yield from _unread(data, ["mid_level_dataset_surplus"], "on a single corpus: it is about blends")
    if data.train_data_path:
        yield from _unread(data, ["split"], "with --train-data-path: its corpora are not cut")


def _num_corpora(words: Sequence[str]) -> int:
    return len(words) // 2 if words and has_weights(words) else len(words)


def _tokenizer(data: DataConfig) -> Iterator[str]:
    kind = data.tokenizer_type
    if kind != "TikTokenizer":
        yield from _unread(data, _TIKTOKEN, "without --tokenizer-type TikTokenizer")
    if kind is None or kind in _WITHOUT_FILES:
        why = "without --tokenizer-type" if kind is None else f"with --tokenizer-type {kind}, which reads no file"
        yield from _unread(data, _TOKENIZER_FILES, why)


def _samples(data: DataConfig, model: ModelConfig) -> Iterator[str]:
    if model.traits.samples != "sentences":
        return
    yield from _unread(data, ["eod_token"], f"on a {model.traits.title}, whose samples cross no documents")
    if not model.has_binary_head:
        yield from _unread(data, ["bert_sentence_task"], "on a model without a sentence head")


def _unread_by(section: _Section, name: str, kinds: Collection[str], prefix: str) -> Iterator[str]:
    """What pacings of these kinds do not read."""
    read = {_OWN if is_user_code(kind) else kind for kind in kinds}
    names = [f"{name}_{option}" for option, readers in _READ_BY.items() if read.isdisjoint(readers)]
    yield from _unread(section, names, f"with {prefix}-pacing {' '.join(sorted(kinds))}")


def _random_ltd(train: TrainConfig, seq_length: int) -> Iterator[str]:
    if train.random_ltd_router is not None:
        yield from _unread(train, ["random_ltd_step_size"], "with --random-ltd-router, which chooses the numbers")
    elif train.random_ltd_min == (train.random_ltd_max or seq_length):
        names = ["random_ltd_steps", "random_ltd_step_size"]
        yield from _unread(train, names, f"with as many positions at first as at last, {train.random_ltd_min}")
