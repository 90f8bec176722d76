"""Runs that are killed, stopped and damaged at random and started again until they are done: nothing may be lost.

Each seed draws a layout and, start by start, what happens to the run: signals to one rank or to all at a random moment
(between steps, inside one, during a save), and between two starts damage to the newest checkpoint, to `latest` or to
the end of the metrics file. At the end every loss, every validation loss and every stored tensor must equal those of
a run to which nothing happened, bit for bit, and each step must stand once in the metrics file.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from megatron3d.checkpoint.directory import list_checkpoints
from megatron3d.checkpoint.load import assemble, tensor_shapes
from tests.runs.harness import MOCK, Job, Launcher, exit_status, losses, records, words

SEEDS = range(24)
NUM_STEPS = 24
MIN_STARTS, MAX_STARTS = 5, 40
COMMON = (
    f"{MOCK} --train-iters {NUM_STEPS} --save-interval 3 --keep-last 4 --eval-interval 5 --eval-iters 1 "
    "--hidden-dropout 0.1 --attention-dropout 0.1 --fall-back-to-previous-checkpoint "
    "--distributed-timeout-minutes 0.3"  # a rank that dies before it joins leaves the others waiting for so long
)
OFFLOADED = "--offload-optimizer nvme --offload-dir"
# Layouts of two ranks by name; {folder} is a directory for offloaded state.
LAYOUTS = {
    "DP2": "",
    "ZeRO 1 with gathers under way": "--zero-stage 1 --overlap-param-gather",
    "ZeRO 2 in bf16": "--zero-stage 2 --bf16",
    "ZeRO 3 in files": f"--zero-stage 3 --offload-params nvme {OFFLOADED} {{folder}}",
    "delayed update": "--zero-stage 1 --offload-optimizer cpu --offload-delayed-update",
    "PP2": "--pipeline-model-parallel-size 2",
    "PP2 on a V": "--pipeline-model-parallel-size 2 --pipeline-schedule zb-v --pipeline-model-parallel-layout E|t|t|L",
    "TP2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "fp16": "--fp16 --initial-loss-scale 65536",
}
# What a start may end with: done; a peer was lost; asked to stop; forced to end; killed, or signalled before it joined.
EXPECTED_CODES = {0, 6, 75, 130, 143, *(-int(one) for one in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1))}


@dataclass
class Chaos:
    """One run under attack: what was done to it, by name, and the random numbers that decide."""

    random: random.Random
    save: Path
    metrics: Path
    done: Counter[str] = field(default_factory=Counter)

    def disturb(self, job: Job) -> None:
        """Let the run make some steps, and then end it in one of several ways."""
        before = _steps_recorded(self.metrics)
        self._wait_for_steps(job, before + self.random.randint(0, 6))
        time.sleep(self.random.random() * 0.05)
        attacks = ["kill one", "kill all", "stop all", "stop one", "interrupt"]
        attack = self.random.choice(attacks if self.done["starts"] < MIN_STARTS else [*attacks, "leave alone"])
        self.done[attack] += 1
        one = self.random.randrange(len(job.pids))
        every = tuple(range(len(job.pids)))
        number, ranks = {
            "kill one": (signal.SIGKILL, (one,)),
            "kill all": (signal.SIGKILL, every),
            "stop all": (signal.SIGTERM, every),
            "stop one": (signal.SIGUSR1, (one,)),
            "interrupt": (signal.SIGINT, every),
            "leave alone": (0, ()),
        }[attack]
        for rank in ranks:
            _send(job, rank, number)
        codes = set(job.wait())
        assert codes <= EXPECTED_CODES, f"{attack}: {codes}; rank 0 said:\n{job.said(0)}"

    def _wait_for_steps(self, job: Job, count: int) -> None:
        deadline = time.monotonic() + 120
        while _steps_recorded(self.metrics) < min(count, NUM_STEPS):
            if job.launcher.has_ended(job.pids[0]) or time.monotonic() > deadline:
                return
            time.sleep(0.005)

    def damage(self) -> None:
        """Between two starts, sometimes harm what lies on the disk; two whole checkpoints always stay."""
        if self.metrics.exists() and self.random.random() < 0.3:
            self.done["torn line"] += 1
            with self.metrics.open("ab") as file:
                file.write(b'{"step": 3, "lo')
        harms: list[tuple[str, Callable[[Path], None]]] = [
            ("flipped bit", self._flip),
            ("truncated", self._truncate),
            ("lost file", lambda newest: self.random.choice(sorted(newest.glob("*.safetensors"))).unlink()),
            ("lost index", lambda newest: (newest / "index.json").unlink()),
            ("empty latest", lambda newest: (newest.parent / "latest").write_text("")),
            ("latest to nowhere", lambda newest: (newest.parent / "latest").write_text("iter_0999999\n")),
            ("no latest", lambda newest: (newest.parent / "latest").unlink()),
            ("left over", lambda newest: shutil.copytree(newest, newest.parent / ".tmp-iter_0000099")),
        ]
        for _ in range(self.random.choice([0, 0, 1, 1, 2])):
            found = list_checkpoints(self.save)
            if len(found) < 3:
                return
            name, harm = self.random.choice(harms)
            if not any(found[-1].glob("*.safetensors")):
                continue  # harmed already
            if name == "no latest" and not (self.save / "latest").exists():
                continue
            if name == "left over" and (self.save / ".tmp-iter_0000099").exists():
                continue
            harm(found[-1])
            self.done[name] += 1

    def _flip(self, newest: Path) -> None:
        shard = self.random.choice(sorted(newest.glob("*.safetensors")))
        content = bytearray(shard.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        shard.write_bytes(content)

    def _truncate(self, newest: Path) -> None:
        shard = self.random.choice(sorted(newest.glob("*.safetensors")))
        shard.write_bytes(shard.read_bytes()[: self.random.randrange(shard.stat().st_size)])


def _send(job: Job, rank: int, number: int) -> None:
    if not job.launcher.has_ended(job.pids[rank]):
        job.signal(number, rank)


def _steps_recorded(metrics: Path) -> int:
    return metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0


def _options(layout: str, folder: Path, save: Path, metrics: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    flags = LAYOUTS[layout].format(folder=folder)
    return words(COMMON, flags, "--save", save, "--metrics-file", metrics)


def _stored(save: Path) -> Iterator[tuple[str, torch.Tensor]]:
    newest = list_checkpoints(save)[-1]
    yield from ((name, assemble(newest, name)) for name in sorted(tensor_shapes(newest)))


def _validation(metrics: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["valid_loss"]) for record in records(metrics) if "valid_loss" in record]


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of a layout to which nothing happens, made once for all seeds that draw the layout."""
    folders: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in folders:
            folder = tmp_path_factory.mktemp("whole")
            options = _options(layout, folder / "offload", folder / "save", folder / "metrics.jsonl")
            with launcher.job(options, 2) as job:
                assert job.wait() == [0, 0], job.said(0)
            folders[layout] = folder
        return folders[layout]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_that_is_killed_stopped_and_damaged_at_random_loses_nothing(
    launcher: Launcher, tmp_path: Path, undisturbed: Callable[[str], Path], seed: int
) -> None:
    chance = random.Random(seed)
    layout = [*LAYOUTS][seed % len(LAYOUTS)]
    whole = undisturbed(layout)
    save, metrics = tmp_path / "save", tmp_path / "metrics.jsonl"
    chaos = Chaos(chance, save, metrics)
    options = _options(layout, tmp_path / "offload", save, metrics)
    options += ["--async-save"] * (seed % 2)  # each layout has an odd seed and an even one
    for _ in range(MAX_STARTS):
        chaos.done["starts"] += 1
        had_checkpoint = bool(list_checkpoints(save))
        with launcher.job(options, 2) as job:
            chaos.disturb(job)
            said = job.said(0)
        if set(job.codes.values()) == {0}:
            break
        assert not (had_checkpoint and "starting from the initial weights" in said), f"a checkpoint was there:\n{said}"
        chaos.damage()
    else:
        pytest.fail(f"the run is not done after {MAX_STARTS} starts; {dict(chaos.done)}")
    print(f"seed {seed}, {layout}: {dict(chaos.done)}")
    assert losses(metrics) == losses(whole / "metrics.jsonl")
    assert _validation(metrics) == _validation(whole / "metrics.jsonl")
    ours, theirs = dict(_stored(save)), dict(_stored(whole / "save"))
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{different} differ; {dict(chaos.done)}"
    assert exit_status(save)["code"] == 0
