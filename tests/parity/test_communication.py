"""Communication is counted, not timed: calls and bytes of one training step equal their closed formulas.

Symbols: L layers of a stage, M micro-batches of a rank, n = S*B*H*4 bytes of one whole hidden tensor (fp32),
t tokens S*B of a micro-batch, P bytes of the padded flat buffers of a rank, U number of units.
"""

from __future__ import annotations

import os

import pytest

from megatron3d.comm.layout import Layout
from megatron3d.comm.mesh import make_mesh
from megatron3d.data.build import build_gpt_data
from megatron3d.data.loader import GlobalBatches
from megatron3d.train.step import train_step
from tests.dist.pool import Pool
from tests.parity.runs import RATES, VOCAB_SIZE, Case, parts_of

S, B, H, LAYERS, GLOBAL_BATCH = 16, 2, 32, 4, 8
FP32 = 4
HIDDEN = S * B * H * FP32
TOKENS = S * B
SP = "--sequence-parallel"
RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

Counts = dict[tuple[str, str], tuple[int, int]]


def counted_step(rank: int, world_size: int, case: Case) -> tuple[Counts, dict[str, tuple[int, int]]]:
    """Counts of one step on this rank, and of each unit its flat length and its elements that are partial over tp."""
    mesh = make_mesh(case.layout)
    parts = parts_of(case, mesh)
    config = parts.config
    data = build_gpt_data(config.data, seq_length=S, vocab_size=VOCAB_SIZE, eod_token=0)
    with GlobalBatches(data.reader(data.train), num_workers=config.data.num_workers) as batches:
        batch = batches.read(0, GLOBAL_BATCH, mesh.batch.rank, mesh.batch.size)
    mesh.meter.reset()
    train_step(parts, batch, RATES, step=0)
    units = {
        name: (
            unit.layout.length,
            sum(s.span.length for s in unit.layout.segments if s.tp_gradient == "partial"),
        )
        for name, unit in parts.engine.units.items()
    }
    return mesh.meter.read(), units


def only(counts: Counts, axis: str) -> dict[str, tuple[int, int]]:
    """The counts of one axis by collective."""
    return {collective: value for (name, collective), value in counts.items() if name == axis}


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_step_costs_four_all_reduces_a_layer(pool: Pool, tp: int) -> None:
    """Forward 2L + 1 (embedding), backward 2L + 1 (head), each n bytes; the loss one all-gather of 3t numbers
    of every rank.

    Source: Shoeybi et al. 2019, section 3 and figure 4: two all-reduces a layer in each direction.
    """
    for counts, _ in pool.run(tp, counted_step, Case("gpt2", Layout(tp=tp), f"--micro-batch-size {B}")):
        micros = GLOBAL_BATCH // B
        calls = micros * (4 * LAYERS + 2)
        assert only(counts, "tp") == {
            "all_reduce": (calls, calls * HIDDEN),
            "all_gather": (micros, micros * tp * 3 * TOKENS * FP32),
        }


@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallel_step_costs_gathers_and_scatters(pool: Pool, tp: int) -> None:
    """All-gathers: forward 2L + 1 (head), backward 4L + 2 (2L to gather the outputs' gradients, 1 the embedding's,
    2L + 1 to gather inputs again that were kept as shards). Reduce-scatters: forward 2L + 1, backward 2L + 1.
    Each moves n bytes, half of an all-reduce. Replicated parameters' gradients add one all-reduce together, the
    loss one all-gather of 3t numbers of every rank.

    Source: Korthikanti et al. 2022, section 4.2.2.
    """
    for counts, units in pool.run(tp, counted_step, Case("gpt2", Layout(tp=tp), f"{SP} --micro-batch-size {B}")):
        micros = GLOBAL_BATCH // B
        gathers, scatters = micros * (6 * LAYERS + 3), micros * (4 * LAYERS + 2)
        partial = [elements for _, elements in units.values() if elements]
        assert only(counts, "tp") == {
            "all_gather": (gathers + micros, gathers * HIDDEN + micros * tp * 3 * TOKENS * FP32),
            "reduce_scatter": (scatters, scatters * HIDDEN),
            "all_reduce": (1, FP32 * sum(partial)),
        }


