"""From the data options to the three streams of a run: training, validation, test.

`build_data` makes those that a model learns from: `build_gpt_data` and `build_bert_data` differ in the samples they
make of a corpus; which corpora and documents belong to which split is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from megatron3d.config.rules.blend import has_weights, weights_twice
from megatron3d.config.sample_counts import SampleCounts
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.sections.model import ModelConfig
from megatron3d.data.bert import MIN_SEQ_LENGTH, BertForm, BertReader, BertSample, BertSamples
from megatron3d.data.blend import (
    Blend,
    BlendOrder,
    Corpus,
    integer_weights,
    parse_data_path,
    read_data_args_file,
    tempered,
)
from megatron3d.data.blend_history import ContinuedBlend
from megatron3d.data.fim import FillInTheMiddle, FimSamples, fill_in_the_middle
from megatron3d.data.gpt import DocumentRules, GPTReader, GPTSamples
from megatron3d.data.indexed import IndexedDataset
from megatron3d.data.masking import BertVocabulary, MaskingRules
from megatron3d.data.megatron_blend import MegatronCorpus, megatron_stream
from megatron3d.data.mock import MockBertSamples, MockSamples
from megatron3d.data.order import derive_seed
from megatron3d.data.source_names import source_names
from megatron3d.data.splits import SPLIT_NAMES, parse_split, split_documents
from megatron3d.data.stream import Sample, SampleStream, StreamFrom
from megatron3d.data.tokenizer import Tokenizer
from megatron3d.errors import ConfigError, DataError


@dataclass(frozen=True)
class TrainingCorpora(Generic[Sample]):
    """The corpora of the training data in the order of the options, and their integer weights.

    `numbered(place, number)` reads the corpus at a place of the options in the order of samples that its number in
    the run gives (`blend_history.py`).
    """

    weights: tuple[int, ...]
    num_tokens: tuple[int, ...]
    num_samples_per_epoch: tuple[int, ...]
    numbered: Callable[[int, int], SampleStream[Sample]]

    def stream(self, blend: ContinuedBlend) -> Blend[Sample]:
        """The blend of a resumed run with these corpora."""
        streams: list[SampleStream[Sample] | None] = [None] * len(blend.history.corpora)
        for place, number in enumerate(blend.numbers):
            streams[number] = self.numbered(place, number)
        return Blend(streams, BlendOrder(blend.history.segments))


@dataclass(frozen=True)
class GPTData:
    """The streams of a run. A stream is None where its split is empty.

    `notes` are sentences the run should print: corpora that a split had to leave out. `vocab_size` bounds the ids,
    None does not check them. `corpora` are those of `train`, None where it is not a blend that a resumed run could
    continue with other weights. `valid_sources` are the corpora of `valid` by name, where each is to be evaluated by
    itself. `fim` permutes the samples of every stream as they are read, whichever streams follow these.
    """

    train: SampleStream[NDArray[np.int64]] | None
    valid: SampleStream[NDArray[np.int64]] | None
    test: SampleStream[NDArray[np.int64]] | None
    rules: DocumentRules
    vocab_size: int | None
    notes: tuple[str, ...] = ()
    corpora: TrainingCorpora[NDArray[np.int64]] | None = None
    valid_sources: Mapping[str, SampleStream[NDArray[np.int64]]] = field(default_factory=dict)
    fim: FillInTheMiddle | None = None

    def reader(self, stream: SampleStream[NDArray[np.int64]]) -> GPTReader:
        """What makes batches of one of the streams, for `GlobalBatches`."""
        stream = stream if self.fim is None else FimSamples(stream, self.fim)
        return GPTReader(stream, self.rules, self.vocab_size)


@dataclass(frozen=True)
class BertData:
    """The streams of masked sentences of a run, as `GPTData` has those of token rows."""

    train: SampleStream[BertSample] | None
    valid: SampleStream[BertSample] | None
    test: SampleStream[BertSample] | None
    notes: tuple[str, ...] = ()
    corpora: TrainingCorpora[BertSample] | None = None
    valid_sources: Mapping[str, SampleStream[BertSample]] = field(default_factory=dict)

    def reader(self, stream: SampleStream[BertSample]) -> BertReader:
        """What makes batches of one of the streams, for `GlobalBatches`."""
        return BertReader(stream)


@dataclass(frozen=True)
class _Share:
    """What one corpus gives to one split: documents, for a stream with a seed of its own."""

    corpus: Corpus
    dataset: IndexedDataset
    documents: range
    seed: int


def build_data(
    data: DataConfig,
    model: ModelConfig,
    *,
    tokenizer: Tokenizer | None,
    eod_token: int | None,
    counts: SampleCounts | None = None,
) -> GPTData | BertData:
    """The streams of the samples that a model learns from; the arguments and errors are those of the functions below.

    `model` has its vocabulary settled.
    """
    sizes = {"seq_length": model.seq_length, "vocab_size": model.vocab_size}
    if model.traits.samples == "sentences":
        return build_bert_data(data, **sizes, tokenizer=tokenizer, binary_head=model.has_binary_head)
    built = build_gpt_data(data, **sizes, eod_token=eod_token, counts=counts)
    fim, notes = fill_in_the_middle(data, tokenizer, eod_token)
    if fim is None:
        return built
    return replace(built, fim=fim, rules=replace(built.rules, pad_token=fim.padding), notes=(*built.notes, *notes))


def build_gpt_data(
    data: DataConfig, *, seq_length: int, vocab_size: int, eod_token: int | None, counts: SampleCounts | None = None
) -> GPTData:
    """Open the files that the options name and make the streams; the same on every rank, without communication.

    `vocab_size` and `eod_token` are the tokenizer's (or the options'); `vocab_size` bounds the ids of every batch
    (unless `--no-check-token-ids` is given) and those of mock data. `counts` says how many samples the run asks for,
    which `--sample-order megatron` depends on.

    Raises: ConfigError for options that contradict each other; DataError for files that are missing or damaged, and
    for splits that leave no training document or too few tokens for a sample.
    """
    check_data_options(data, eod_token)
    rules, bound = document_rules(data, eod_token), vocab_size if data.dataloader_check_ids else None
    if data.mock_data:
        train, valid, test = (
            MockSamples(split, seq_length=seq_length, vocab_size=vocab_size, eod_token=eod_token, seed=data.seed)
            for split in SPLIT_NAMES
        )
        return GPTData(train, valid, test, rules, bound)
    if data.sample_order == "megatron":
        ordered, notes = _build_megatron_splits(data, seq_length, counts)
        return GPTData(ordered["train"], ordered["valid"], ordered["test"], rules, bound, notes)

    def samples(share: _Share) -> GPTSamples:
        return GPTSamples(share.dataset, share.documents, seq_length=seq_length, seed=share.seed)

    built = _build_splits(data, samples)
    return GPTData(
        *(built.streams[split] for split in SPLIT_NAMES),
        rules=rules,
        vocab_size=bound,
        notes=built.notes,
        corpora=built.corpora,
        valid_sources=built.valid_sources,
    )


def build_bert_data(
    data: DataConfig, *, seq_length: int, tokenizer: Tokenizer | None, vocab_size: int, binary_head: bool = True
) -> BertData:
    """The streams of masked sentences of the files that the options name; the same on every rank.

    `tokenizer` gives the special ids and says which pieces go on with a word; without one, which only mock data can
    do, the ids are those of `BertVocabulary.without_tokenizer(vocab_size)`. Without a `binary_head` (the model's
    `bert_binary_head`) samples have no second sentence.

    Raises: ConfigError for options that contradict each other, a tokenizer that is none of BERT's, or no tokenizer;
    DataError for files that are missing or damaged, and for splits that leave no training document or no sample.
    """
    check_bert_options(data, seq_length, has_tokenizer=tokenizer is not None)
    vocabulary = (
        BertVocabulary.without_tokenizer(vocab_size) if tokenizer is None else BertVocabulary.of_tokenizer(tokenizer)
    )
    form = bert_form(data, seq_length, vocabulary, binary_head=binary_head)
    if data.mock_data:
        train, valid, test = (MockBertSamples(split, form, seed=data.seed) for split in SPLIT_NAMES)
        return BertData(train, valid, test)

    def samples(share: _Share) -> BertSamples:
        return BertSamples(share.dataset, share.documents, form=form, seed=share.seed)

    built = _build_splits(data, samples)
    return BertData(**built.streams, notes=built.notes, corpora=built.corpora, valid_sources=built.valid_sources)


def bert_form(data: DataConfig, seq_length: int, vocabulary: BertVocabulary, *, binary_head: bool = True) -> BertForm:
    """The options on sentences and masking, as `BertSamples` takes them."""
    return BertForm(
        seq_length,
        vocabulary,
        MaskingRules(data.mask_prob, max_ngram=data.mask_max_ngram, whole_words=data.mask_whole_words),
        short_seq_prob=data.short_seq_prob,
        sentence_task=data.bert_sentence_task if binary_head else None,
    )


def document_rules(data: DataConfig, eod_token: int | None) -> DocumentRules:
    """The options on document boundaries, as `collate` takes them."""
    return DocumentRules(
        eod_token,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
    )


def check_data_options(data: DataConfig, eod_token: int | None) -> None:
    """Raises: ConfigError with all contradictions among the data options of a GPT."""
    problems = _source_problems(data)
    default = DataConfig()
    for flag, value, usual in (
        ("--mask-prob", data.mask_prob, default.mask_prob),
        ("--short-seq-prob", data.short_seq_prob, default.short_seq_prob),
        ("--mask-max-ngram", data.mask_max_ngram, default.mask_max_ngram),
        ("--no-mask-whole-words", data.mask_whole_words, default.mask_whole_words),
        ("--bert-sentence-task", data.bert_sentence_task, default.bert_sentence_task),
    ):
        if value != usual:
            problems.append(f"{flag} ({value}) means nothing to a GPT; leave it out, or use pretrain_bert.py.")
    flags = {
        "--reset-position-ids": data.reset_position_ids,
        "--reset-attention-mask": data.reset_attention_mask,
        "--eod-mask-loss": data.eod_mask_loss,
    }
    used = [flag for flag, present in flags.items() if present]
    if used and eod_token is None:
        problems.append(
            f"{' and '.join(used)} must know the end-of-document token, but the tokenizer has none; give --eod-token."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def check_bert_options(data: DataConfig, seq_length: int, *, has_tokenizer: bool) -> None:
    """Raises: ConfigError with all contradictions among the data options of a BERT."""
    problems = _source_problems(data)
    if not (has_tokenizer or data.mock_data):
        problems.append(
            "A BERT must know which tokens are [CLS], [SEP], [MASK] and [PAD], but no tokenizer is given; give "
            "--vocab-file FILE, with --tokenizer-type BertWordPieceLowerCase or BertWordPieceCase."
        )
    for flag, value in (
        ("--reset-position-ids", data.reset_position_ids),
        ("--reset-attention-mask", data.reset_attention_mask),
        ("--eod-mask-loss", data.eod_mask_loss),
    ):
        if value:
            problems.append(f"{flag} is about the ends of documents, which no sample of a BERT crosses; leave it out.")
    if seq_length < MIN_SEQ_LENGTH:
        problems.append(
            f"--seq-length {seq_length} leaves no room for two sentences between [CLS] and two [SEP]; use at least "
            f"{MIN_SEQ_LENGTH}."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _source_problems(data: DataConfig) -> list[str]:
    """Sentences about no source of data, or more than one."""
    per_split = [data.train_data_path, data.valid_data_path, data.test_data_path]
    sources = {
        "--data-path": bool(data.data_path),
        "--data-args-path": data.data_args_path is not None,
        "--train-data-path/--valid-data-path/--test-data-path": any(per_split),
        "--mock-data": data.mock_data,
    }
    given = [name for name, present in sources.items() if present]
    if not given:
        return ["No data is given; give --data-path PREFIX (made by tools/preprocess_data.py) or --mock-data."]
    if len(given) > 1:
        return [f"{' and '.join(given)} exclude each other; give one of them."]
    return []


def _shares_by_split(data: DataConfig) -> dict[str, list[_Share]]:
    """Open the corpora and say which documents of each belong to which split."""
    shares: dict[str, list[_Share]] = {split: [] for split in SPLIT_NAMES}
    words, flag = data.data_path, "--data-path"
    if data.data_args_path is not None:
        words, flag = read_data_args_file(data.data_args_path)
        if has_weights(words) and data.data_temperature != 1:
            raise ConfigError(weights_twice(data.data_temperature, flag))
    for place, corpus in enumerate(parse_data_path(words, flag) if words else ()):
        dataset = IndexedDataset(corpus.prefix)
        for split, documents in zip(SPLIT_NAMES, split_documents(_num_parts(data, dataset), data.split)):
            shares[split].append(_Share(corpus, dataset, documents, derive_seed(data.seed, split, place)))
    paths = (data.train_data_path, data.valid_data_path, data.test_data_path)
    for split, words in zip(SPLIT_NAMES, paths):
        for place, corpus in enumerate(parse_data_path(words, f"--{split}-data-path") if words else ()):
            dataset = IndexedDataset(corpus.prefix)
            documents = range(_num_parts(data, dataset))
            shares[split].append(_Share(corpus, dataset, documents, derive_seed(data.seed, split, place)))
    _require_training_documents(data, shares["train"])
    return shares


def _num_parts(data: DataConfig, dataset: IndexedDataset) -> int:
    """What --split divides: documents; in Megatron-LM's order sequences, which are the documents of most files."""
    return len(dataset) if data.sample_order == "megatron" else dataset.num_documents


