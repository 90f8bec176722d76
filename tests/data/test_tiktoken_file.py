"""TikTokenizer: ids equal to those of Megatron-LM's, which are tiktoken's behind a block of special tokens."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex

from megatron3d.data.tiktoken_file import PATTERNS, TikTokenOptions
from megatron3d.data.tokenizer import Tokenizer, build_tokenizer
from megatron3d.errors import ConfigError, DataError

TEXTS = (
    "The quick brown fox's 12 jumps, isn't it?\r\n\r\n  Two  spaces\tand tabs \n",
    "Größe, naïve café; e\u0301 combining; ΑΒΓ αβγ; ПРИВЕТ мир; ١٢٣ ४५६; 日本語のテキスト、。",
    "camelCase HTTPServer XMLHttp iPhone ǅungla ªº ⅷ ² ₂ ½",
    "def f(x):\n    return x**2  # comment/path/to\n\n\n",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 \U0001f600\u200d; nbsp\u00a0thin\u2009nel\u0085ls\u2028ps\u2029ff\x0cvt\x0bbom\ufeffend",
    "<s> and </s> and <SPECIAL_3> are no special tokens in a text",
    "     \n   \n x\n\t\t\n",
    "",
)


def reference_ids(text: str, pattern: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm, as its README states it: while two neighbours make a token, join those of lowest rank."""
    found = []
    for word in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while word.encode() not in ranks or len(parts) > 1:
            if word.encode() in ranks:
                parts = [word.encode()]
                break
            joins = [(ranks[a + b], place) for place, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not joins:
                break
            _, place = min(joins)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        found += [ranks[part] for part in parts]
    return found


def train(pattern: str, num_merges: int) -> list[bytes]:
    """Byte-level BPE in the slowest way, on `TEXTS`."""
    words = Counter(word.encode() for text in TEXTS for word in regex.findall(pattern, text))
    cut = {word: [bytes([byte]) for byte in word] for word in words}
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(num_merges):
        pairs = Counter(pair for word in words for pair in pairwise(cut[word]))
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None:
            break
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
        for parts in cut.values():
            place = 0
            while place < len(parts) - 1:
                if (parts[place], parts[place + 1]) == best:
                    parts[place : place + 2] = [best[0] + best[1]]
                place += 1
    return tokens


def write(path: Path, tokens: list[bytes]) -> Path:
    """A vocabulary file as Megatron-LM reads it."""
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module", params=["v1", "v2"])
def pattern(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokens(pattern: str) -> list[bytes]:
    return train(PATTERNS[pattern], 150)


def build(path: Path, vocab_size: int | None, **options: object) -> Tokenizer:
    return build_tokenizer(
        "TikTokenizer", tokenizer_model=str(path), vocab_size=vocab_size, tiktoken=TikTokenOptions(**options)
    )


def random_texts(seed: int, count: int) -> list[str]:
    """Pieces of `TEXTS` and random characters, put together."""
    generator = random.Random(seed)
    whole = "".join(TEXTS)
    texts = []
    for _ in range(count):
        pieces = []
        for _ in range(generator.randrange(1, 8)):
            start = generator.randrange(len(whole))
            pieces.append(whole[start : start + generator.randrange(1, 12)])
            character = generator.randrange(0x3000)
            pieces.append(chr(character))
        texts.append("".join(pieces))
    return texts


def test_ids_equal_those_of_the_published_algorithm(tmp_path: Path, pattern: str, tokens: list[bytes]) -> None:
    tokenizer = build(write(tmp_path / "v.json", tokens), len(tokens) + 10, pattern=pattern, num_special_tokens=10)
    ranks = {token: rank + 10 for rank, token in enumerate(tokens)}
    for text in (*TEXTS, *random_texts(7, 300)):
        ids = tokenizer.encode(text)
        assert ids == reference_ids(text, PATTERNS[pattern], ranks), repr(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert max(max(tokenizer.encode(text), default=0) for text in TEXTS) > 266, "no merge was made"


@pytest.mark.parametrize("seed", range(6))
def test_ids_equal_those_of_the_published_algorithm_for_any_vocabulary(tmp_path: Path, seed: int) -> None:
    """Tokens at random, of which many are reached by several orders of merges and some by none."""
    generator = random.Random(seed)
    tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
    while len(tokens) < 296:
        tokens[bytes(generator.choice(b"abc") for _ in range(generator.randrange(2, 6)))] = None
    tokenizer = build(write(tmp_path / "v.json", list(tokens)), None, num_special_tokens=3)
    ranks = {token: rank + 3 for rank, token in enumerate(tokens)}
    for _ in range(100):
        text = "".join(generator.choice("abc") for _ in range(generator.randrange(1, 25)))
        assert tokenizer.encode(text) == reference_ids(text, PATTERNS["v2"], ranks), text


def test_ids_equal_those_of_tiktoken(tmp_path: Path, pattern: str, tokens: list[bytes]) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<SPECIAL_3>": 3}
    ranks = {token: rank + 4 for rank, token in enumerate(tokens)}
    theirs = tiktoken.Encoding(name="t", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=special)
    ours = build(write(tmp_path / "v.json", tokens), len(tokens) + 4, pattern=pattern, num_special_tokens=4)
    every_character = [chr(code) + "a " + chr(code) * 2 for code in range(1, 0x11000) if not 0xD800 <= code < 0xE000]
    for text in (*TEXTS, *random_texts(8, 500), *every_character):
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text), repr(text)
        assert ours.decode(ids) == theirs.decode(ids)


def test_special_tokens_come_first_and_only_their_names_decode(tmp_path: Path, tokens: list[bytes]) -> None:
    path = write(tmp_path / "v.json", tokens)
    tokenizer = build(path, 300, num_special_tokens=6, special_tokens=("<pad>", "<unk>", "<s>", "</s>"))
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (300, 2, 3)
    assert tokenizer.decode([0, 3, 5, 6 + ord("a")]) == "<pad></s><SPECIAL_5>a"
    assert min(tokenizer.encode("<s></s>")) >= 6
    assert max(tokenizer.encode("".join(TEXTS))) < 300


def test_without_a_vocab_size_all_tokens_of_the_file_count(tmp_path: Path, tokens: list[bytes]) -> None:
    assert build(write(tmp_path / "v.json", tokens), None).vocab_size == len(tokens) + 1000


@pytest.mark.parametrize(
    ("options", "vocab_size", "sentence"),
    [
        ({"special_tokens": ("<s>",)}, None, "<s> must name each token once, and <unk>, <s>, </s> among them"),
        ({"special_tokens": ("<s>", "<s>", "</s>", "<unk>")}, None, "must name each token once"),
        ({"num_special_tokens": 2}, None, "--tiktoken-num-special-tokens 2 is less than the 3 named"),
        ({"num_special_tokens": 5}, 5, "--vocab-size 5 does not go with"),
        ({"num_special_tokens": 5}, 100000, "--vocab-size 100000 does not go with"),
    ],
)
def test_impossible_options_are_refused(
    tmp_path: Path, tokens: list[bytes], options: dict[str, object], vocab_size: int | None, sentence: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        build(write(tmp_path / "v.json", tokens), vocab_size, **options)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read as the JSON"),
        ("{}", "a JSON list of at least 256 tokens"),
        (json.dumps([{"rank": 0}] * 256), "entry 0 is no token"),
        (json.dumps([{"rank": 1, "token_bytes": "AA=="}] * 256), "entry 0 is no token"),
        (json.dumps([{"rank": n, "token_bytes": "!"} for n in range(256)]), "entry 0 is no token"),
        (json.dumps([{"rank": n, "token_bytes": "AA=="} for n in range(256)]), "token 1 must be the byte 1"),
        (json.dumps([0] * 256), "entry 0 is no token"),
    ],
)
def test_a_file_of_another_format_is_refused_by_name(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(DataError) as raised:
        build(tmp_path / "v.json", None)
    assert sentence in str(raised.value) and "v.json" in str(raised.value)
