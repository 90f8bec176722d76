"""Tokenizers through import and export: the same ids, ends, chat template and generation config on the other side, and
the same text from transformers and from us."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors

from megatron3d.checkpoint.directory import find_checkpoint
from megatron3d.checkpoint.load import read_document
from megatron3d.comm.launch import Launch
from megatron3d.config.sections.data import DataConfig
from megatron3d.config.serialize import from_dict
from megatron3d.convert.hf import read_model, save_model
from megatron3d.convert.tokenizer_choice import with_given
from megatron3d.convert.tokenizer_files import files_of, named_in, write_files
from megatron3d.data.indexed import IndexedDataset
from megatron3d.data.tokenizer import Tokenizer, TokenizerSpec
from megatron3d.errors import ConfigError, DataError
from megatron3d.serve.packed_tokenizer import from_text, pack
from megatron3d.train.launch import RunContext
from tests.data.hf_directories import (
    END,
    GENERIC,
    KINDS,
    START,
    TEXTS,
    Vocabularies,
    byte_level,
    make,
    vocabularies,  # noqa: F401
)
from tests.nn.dense import model_config
from tools import convert_checkpoint, generate_text, preprocess_data

transformers = pytest.importorskip("transformers")
Run = Callable[..., str]
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}{% endfor %}"
_SIZES = {"num_attention_heads": 2, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a tool in this process; returns what it wrote to stdout."""

    def call(tool: Any, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tool.py", *map(str, words)])
        tool.main(RunContext(Launch()))
        return capsys.readouterr().out

    return call


def llama(directory: Path, vocab_size: int, **values: Any) -> Any:
    """A small Llama with random weights beside what lies in `directory`."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**_SIZES, vocab_size=vocab_size, max_position_embeddings=64, **values)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)
    return model


def chat_model(directory: Path, **settings: Any) -> Any:
    """A directory of a Llama with a tokenizer that begins texts and a chat template; returns transformers' model."""
    library = byte_level(digits=True)
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token=END, bos_token=START, **settings)
    saved.chat_template = CHAT
    saved._tokenizer.post_processor = _begins(library)
    saved.save_pretrained(directory)
    return llama(directory, library.get_vocab_size(), bos_token_id=1, eos_token_id=0)


def _begins(library: Any) -> Any:
    return processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, library.token_to_id(START))])