def _require_training_documents(data: DataConfig, shares: Sequence[_Share]) -> None:
    """Raises: DataError if a corpus has no document for training, with the numbers."""
    for share in shares:
        if len(share.documents) == 0:
            total = share.dataset.num_documents
            raise DataError(
                f"--split {data.split} leaves no training document of {share.corpus.prefix}, which has {total}; "
                + ("give training a larger first share." if total else "preprocess a corpus that is not empty.")
            )


@dataclass(frozen=True)
class _Built:
    """The stream of each split, the training corpora, the streams of validation corpora by name, and notes."""

    streams: Mapping[str, SampleStream | None]
    corpora: TrainingCorpora
    valid_sources: Mapping[str, SampleStream]
    notes: tuple[str, ...]


def _build_splits(data: DataConfig, samples: Callable[[_Share], GPTSamples | BertSamples]) -> _Built:
    """All that the options give, of the samples that `samples` makes of a share."""
    shares = _shares_by_split(data)
    temperature = data.data_temperature
    built = {split: _build_split(split, shares[split], samples, temperature=temperature) for split in SPLIT_NAMES}
    notes = [note for split, one in built.items() for note in (*_empty_shares(data, split, shares[split]), *one.notes)]

    def numbered(place: int, number: int) -> GPTSamples | BertSamples:
        return samples(replace(shares["train"][place], seed=derive_seed(data.seed, "train", number)))

    train = built["train"]
    num_tokens, per_epoch = zip(*((one.num_tokens, one.num_samples_per_epoch) for one in train.streams))
    corpora = TrainingCorpora(train.weights, num_tokens, per_epoch, numbered)
    sources: dict[str, SampleStream] = {}
    if data.multiple_validation_sets:
        valid = built["valid"]
        names = source_names([share.corpus.prefix for share in shares["valid"]], data.validation_set_names)
        sources = {names[place]: stream for place, stream in zip(valid.places, valid.streams, strict=True)}
        if len(sources) < 2:
            notes.append("--multiple-validation-sets has no effect: there is no second validation corpus.")
            sources = {}
    return _Built({split: one.stream() for split, one in built.items()}, corpora, sources, tuple(notes))


