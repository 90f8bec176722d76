"""Which tokens are read, in which order, and how they were made."""

from __future__ import annotations

from dataclasses import dataclass

from megatron3d.config.fields import off_switch, option, options, switch


@dataclass(frozen=True)
class DataConfig:
    """The data. Prefixes name `.bin`/`.idx` pairs without the ending; weights may stand before prefixes."""

    data_path: tuple[str, ...] = options("--data-path", "Prefixes of token files, optionally weighted: 0.7 A 0.3 B.")
    train_data_path: tuple[str, ...] = options(
        "--train-data-path", "Prefixes for training alone (then --split is not used)."
    )
    valid_data_path: tuple[str, ...] = options("--valid-data-path", "Prefixes for validation alone.")
    test_data_path: tuple[str, ...] = options("--test-data-path", "Prefixes for the test alone.")
    data_args_path: str | None = option(None, "--data-args-path", "A file with the words of --data-path.")
    data_temperature: float = option(
        1.0,
        "--data-temperature",
        "T: corpora without weights are read in proportion to tokens^(1/T); a large T makes them equal.",
    )
    split: str = option("969,30,1", "--split", "Shares of the documents for training, validation and test.")
    sample_order: str = option(
        "computed",
        "--sample-order",
        "Samples in an order that is computed from their numbers, or in Megatron-LM's, for runs that move over "
        "(docs/data.md).",
        choices=("computed", "megatron"),
    )
    sample_order_samples: int | None = option(
        None,
        "--sample-order-samples",
        "Training samples that the run in Megatron-LM asks for, which decide its order; default those of this run.",
        unit="samples",
    )
    sample_order_consumed: int = option(
        0, "--sample-order-consumed", "Samples that were consumed in Megatron-LM before this run.", unit="samples"
    )
    mid_level_dataset_surplus: float = option(
        0.005,
        "--mid-level-dataset-surplus",
        "Share of samples that Megatron-LM's order adds to each corpus of a blend.",
    )
    multiple_validation_sets: bool = switch(
        "--multiple-validation-sets",
        "Evaluate each validation corpus by itself too, --eval-iters global batches each (docs/data.md).",
    )
    validation_set_names: tuple[str, ...] = options(
        "--validation-set-names",
        "Names of the validation corpora in reports; default the last parts of their prefixes.",
    )
    mock_data: bool = switch("--mock-data", "Train on tokens drawn from the seed, without any file.")
    tokenizer_type: str | None = option(None, "--tokenizer-type", "Kind of tokenizer, as in tools/preprocess_data.py.")
    tokenizer_model: str | None = option(None, "--tokenizer-model", "Tokenizer file or directory.")
    vocab_file: str | None = option(None, "--vocab-file", "Vocabulary of a GPT-2 or BERT tokenizer.", also=("--vocab",))
    merge_file: str | None = option(None, "--merge-file", "Merges of a GPT-2 tokenizer.")
    tiktoken_pattern: str = option(
        "v2", "--tiktoken-pattern", "How a TikTokenizer cuts a text into words.", choices=("v1", "v2")
    )
    tiktoken_num_special_tokens: int = option(
        1000, "--tiktoken-num-special-tokens", "Ids before the tokens of a TikTokenizer's file."
    )
    tiktoken_special_tokens: tuple[str, ...] = options(
        "--tiktoken-special-tokens", "Names of a TikTokenizer's first special tokens; default <unk> <s> </s>."
    )
    reset_position_ids: bool = switch("--reset-position-ids", "Positions start again after each end of document.")
    reset_attention_mask: bool = switch(
        "--reset-attention-mask",
        "No attention across documents: each attends to itself, without a mask of the whole sequence.",
        also=("--dataloader-inter-document-masking",),
    )
    eod_mask_loss: bool = switch("--eod-mask-loss", "No loss on end-of-document tokens.")
    mask_prob: float = option(0.15, "--mask-prob", "Share of a BERT sample's tokens to be predicted.")
    mask_max_ngram: int = option(3, "--mask-max-ngram", "Words that are masked in a row, at most; n with odds 1/n.")
    mask_whole_words: bool = off_switch("--no-mask-whole-words", "Mask single word pieces instead of whole words.")
    short_seq_prob: float = option(0.1, "--short-seq-prob", "Share of BERT samples that are made short.")
    bert_sentence_task: str = option(
        "order",
        "--bert-sentence-task",
        "What the sentence head learns: are A and B in order (order), or is B of another document (next).",
        choices=("order", "next"),
    )
    fim_data: bool = switch("--fim-data", "Fill-in-the-Middle: put the middle of texts last (docs/data.md).")
    fim_rate: float = option(0.5, "--fim-rate", "With --fim-data: the probability that a document is permuted.")
    fim_spm_rate: float = option(0.5, "--fim-spm-rate", "The share of permuted ones that have the suffix first.")
    fim_split_sample: str | None = option(
        None, "--fim-split-sample", "A token that cuts a document into fragments, which are permuted one by one."
    )
    fim_fragment_rate: float | None = option(
        None, "--fim-fragment-rate", "The probability that a fragment of a document that is chosen is permuted."
    )
    fim_no_prefix: str | None = option(None, "--fim-no-prefix", "Texts that begin with this are not permuted.")
    fim_prefix_token: str = option("<fim_prefix>", "--fim-prefix-token", "Token before a prefix.")
    fim_middle_token: str = option("<fim_middle>", "--fim-middle-token", "Token before a middle.")
    fim_suffix_token: str = option("<fim_suffix>", "--fim-suffix-token", "Token before a suffix.")
    fim_pad_token: str = option("<fim_pad>", "--fim-pad-token", "Token that fills samples up, without loss.")
    fim_eod_token: str | None = option(
        None, "--fim-eod-token", "Token between documents; default the end-of-document token of the run."
    )
    eod_token: int | None = option(None, "--eod-token", "Id of the end-of-document token; default the tokenizer's.")
    seed: int = option(1234, "--seed", "Seed of weights, data order and dropout.")
    num_workers: int = option(2, "--num-workers", "Threads that read batches ahead; 0 reads in the loop.")
    dataloader_check_ids: bool = off_switch(
        "--no-check-token-ids", "Do not compare every token id with the vocabulary."
    )
