"""The service as a process of its own, over real HTTP: answers, refusals, company, limits, and its end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron3d.errors import ConfigError
from megatron3d.serve.classifier import open_classifier, probabilities
from megatron3d.serve.requests import Sample
from megatron3d.serve.trained import ServeOverrides, load_classifier, open_trained
from tests.serve.conftest import Exported
from tests.serve.small import MAX_LENGTH, WORDS
from tests.serve.started import ROOT, Started, command, start

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e '.[serve]'")
pytest.importorskip("starlette", reason="starlette is not installed: pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install -e '.[serve]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e '.[onnx]'")
httpx = pytest.importorskip("httpx", reason="httpx is not installed; the tests need a client of HTTP")
bind = pytest.importorskip("megatron3d.serve.server").bind

Get = Callable[[str], Exported]
TEXTS = ["good", "a long , dull film .", "it was not bad", "why is this good ? it is not !", "very poor", "Great plot."]


def ask(service: Started, body: object) -> httpx.Response:
    """POST an object, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{service.url}/classify", content=content, timeout=60)


def message_of(response: httpx.Response) -> str:
    """The sentence of a refusal, whose form is the same for all."""
    error = response.json()["error"]
    assert error["status"] == response.status_code and set(error) == {"status", "message"}
    return error["message"]


def torch_scores(one: Exported, texts: list[str]) -> np.ndarray:
    """Probabilities [N, C] by torch, from the checkpoint, without ONNX and without a batch."""
    model = load_classifier(open_trained(one.checkpoint, None, ServeOverrides()))
    rows = open_classifier(one.path, threads=1).encode([Sample(text) for text in texts], truncate=False)
    found = []
    with torch.no_grad():
        for row in rows:
            ids_BS = torch.tensor([row.ids])
            found.append(model(ids_BS, torch.zeros_like(ids_BS), torch.ones_like(ids_BS))[0].numpy())
    return np.array([probabilities(logits_C) for logits_C in found])


def test_answers_are_those_of_torch_one_by_one_and_as_a_list(service: Started, exported: Get) -> None:
    expected_NC = torch_scores(exported("single"), TEXTS)
    listed = ask(service, {"texts": TEXTS})
    assert listed.status_code == 200 and listed.headers["content-type"] == "application/json"
    for text, answer, expected_C in zip(TEXTS, listed.json()["results"], expected_NC, strict=True):
        scores_C = [answer["scores"]["negative"], answer["scores"]["positive"]]
        assert scores_C == pytest.approx(expected_C, abs=1e-5)
        assert answer["label"] == ("negative", "positive")[int(expected_C.argmax())]
        single = ask(service, {"text": text}).json()
        assert single["label"] == answer["label"] and single["scores"] == pytest.approx(answer["scores"], abs=1e-5)
    assert {answer["label"] for answer in listed.json()["results"]} == {"negative", "positive"}


BAD = [
    (b"", 400, "the body is empty"),
    (b"text=good", 400, "the body is not JSON"),
    (b"\xff\xfe", 400, "the body is not UTF-8"),
    (["good"], 400, "the body is a list"),
    ({}, 422, "neither is given"),
    ({"text": 7}, 422, "'text' is a number; it must be a string"),
    ({"text": ""}, 422, "'text' is empty"),
    ({"texts": []}, 422, "'texts' is an empty list"),
    ({"texts": ["good", None]}, 422, "'texts[1]' is null"),
    ({"texts": ["good"] * 9}, 413, "'texts' has 9 texts and 8 are allowed"),
    ({"text": "good " * MAX_LENGTH}, 413, f"text 0 has {MAX_LENGTH + 2} tokens, 2 special ones included"),
    ({"text": "good", "language": "en"}, 422, "the field 'language' is not known"),
    ({"text": "good", "pair": "bad"}, 422, "sst-2 judges single texts"),
    ({"text": "\u200b"}, 422, "text 0 has no characters that the model reads"),
    ({"text": "x" * 5000}, 413, "the body has more than 4096 bytes"),
    (b" " * 3_000_000, 413, "the body has more than 4096 bytes"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD)
def test_bad_requests_get_a_sentence_and_the_service_goes_on(
    service: Started, body: object, status: int, message: str
) -> None:
    response = ask(service, body)
    assert response.status_code == status and message in message_of(response)
    assert ask(service, {"text": "good"}).status_code == 200


@pytest.mark.parametrize(
    "begun",
    [
        b"Content-Length: 1000000\r\n\r\n{",
        b"Transfer-Encoding: chunked\r\n\r\n1388\r\n" + b" " * 5000 + b"\r\n",
    ],
    ids=["announced", "in pieces"],
)
def test_a_body_that_is_too_long_is_refused_before_its_end(service: Started, begun: bytes) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\n" + begun)
        answer = HTTPResponse(connection)
        answer.begin()
        assert answer.status == 413 and b"more than 4096 bytes" in answer.read()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/classify", 405), ("PUT", "/classify", 405), ("POST", "/health", 405), ("POST", "/", 404)],
)
def test_wrong_methods_and_paths_are_told_which_there_are(
    service: Started, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, service.url + path, timeout=60)
    assert response.status_code == status
    assert "POST /classify and GET /health are there" in message_of(response)
    if status == 405:
        assert ("POST" if path == "/classify" else "GET") in response.headers["allow"]