def new_tokens(model: Any, directory: Path, prompt: str, number: int = 24) -> list[int]:
    """What transformers generates after a prompt, greedily, with the directory's own tokenizer and ends."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=number, do_sample=False, pad_token_id=0)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def name_ends(directory: Path, model: Any, prompt: str) -> list[int]:
    """Make two tokens that the model gives after a prompt its ends, in generation_config.json; the later one first."""
    model.generation_config.eos_token_id = None
    tokens = new_tokens(model, directory, prompt)
    ends = list(dict.fromkeys(tokens[4:]))[1::-1]
    assert len(ends) == 2 and not set(ends) & set(tokens[:4])
    values = {"eos_token_id": ends, "bos_token_id": 1, "temperature": 0.7, "do_sample": True}
    model.generation_config = transformers.GenerationConfig(**values)
    model.generation_config.save_pretrained(directory)
    return ends


def ours(run: Run, load: Path, prompt: str, *words: object) -> dict[str, Any]:
    """What our generation prints of a prompt."""
    fixed = ("--load", load, "--device", "cpu", "--greedy", "--json", "--max-new-tokens", 24)
    return json.loads(run(generate_text, *fixed, "--prompt", prompt, *words))


def test_what_went_in_comes_out_and_both_write_the_same_text_to_one_of_several_ends(run: Run, tmp_path: Path) -> None:
    there, again = tmp_path / "there", tmp_path / "again"
    model = chat_model(there)
    ends = name_ends(there, model, "In 1898")
    run(convert_checkpoint, "hf-import", "--hf", there, "--save", tmp_path / "save")
    shutil.move(tmp_path / "save", tmp_path / "moved")
    run(convert_checkpoint, "hf-export", "--load", tmp_path / "moved", "--hf", again)
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (there, again))
    assert before(list(TEXTS))["input_ids"] == after(list(TEXTS))["input_ids"]
    assert (after.eos_token_id, after.bos_token_id, after.chat_template) == (0, 1, CHAT)
    for name in ("config.json", "generation_config.json"):
        was, now = (json.loads((folder / name).read_text()) for folder in (there, again))
        for given in ("eos_token_id", "bos_token_id", "temperature", "do_sample"):
            assert now.get(given) == was.get(given), f"{name}: {given}"
    loaded = transformers.LlamaForCausalLM.from_pretrained(again).eval()
    theirs = new_tokens(loaded, again, "In 1898")
    found = ours(run, tmp_path / "moved", "In 1898")
    assert loaded.generation_config.eos_token_id == ends
    assert found["prompt_ids"] == before("In 1898")["input_ids"] and found["prompt_ids"][0] == 1
    assert found["token_ids"] == theirs == new_tokens(model, there, "In 1898")
    assert theirs[-1] in ends and len(theirs) < 24 and found["stopped_by"] == "end of document"
    assert found["text"] == after.decode([*found["prompt_ids"][1:], *theirs[:-1]])


def test_a_prompt_begins_as_the_tokenizer_says_or_as_the_options_do(run: Run, tmp_path: Path) -> None:
    chat_model(tmp_path / "there")
    run(convert_checkpoint, "hf-import", "--hf", tmp_path / "there", "--save", tmp_path / "save")
    options = ((), ("--prepend-bos",), ("--no-prepend-bos",))
    default, with_bos, without = (ours(run, tmp_path / "save", "a", *words) for words in options)
    assert default == with_bos and default["prompt_ids"] == [1, *without["prompt_ids"]]
    assert default["text"].startswith("a") and without["text"].startswith("a")
    plain = tmp_path / "plain"
    library = byte_level()
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token=END).save_pretrained(plain)
    llama(plain, library.get_vocab_size(), eos_token_id=0)
    run(convert_checkpoint, "hf-import", "--hf", plain, "--save", tmp_path / "other")
    assert ours(run, tmp_path / "other", "a")["prompt_ids"] == library.encode("a").ids
    with pytest.raises(ConfigError, match="--prepend-bos: the HuggingFaceTokenizer of this model has no token that"):
        ours(run, tmp_path / "other", "a", "--prepend-bos")


@pytest.mark.parametrize("kind", KINDS)
def test_training_fine_tuning_serving_and_export_read_the_same_tokenizer(
    kind: str,
    tmp_path: Path,
    vocabularies: Vocabularies,  # noqa: F811
) -> None:
    """Each of them takes the files another way: by their directory, by copies, from inside a file, written out."""
    there = make(kind, tmp_path / "there", vocabularies)
    expected = TokenizerSpec("HuggingFaceTokenizer", tokenizer_model=str(there)).build()
    data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(there))
    write_files(tmp_path / "copied", files_of(data, model_config()))
    copied = spec_of(named_in(data, tmp_path / "copied"))
    packed = from_text(pack(copied).to_text())
    for tokenizer in (copied.build(), packed.build()):
        assert tokenizer.encode_batch(TEXTS) == expected.encode_batch(TEXTS)
        assert special_of(tokenizer) == special_of(expected)


def spec_of(data: DataConfig) -> TokenizerSpec:
    assert data.tokenizer_type is not None
    return TokenizerSpec(data.tokenizer_type, data.vocab_file, data.merge_file, data.tokenizer_model)


def special_of(tokenizer: Tokenizer) -> tuple[object, ...]:
    names = ("vocab_size", "eod", "bos", "pad", "cls", "sep", "mask", "ends", "prefix", "suffix")
    return tuple(vars(tokenizer)[name] for name in names)


def test_a_model_of_our_own_is_exported_with_its_end_and_no_begin(
    run: Run,
    tmp_path: Path,
    vocabularies: Vocabularies,  # noqa: F811
) -> None:
    there = tmp_path / "there"
    shutil.copytree(vocabularies.gpt2, there)
    model = llama(there, 402, eos_token_id=None, bos_token_id=None)
    (there / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    files = {"vocab_file": str(there / "vocab.json"), "merge_file": str(there / "merges.txt")}
    found = replace(read_model(there), data=DataConfig(tokenizer_type="GPT2BPETokenizer", **files), settings={})
    checkpoint = save_model(found, tmp_path / "save")
    assert from_dict(read_document(checkpoint, "run")).data.eod_token is None
    out = run(convert_checkpoint, "hf-export", "--load", tmp_path / "save", "--hf", tmp_path / "again")
    assert "merges.txt, tokenizer_config.json, vocab.json" in out
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (0, None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, None)
    own = spec_of(from_dict(read_document(checkpoint, "run")).data).build()
    texts = [text for text in TEXTS if END not in text]
    assert tokenizer(texts)["input_ids"] == own.encode_batch(texts)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert loaded.generation_config.eos_token_id == 0 and loaded.generation_config.bos_token_id is None
    assert ours(run, tmp_path / "save", "a")["token_ids"] == new_tokens(loaded, tmp_path / "again", "a")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    words = ("hf-export", "--load", tmp_path / "save", "--hf", tmp_path / "bare", "--no-tokenizer")
    assert "no tokenizer" in run(convert_checkpoint, *words)
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["eos_token_id"] == 0


def test_weights_alone_are_imported_where_the_tokenizer_cannot_be(
    run: Run,
    tmp_path: Path,
    vocabularies: Vocabularies,  # noqa: F811
) -> None:
    there = tmp_path / "there"
    size = len(vocabularies.bert.read_text(encoding="utf-8").splitlines())
    transformers.BertModel(transformers.BertConfig(**_SIZES, vocab_size=size)).save_pretrained(there)
    shutil.copy(vocabularies.bert, there)
    (there / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertJapaneseTokenizer"}))
    with pytest.raises(DataError, match=r"BertJapaneseTokenizer, which cuts texts in Python code .* --no-tokenizer"):
        run(convert_checkpoint, "hf-import", "--hf", there, "--save", tmp_path / "save")
    assert not (tmp_path / "save").exists()
    out = run(convert_checkpoint, "hf-import", "--hf", there, "--save", tmp_path / "save", "--no-tokenizer")
    assert "without a tokenizer" in out
    assert from_dict(read_document(find_checkpoint(tmp_path / "save"), "run")).data.tokenizer_type is None


def test_a_vocabulary_on_the_command_line_is_read_as_it_is_described_or_refused(tmp_path: Path) -> None:
    described = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    cased = DataConfig(tokenizer_type="BertWordPieceCase", vocab_file="gone/vocab.txt")
    (tmp_path / "vocab.txt").write_text("")
    given = {"vocab_file": str(tmp_path / "vocab.txt")}
    with pytest.raises(ConfigError, match="does not say how texts are cut, and the model's own tokenizer is a Hugging"):
        with_given(described, given)
    assert with_given(cased, given).tokenizer_type == "BertWordPieceCase"
    assert with_given(DataConfig(), given).tokenizer_type == "BertWordPieceLowerCase"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert with_given(described, given).tokenizer_model == str(tmp_path)
    assert with_given(DataConfig(), given).tokenizer_type == "HuggingFaceTokenizer"
    with_directory = with_given(cased, {"tokenizer_model": str(tmp_path)})
    assert (with_directory.tokenizer_type, with_directory.vocab_file) == ("HuggingFaceTokenizer", None)
    with pytest.raises(
        ConfigError, match=r"--tokenizer-model a\.model does not say .* own tokenizer is a BertWordPieceCase"
    ):
        with_given(cased, {"tokenizer_model": "a.model"})
    assert with_given(cased, {}) == cased
    other_kind = with_given(described, {"tokenizer_type": "GPT2BPETokenizer"})
    assert other_kind.tokenizer_model is None, "a kind does not read the files of another"


def test_token_files_can_hold_what_the_tokenizer_puts_around_a_text(tmp_path: Path) -> None:
    directory = tmp_path / "there"
    directory.mkdir()
    byte_level().save(str(directory / "tokenizer.json"))
    settings = GENERIC | {"bos_token": START}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    library = byte_level()
    library.post_processor = _begins(library)
    library.save(str(directory / "tokenizer.json"))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4]))
    words = ["--input", corpus, "--output-prefix", tmp_path / "out", "--append-eod", "--tokenizer-model", directory]
    words += ["--tokenizer-hf-include-special-tokens", "--tokenizer-type"]
    assert preprocess_data.main([*map(str, words), "HuggingFaceTokenizer"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    stored = IndexedDataset(tmp_path / "out_text_document")
    for number, text in enumerate(TEXTS[:4]):
        assert np.array_equal(stored[number], [*theirs(text)["input_ids"], 0])
    assert preprocess_data.main([*map(str, words), "ByteTokenizer"]) != 0
