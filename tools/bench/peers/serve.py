"""The process of a peer: builds it, makes a step, then as many as each line of its standard input asks for.

Started by `start.py` as `python -m tools.bench.peers.serve MODULE WORK`. Answers are JSON lines on what standard output
was at the start; whatever the framework itself prints goes to standard error. When standard input ends, as it does when
the benchmark is killed, so does this process with all that it has started, even in the middle of a step.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from queue import SimpleQueue
from typing import TextIO

from tools.bench.peers.work import Work

RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


def main() -> None:
    """Serve one peer until the standard input ends."""
    counts: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_read_counts, args=(counts,), daemon=True).start()
    import torch

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    module, work = sys.argv[1], Work(**json.loads(sys.argv[2]))
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    trainee = importlib.import_module(module).build(work)
    _answer(answers, parameters=trainee.num_parameters, first_loss=trainee.step())
    trainee.step()  # The second step is the first that finds everything allocated; it is not timed either.
    while True:
        seconds, loss = [], 0.0
        for _ in range(counts.get()):
            began_s = time.perf_counter()
            loss = trainee.step()
            seconds.append(time.perf_counter() - began_s)
        sent = trainee.sent_bytes() if trainee.sent_bytes else {}
        _answer(answers, seconds=seconds, loss=loss, peak_bytes=_peak_bytes(), sent_bytes=sent)


def _read_counts(counts: SimpleQueue[int]) -> None:
    for line in sys.stdin:
        counts.put(int(line))
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def _answer(answers: TextIO, **values: object) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES


if __name__ == "__main__":
    main()