def test_what_is_no_http_at_all_ends_its_own_connection_only(service: Started) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(b"good morning\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert ask(service, {"text": "good"}).status_code == 200


def test_many_clients_at_once_each_get_their_own_answer_in_shared_batches(service: Started) -> None:
    asked = [TEXTS[number % len(TEXTS)] + " " + WORDS[number % 20] for number in range(64)]
    alone = {text: ask(service, {"text": text}).json() for text in set(asked)}
    before = httpx.get(f"{service.url}/health").json()
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(16) as threads:
        bodies = [{"text": text} for text in asked]
        found = list(threads.map(lambda body: client.post(f"{service.url}/classify", json=body).json(), bodies))
    for text, answer in zip(asked, found, strict=True):
        assert answer["label"] == alone[text]["label"]
        assert answer["scores"] == pytest.approx(alone[text]["scores"], abs=1e-5)
    after = httpx.get(f"{service.url}/health").json()
    assert after["texts"] - before["texts"] == after["answered"] - before["answered"] == len(asked)
    assert after["batches"] - before["batches"] < len(asked), "no two requests shared a batch"


def test_health_says_what_is_served_and_counts(service: Started) -> None:
    before = httpx.get(f"{service.url}/health").json()
    ask(service, {"texts": ["good", "bad"]})
    ask(service, {})
    after = httpx.get(f"{service.url}/health").json()
    assert {key: after[key] for key in ("status", "task", "labels", "pairs", "max_tokens", "precision")} == {
        "status": "ok",
        "task": "sst-2",
        "labels": ["negative", "positive"],
        "pairs": "no",
        "max_tokens": MAX_LENGTH,
        "precision": "fp32",
    }
    grown = {key: after[key] - before[key] for key in ("answered", "refused", "failed", "texts")}
    assert grown == {"answered": 1, "refused": 1, "failed": 0, "texts": 2}


def test_it_listens_on_this_machine_alone_unless_told_otherwise(service: Started) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", service.url)
    with pytest.raises(OSError):
        # All of 127.0.0.0/8 is this machine: a service on every address would answer here.
        socket.create_connection(("127.0.0.2", service.port), timeout=5).close()


def test_sigterm_answers_what_is_under_way_and_ends_with_code_0(exported: Get) -> None:
    # The lone text waits a second for company, so that the signal comes in the middle of its request.
    options = ["--max-wait-ms", "1000", "--log-interval", "0.2", "--truncate", "--threads", "1"]
    with start("--model", exported("regression").path, *options) as started, ThreadPoolExecutor(1) as threads:
        pair = {"text": "good " * MAX_LENGTH, "pair": "a good film"}
        answer = threads.submit(ask, started, pair)
        deadline = time.monotonic() + 60
        while in_progress(started) < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert started.end(signal.SIGTERM) == 0
        response = answer.result(60)
        assert response.status_code == 200, response.text
        assert 0 <= response.json()["value"] <= 5 and response.json()["truncated"] is True
        assert started.lines[-1] == "stopped; 1 requests answered with 1 texts in 1 batches, 0 refused, 0 failed"
        with pytest.raises(httpx.ConnectError):
            ask(started, pair)


def in_progress(started: Started) -> int:
    """Requests that the service has read and not answered yet."""
    return httpx.get(f"{started.url}/health", timeout=60).json()["in_progress"]


def refused(*options: str | Path) -> subprocess.CompletedProcess[str]:
    """A service that does not start."""
    return subprocess.run(command(*options), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_port_in_use_is_said_before_the_model_is_read(service: Started) -> None:
    ended = refused("--model", "nowhere.onnx", "--port", str(service.port))
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: --host 127.0.0.1 --port {service.port} is not to be had")
    assert "give another port, or 0 for any free one" in ended.stderr and "Traceback" not in ended.stderr


def test_a_port_is_taken_from_the_moment_it_is_bound() -> None:
    with bind("127.0.0.1", 0) as bound, pytest.raises(ConfigError, match="is not to be had"):
        bind("127.0.0.1", bound.getsockname()[1])


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_this_machines_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host} --port 0 is not to be had"):
        bind(host, 0)


def test_options_that_cannot_work_are_told_together() -> None:
    options = "--threads -1 --max-batch 0 --max-wait-ms 2000 --max-waiting 1 --max-body-bytes 1 --port 65536"
    ended = refused("--model", "nowhere.onnx", *options.split(), "--log-interval", "nan")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    for sentence in (
        "--threads -1 must be at least 0",
        "--max-batch 0 must be at least 1",
        "--max-wait-ms 2000 must be at most 1000",
        "--max-body-bytes 1 must be at least 64",
        "--port 65536 must be at most 65535",
        "--log-interval nan must be at least 0",
        "--max-waiting 1 is less than --max-texts 128",
    ):
        assert sentence in ended.stderr


def test_a_model_that_is_none_ends_with_a_sentence_and_the_code_of_data(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no model")
    ended = refused("--model", tmp_path / "model.onnx", "--port", "0")
    assert ended.returncode == 3 and "Traceback" not in ended.stderr
    assert "does not end with the digest" in ended.stderr


def test_serving_needs_no_torch() -> None:
    program = "import sys; import tools.serve_classifier; sys.exit('torch' in sys.modules)"
    ended = subprocess.run([command()[0], "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