@pytest.mark.parametrize("options", ["", SP])
def test_chunks_beside_products_send_the_same_bytes_in_more_calls(pool: Pool, options: str) -> None:
    """With C chunks: all-reduces of the forward's 2L row-parallel products; under sequence parallelism all-gathers of
    the 2L + 1 column-parallel products (head) and of 2L output gradients, and 2L reduce-scatters."""
    layout, more = Layout(tp=2), f"{options} --micro-batch-size {B}"
    whole = pool.run(2, counted_step, Case("gpt2", layout, more))
    cut = pool.run(2, counted_step, Case("gpt2", layout, f"{more} --tp-comm-overlap --tp-comm-overlap-chunks 4"))
    added = 3 * GLOBAL_BATCH // B
    for (without, _), (chunked, _) in zip(whole, cut, strict=True):
        expected = only(without, "tp")
        products = (
            {"all_gather": 4 * LAYERS + 1, "reduce_scatter": 2 * LAYERS} if options else {"all_reduce": 2 * LAYERS}
        )
        for collective, number in products.items():
            calls, size = expected[collective]
            expected[collective] = (calls + added * number, size)
        assert only(chunked, "tp") == expected


@pytest.mark.parametrize("options", ["", "--pipeline-schedule gpipe", SP])
def test_pipeline_step_sends_one_hidden_tensor_a_boundary_and_direction(pool: Pool, options: str) -> None:
    """A stage sends M activations unless it is last and M gradients unless it is first: n bytes each, n/tp with SP."""
    layout = Layout(tp=2, pp=2) if options == SP else Layout(pp=4)
    size = HIDDEN // (layout.tp if options == SP else 1)
    micros = GLOBAL_BATCH // B
    for rank, (counts, _) in enumerate(pool.run(layout.world_size, counted_step, Case("gpt2-untied", layout, options))):
        stage = layout.coordinates(rank)["pp"]
        boundaries = (stage > 0) + (stage < layout.pp - 1)
        expected = (micros * boundaries, micros * boundaries * size)
        assert only(counts, "pp") == {"send": expected, "receive": expected}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("micros", [1, 2])
def test_data_parallel_step_moves_the_volume_of_its_zero_stage(pool: Pool, zero: int, micros: int) -> None:
    """With P bytes and M micro-batches. ZeRO 0: one all-reduce of P. ZeRO 1: a reduce-scatter and an all-gather of P,
    the same volume. ZeRO 2: M reduce-scatters and one all-gather. ZeRO 3: M reduce-scatters and 2 M all-gathers, 3 P
    for each micro-batch, but that the embedding's backward reads no table (a tied one is read by the head's).
    Besides, eight bytes for the global token count.

    Source: Rajbhandari et al. 2020, section 7.
    """
    options = f"--zero-stage {zero} --micro-batch-size {GLOBAL_BATCH // 4 // micros}"
    for counts, units in pool.run(4, counted_step, Case("gpt2-untied", Layout(dp=4), options)):
        num_units, payload = len(units), FP32 * sum(length for length, _ in units.values())
        table = FP32 * units["embedding.word"][0]
        each = (micros * num_units, micros * payload)
        reductions = {
            0: {"all_reduce": (num_units, payload)},
            1: {"reduce_scatter": (num_units, payload)},
            2: {"reduce_scatter": each},
            3: {"reduce_scatter": each},
        }
        gathers = {
            0: {},
            1: {"all_gather": (num_units, payload)},
            2: {"all_gather": (num_units, payload)},
            3: {"all_gather": (2 * each[0] - micros, 2 * each[1] - micros * table)},
        }
        assert only(counts, "shard" if zero else "grad") == reductions[zero]
        assert only(counts, "gather") == gathers[zero]
        assert only(counts, "batch") == {"all_reduce": (1, 8)}
        assert only(counts, "world") == {"all_reduce": (1, 24)}  # loss, squared norm, votes to stop: fp64


@pytest.mark.parametrize("options", ["", "--zero-prefetch-units 0", "--zero-prefetch-units 3", RECOMPUTED])
def test_prefetching_and_recomputing_layer_by_layer_gather_no_more(pool: Pool, options: str) -> None:
    """Stage 3 of a tied model on one stage: the table is read once more, by the head. Recomputation of single layers
    finds the weights that the layer's backward needs anyway."""
    micros = GLOBAL_BATCH // 2 // B
    for counts, units in pool.run(2, counted_step, Case("gpt2", Layout(dp=2), f"--zero-stage 3 {options}")):
        payload = FP32 * sum(length for length, _ in units.values())
        gathered = (2 * micros * len(units) + micros, 2 * micros * payload + micros * FP32 * units["embedding.word"][0])
        assert only(counts, "gather") == {"all_gather": gathered}


