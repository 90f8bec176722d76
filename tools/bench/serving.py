"""Measures a running service: `python tools/bench/serving.py --url http://127.0.0.1:8000 --file glue/SST-2/dev.tsv`.

Each client is a thread with a connection of its own that asks, waits for the answer and asks again. The table has one
row for each number of clients and of texts a request: requests and texts a second, the median and the 99th percentile
of the time that a request takes, how many texts the service ran together, and texts for each second of its processor
time. The clients need the processor too: on the machine of the service they take a part of what they measure, but for
that last column.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from megatron3d.files.text import read_lines


@dataclass(frozen=True)
class Load:
    """How the service is asked: by how many clients at once, with how many texts a request, and for how long."""

    clients: int
    texts: int
    duration_s: float


def main() -> None:
    """Parse the options, put one load after another on the service, print the table."""
    parser = argparse.ArgumentParser(description="Measures a running service.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of tools/serve_classifier.py")
    parser.add_argument("--file", type=Path, required=True, help="a TSV file with a header line")
    parser.add_argument("--column", default="sentence", help="where its texts are")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 32], help="of a request")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    args = parser.parse_args()
    header, *lines = read_lines(args.file)
    at = header.split("\t").index(args.column)
    sentences = [line.split("\t")[at].strip() for line in lines]
    print("| clients | texts a request | requests/s | texts/s | median ms | 99% ms | texts a batch | texts/CPU s |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for texts, clients in itertools.product(args.texts, args.clients):
        print(row(args.url, sentences, Load(clients, texts, args.seconds)), flush=True)


def row(url: str, sentences: Sequence[str], load: Load) -> str:
    """Put one load on the service and report how it did."""
    before, begin_s = counts(url), time.perf_counter()
    elapsed_s: list[float] = []
    threads = [
        threading.Thread(target=_client, args=(url, sentences, load, number, elapsed_s))
        for number in range(load.clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall_s, after = time.perf_counter() - begin_s, counts(url)
    if len(elapsed_s) < 2:
        raise SystemExit(f"error: {url} answered {len(elapsed_s)} requests in {wall_s:.1f} s; is it the right address?")
    rate = len(elapsed_s) / wall_s
    texts, batches, cpu_s = (after[key] - before[key] for key in ("texts", "batches", "cpu_s"))
    median_s, last_s = statistics.median(elapsed_s), statistics.quantiles(elapsed_s, n=100)[98]
    return (
        f"| {load.clients} | {load.texts} | {rate:.1f} | {rate * load.texts:.0f} | {1e3 * median_s:.1f} "
        f"| {1e3 * last_s:.1f} | {texts / batches:.1f} | {texts / cpu_s:.0f} |"
    )


def _client(url: str, sentences: Sequence[str], load: Load, number: int, elapsed_s: list[float]) -> None:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "127.0.0.1", place.port, timeout=60)
    end_s = time.perf_counter() + load.duration_s
    # Each client begins elsewhere in the file, so that they do not all ask the same.
    at = number * len(sentences) // load.clients
    while (begin_s := time.perf_counter()) < end_s:
        texts = [sentences[(at + step) % len(sentences)] for step in range(load.texts)]
        at += load.texts
        body = json.dumps({"text": texts[0]} if load.texts == 1 else {"texts": texts})
        connection.request("POST", "/classify", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise ValueError(f"{url} refused a request ({response.status}): {answer.decode()}")
        elapsed_s.append(time.perf_counter() - begin_s)


def counts(url: str) -> dict[str, float]:
    """What the service says it has done so far."""
    with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
        return json.load(response)


if __name__ == "__main__":
    main()