def _empty_shares(data: DataConfig, split: str, shares: Sequence[_Share]) -> list[str]:
    """A note on the corpora that are too small for a part of --split that is more than nothing, or empty."""
    empty = [share for share in shares if len(share.documents) == 0]
    is_cut = not data.train_data_path
    if not empty or (is_cut and parse_split(data.split)[SPLIT_NAMES.index(split)] == 0):
        return []
    named = ", ".join(f"{share.corpus.prefix} ({share.dataset.num_documents} documents)" for share in empty)
    reason = f", as --split {data.split} leaves no document for it" if is_cut else ""
    return [f"Left out of the {split} data{reason}: {named}."]


@dataclass(frozen=True)
class _Split:
    """The streams of the corpora of one split with their integer weights and places in the options, and notes on those
    that were left out."""

    streams: tuple[GPTSamples | BertSamples, ...]
    weights: tuple[int, ...]
    notes: tuple[str, ...]
    places: tuple[int, ...]

    def stream(self) -> SampleStream | None:
        """All of it as one stream, None if there is nothing."""
        if len(self.streams) < 2:
            return self.streams[0] if self.streams else None
        return Blend(self.streams, BlendOrder.constant(self.weights))


def _build_split(
    split: str,
    shares: Sequence[_Share],
    samples: Callable[[_Share], GPTSamples | BertSamples],
    *,
    temperature: float,
) -> _Split:
    """The streams of one split, and notes on corpora that had to be left out of validation or test.

    Training needs a sample from every corpus. Validation and test leave out a corpus whose documents there are too
    short; only if that leaves nothing to validate on is it an error, since evaluations were asked for.
    """
    streams, places, notes, too_short = [], [], [], []
    for place, share in enumerate(shares):
        if len(share.documents) == 0:
            continue
        try:
            stream = samples(share)
        except DataError as error:
            if split == "train":
                raise
            too_short.append(error)
            notes.append(f"Left out of the {split} data: {error}")
            continue
        streams.append(stream)
        places.append(place)
    if not streams and too_short and split == "valid":
        raise too_short[0]
    if not streams:
        return _Split((), (), tuple(notes), ())
    given = [shares[place].corpus.weight for place in places]
    by_size = tempered([stream.num_tokens for stream in streams], temperature)
    weights = integer_weights([size if weight is None else weight for size, weight in zip(by_size, given, strict=True)])
    return _Split(tuple(streams), weights, tuple(notes), tuple(places))


