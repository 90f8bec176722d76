"""Bodies of requests: what is read out of good ones, and the status and sentence for every kind of bad one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron3d.serve.description import ClassifierDescription
from megatron3d.serve.requests import ParsedRequest, RequestError, RequestLimits, Sample, parse

EITHER = ClassifierDescription("imported", ("a", "b"), False, None, None, 20)
SINGLE, PAIRS = replace(EITHER, task="sst-2", num_texts=1), replace(EITHER, task="mrpc", num_texts=2)
LIMITS = RequestLimits(max_body_bytes=200, max_texts=3)

BAD = [
    ("", 400, "the body is empty"),
    ("  \n", 400, "the body is empty"),
    ("text=good", 400, "the body is not JSON"),
    ('{"text": "good"', 400, "the body is not JSON"),
    ("[" * 150, 400, "the body is not JSON"),
    ("9" * 190, 400, "the body is a number"),
    ('["good"]', 400, "the body is a list; send an object"),
    ('"good"', 400, "the body is a string; send an object"),
    ("null", 400, "the body is null; send an object"),
    ("{}", 422, "give either 'text', a string, or 'texts', a list of strings; neither is given"),
    ('{"text": "a", "texts": ["a"]}', 422, "both are given"),
    ('{"text": 7}', 422, "'text' is a number; it must be a string"),
    ('{"text": true}', 422, "'text' is true or false; it must be a string"),
    ('{"text": null}', 422, "'text' is null; it must be a string"),
    ('{"text": ["a"]}', 422, "'text' is a list; it must be a string"),
    ('{"text": ""}', 422, "'text' is empty; give a text"),
    ('{"text": " \\n "}', 422, "'text' is empty; give a text"),
    ('{"text": "\\ud83d"}', 422, "'text' has half of a character"),
    ('{"texts": "good"}', 422, "'texts' is a string; it must be a list of strings"),
    ('{"texts": []}', 422, "'texts' is an empty list"),
    ('{"texts": ["a", 7]}', 422, "'texts[1]' is a number"),
    ('{"texts": ["a", ""]}', 422, "'texts[1]' is empty"),
    ('{"texts": ["a", "b", "c", "d"]}', 413, "'texts' has 4 texts and 3 are allowed; send several requests"),
    ('{"txet": "good"}', 422, "the field 'txet' is not known; did you mean 'text'? The fields are text, pair"),
    ('{"text": "a", "temperature": 1}', 422, "the field 'temperature' is not known; The fields are"),
    ('{"text": "a", "pairs": ["b"]}', 422, "'pairs' does not go with 'text'"),
    ('{"texts": ["a"], "pair": "b"}', 422, "'pair' does not go with 'texts'"),
    ('{"text": "a", "pair": 7}', 422, "'pair' is a number"),
    ('{"texts": ["a", "b"], "pairs": ["c"]}', 422, "'texts' has 2 entries and 'pairs' 1; give as many"),
    ('{"text": "' + "a" * 200 + '"}', 413, "the body has more than 200 bytes"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD)
def test_a_bad_body_gets_its_status_and_a_sentence(body: str, status: int, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body.encode(), EITHER, LIMITS)
    assert caught.value.status == status and message in str(caught.value)


def test_a_body_that_is_not_utf_8_is_refused_with_the_place() -> None:
    with pytest.raises(RequestError, match=r"not UTF-8 \(byte 10\)") as caught:
        parse(b'{"text": "\xff"}', EITHER, LIMITS)
    assert caught.value.status == 400


GOOD = [
    ({"text": "a"}, ParsedRequest((Sample("a"),), False)),
    ({"text": "a", "pair": "b"}, ParsedRequest((Sample("a", "b"),), False)),
    ({"texts": ["a"]}, ParsedRequest((Sample("a"),), True)),
    ({"texts": ["a", "ü"]}, ParsedRequest((Sample("a"), Sample("ü")), True)),
    ({"texts": ["a", "b"], "pairs": ["c", "d"]}, ParsedRequest((Sample("a", "c"), Sample("b", "d")), True)),
]


@pytest.mark.parametrize(("fields", "asked"), GOOD)
def test_good_bodies_give_their_samples_in_order(fields: dict[str, object], asked: ParsedRequest) -> None:
    assert parse(json.dumps(fields).encode(), EITHER, LIMITS) == asked


def test_a_model_of_pairs_needs_pairs_and_one_of_texts_refuses_them() -> None:
    for name, second, fields in (("text", "pair", {"text": "a"}), ("texts", "pairs", {"texts": ["a"]})):
        alone = json.dumps(fields).encode()
        together = json.dumps(fields | {second: fields[name]}).encode()
        assert parse(alone, SINGLE, LIMITS).samples == (Sample("a"),)
        assert parse(together, PAIRS, LIMITS).samples == (Sample("a", "a"),)
        with pytest.raises(RequestError, match=f"mrpc compares two texts; give the second one in '{second}' too"):
            parse(alone, PAIRS, LIMITS)
        with pytest.raises(RequestError, match=f"sst-2 judges single texts; leave '{second}' out"):
            parse(together, SINGLE, LIMITS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["text", "texts", "x"]), inner),
    max_leaves=6,
)
FIELDS = st.dictionaries(st.sampled_from(["text", "pair", "texts", "pairs"]), JSON, max_size=3)


@given(FIELDS.map(json.dumps).map(str.encode) | JSON.map(json.dumps).map(str.encode) | st.binary(max_size=30))
def test_every_body_is_either_read_or_refused_with_a_status_of_the_clients_fault(body: bytes) -> None:
    try:
        asked = parse(body, EITHER, LIMITS)
    except RequestError as error:
        assert error.status in (400, 413, 422) and str(error)
    else:
        fields = json.loads(body)
        texts = fields["texts"] if asked.is_list else [fields["text"]]
        assert [sample.text for sample in asked.samples] == texts and all(text.strip() for text in texts)