@pytest.mark.parametrize("options", ["", SP])
def test_recomputing_from_kept_results_communicates_as_if_nothing_were_recomputed(pool: Pool, options: str) -> None:
    """Of a layer that is recomputed by communicating again, the second forward repeats all collectives but the last."""
    layout, ways = Layout(tp=2), ("", RECOMPUTED, f"{RECOMPUTED} --recompute-reuse-communication")
    plain, again, kept = (
        pool.run(2, counted_step, Case("gpt2", layout, f"{options} --micro-batch-size {B} {way}")) for way in ways
    )
    repeated = GLOBAL_BATCH // B * LAYERS * (1 if options != SP else 3)
    for without, naive, reusing in zip(plain, again, kept, strict=True):
        assert only(reusing[0], "tp") == only(without[0], "tp")
        calls = [sum(calls for calls, _ in only(counts, "tp").values()) for counts in (without[0], naive[0])]
        assert calls[1] - calls[0] == repeated


def counted_step_of_cut_tables(rank: int, world_size: int, case: Case) -> tuple[Counts, dict[str, tuple[int, int]]]:
    """Counts of one step on this rank, and of each unit its flat length and the number of its blocks."""
    mesh = make_mesh(case.layout)
    parts = parts_of(case, mesh)
    data = build_gpt_data(parts.config.data, seq_length=S, vocab_size=parts.config.model.vocab_size, eod_token=0)
    with GlobalBatches(data.reader(data.train), num_workers=0) as batches:
        batch = batches.read(0, GLOBAL_BATCH, mesh.batch.rank, mesh.batch.size)
    mesh.meter.reset()
    train_step(parts, batch, RATES, step=0)
    units = parts.engine.units
    return mesh.meter.read(), {name: (unit.layout.length, len(unit.blocks or ())) for name, unit in units.items()}


def test_a_table_in_blocks_is_gathered_in_as_many_parts_and_its_lookups_send_rows(pool: Pool) -> None:
    """Stage 3 of an untied model: bytes of gathers and reductions are those of whole units, in one call for each block;
    but the lookup's gradient is the rows and their numbers (int64), gathered from every rank."""
    case = Case("gpt2-untied", Layout(dp=2), "--zero-stage 3 --vocab-size 1029")
    micros = GLOBAL_BATCH // 2 // B
    for counts, units in pool.run(2, counted_step_of_cut_tables, case):
        (word, blocks), (output, blocks_of_output) = units.pop("embedding.word"), units.pop("head.output")
        others = FP32 * sum(length for length, _ in units.values())
        assert blocks == blocks_of_output > 1 and not any(count for _, count in units.values())
        calls = micros * (2 * len(units) + blocks + 2 * blocks)
        rows = (2, 2 * TOKENS * (H * FP32 + 8))
        assert only(counts, "gather") == {"all_gather": (calls, micros * (2 * others + FP32 * (word + 2 * output)))}
        assert only(counts, "shard") == {
            "all_gather": (micros * rows[0], micros * rows[1]),
            "reduce_scatter": (micros * (len(units) + blocks), micros * (others + FP32 * output)),
        }


def test_tied_embedding_costs_one_all_reduce_between_the_ends(pool: Pool) -> None:
    results = pool.run(4, counted_step, Case("gpt2", Layout(pp=4)))
    for stage, (counts, units) in enumerate(results):
        is_end = stage in (0, 3)
        expected = {"all_reduce": (1, FP32 * units["embedding.word"][0])} if is_end else {}
        assert only(counts, "tied") == expected
    assert results[0][1]["embedding.word"] == results[3][1]["embedding.word"]


def test_counts_are_those_of_the_step_alone() -> None:
    counts, _ = counted_step(0, 1, Case("gpt2", Layout()))
    assert counts == {}, "one process communicates with nobody"


def threads_of_process(rank: int, world_size: int) -> int:
    """Threads alive in this worker; each live gloo group has one."""
    return len(os.listdir("/proc/self/task"))


def finished_run(rank: int, world_size: int, case: Case) -> None:
    """A run that is over when this returns."""
    counted_step(rank, world_size, case)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc, which this system lacks")
def test_a_finished_run_leaves_no_process_group_behind(pool: Pool) -> None:
    case = Case("gpt2", Layout(tp=2, pp=2), SP)
    pool.run(4, finished_run, case)
    before = pool.run(4, threads_of_process)
    pool.run(4, finished_run, case)
    assert pool.run(4, threads_of_process) == before