def _build_megatron_splits(
    data: DataConfig, seq_length: int, counts: SampleCounts | None
) -> tuple[dict[str, SampleStream[NDArray[np.int64]] | None], tuple[str, ...]]:
    """The stream of each split in Megatron-LM's order, None where nothing is asked for, and notes.

    Raises: ConfigError if the order has fewer samples than the run reads; DataError as `megatron_stream` does.
    """
    if counts is None:
        raise ValueError("--sample-order megatron depends on how many samples a run asks for; give `counts`")
    shares, notes = _shares_by_split(data), []
    streams: dict[str, SampleStream[NDArray[np.int64]] | None] = dict.fromkeys(SPLIT_NAMES)
    read = {"train": counts.train_read, "valid": counts.valid_read, "test": counts.test}
    for split, wanted in counts.by_split.items():
        notes += _empty_shares(data, split, shares[split])
        corpora = [
            MegatronCorpus(one.dataset, one.documents, None if one.corpus.weight is None else float(one.corpus.weight))
            for one in shares[split]
            if len(one.documents)
        ]
        if not corpora or not wanted:
            continue
        stream = megatron_stream(
            corpora,
            num_samples=wanted,
            seq_length=seq_length,
            seed=data.seed,
            surplus=data.mid_level_dataset_surplus,
            cut=not data.train_data_path,
        )
        if len(stream) < read[split]:
            remedy = "give the corpora weights, so that they are read several times"
            if len(stream) >= wanted:
                remedy = "raise --sample-order-samples, which gives another order where it takes more epochs"
            raise ConfigError(
                f"--sample-order megatron has {len(stream)} {split} samples of these corpora where {wanted} are asked "
                f"for, but the run reads {read[split]}; shorten it, or {remedy}."
            )
        streams[split] = stream
    if data.sample_order_consumed and streams["train"] is not None:
        streams["train"] = StreamFrom(streams["train"], data.sample_order_consumed)
    return streams, tuple(notes)
