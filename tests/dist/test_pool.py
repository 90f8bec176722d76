"""The pool itself: results by rank, and an error that names the rank, never a hang, for each way a rank can fail."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megatron3d.train.signals import StopFlag
from tests.dist.pool import Pool, RankError


def _sum_of_ranks(rank: int, world_size: int, offset: int, scale: int = 1) -> tuple[int, int, int, float]:
    total = torch.tensor(float(rank + offset))
    dist.all_reduce(total)
    return rank, world_size, dist.get_world_size(), total.item() * scale


def _environment_of(rank: int, world_size: int) -> tuple[int, str, float]:
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], torch.rand(()).item()


def _rank_raises(rank: int, world_size: int, failing: int) -> None:
    if rank == failing:
        raise ValueError(f"the value {rank} is wrong")
    dist.barrier()


def _rank_sleeps(rank: int, world_size: int, sleeping: int) -> None:
    if rank == sleeping:
        time.sleep(1000)


def _rank_kills_itself(rank: int, world_size: int, dying: int) -> None:
    if rank == dying:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _rank_exits(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(3)
    dist.barrier()


def _unpicklable(rank: int, world_size: int) -> object:
    return lambda: rank


def _leave_early(rank: int, world_size: int) -> float:
    """Every rank but the last is done with its part of a chain of sends long before the last has received."""
    value = torch.full((1000,), float(rank))
    if rank > 0:
        if rank == world_size - 1:
            time.sleep(0.3)
        dist.recv(value, rank - 1)
    if rank < world_size - 1:
        dist.send(value + 1, rank + 1)
    return value[0].item()


def test_results_come_back_in_rank_order_with_arguments_passed(pool: Pool) -> None:
    results = pool.run(4, _sum_of_ranks, 10, scale=2)
    assert results == [(rank, 4, 4, 2 * (0 + 1 + 2 + 3 + 4 * 10)) for rank in range(4)]


def test_world_size_may_change_from_call_to_call_and_workers_are_kept(pool: Pool) -> None:
    pool.run(4, _sum_of_ranks, 0)
    pids = pool.worker_pids()
    assert [len(pool.run(n, _sum_of_ranks, 0)) for n in (1, 3, 2, 4)] == [1, 3, 2, 4]
    assert pool.worker_pids() == pids


def test_workers_have_one_thread_and_the_same_random_seed_in_every_call(pool: Pool) -> None:
    first, second = pool.run(2, _environment_of), pool.run(2, _environment_of)
    assert first == second and first[0] == first[1]
    assert first[0][:2] == (1, "1")


def test_tensors_come_back_by_value_and_outlive_the_worker() -> None:
    own = Pool()
    results = own.run(2, _tensor_result)
    own.close()
    assert torch.equal(results[1], torch.full((3, 2), 1.0))


def _tensor_result(rank: int, world_size: int) -> torch.Tensor:
    return torch.full((3, 2), float(rank))


def test_a_rank_that_is_done_early_does_not_close_its_connections_on_the_others(pool: Pool) -> None:
    assert pool.run(3, _leave_early) == [0.0, 1.0, 2.0]


def test_a_raising_rank_shows_its_traceback_at_once_and_where_the_others_were(pool: Pool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(3, _rank_raises, 1)
    text = str(caught.value)
    # Shown at once: neither the others' collective nor the call had to time out first.
    assert "had not answered" not in text and "rank 0 of 3 raised" not in text
    assert "rank 1 of 3 raised:" in text and "ValueError: the value 1 is wrong" in text
    assert "in _rank_raises" in text
    assert "rank 0" in text and "barrier" in text


def _takes_the_stop_signals(rank: int, world_size: int) -> None:
    with StopFlag():
        pass


def test_stacks_are_shown_by_workers_that_have_trained_before(pool: Pool) -> None:
    pool.run(2, _takes_the_stop_signals)
    with pytest.raises(RankError, match=r"rank 1 of 2 had not answered(.|\n)*_rank_sleeps"):
        pool.run(2, _rank_sleeps, 1, timeout_s=1)


def test_a_hanging_rank_is_a_timeout_error_with_its_stack(pool: Pool) -> None:
    pool.run(2, _sum_of_ranks, 0)
    with pytest.raises(RankError) as caught:
        pool.run(2, _rank_sleeps, 1, timeout_s=1)
    text = str(caught.value)
    assert "rank 1 of 2 had not answered after timeout_s=1" in text and "_rank_sleeps" in text


def test_a_collective_that_waits_forever_is_named(pool: Pool) -> None:
    pool.run(2, _sum_of_ranks, 0)
    with pytest.raises(RankError, match=r"rank 0(.|\n)*in barrier\n(.|\n)*in _only_rank_0_enters_barrier"):
        pool.run(2, _only_rank_0_enters_barrier, timeout_s=2)


def _only_rank_0_enters_barrier(rank: int, world_size: int) -> None:
    if rank == 0:
        dist.barrier()
    else:
        time.sleep(1000)


def test_a_killed_worker_is_reported_with_rank_and_signal(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"rank 2 died: its process [0-9]+ was ended by SIGKILL"):
        pool.run(3, _rank_kills_itself, 2)


def test_a_worker_that_exits_is_reported_with_rank_and_exit_code(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"rank 0 died: its process [0-9]+ ended with exit code 3"):
        pool.run(2, _rank_exits)


def test_a_result_that_cannot_be_sent_back_is_said_so(pool: Pool) -> None:
    with pytest.raises(RankError, match="rank 0 of 1 raised:\nthe result cannot be sent back"):
        pool.run(1, _unpicklable)


def test_an_import_that_fails_in_the_worker_is_an_error_of_that_rank(
    pool: Pool, tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = os.path.join(tmp_path, "only_in_the_parent.py")
    with open(module, "w") as file:
        file.write("def body(rank, world_size):\n    return rank\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_in_the_parent

    assert pool.run(2, only_in_the_parent.body) == [0, 1], "sys.path was not passed along"
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    pool.close_workers()
    with pytest.raises(RankError, match="No module named 'only_in_the_parent'"):
        pool.run(1, only_in_the_parent.body)


def test_the_pool_recovers_after_each_kind_of_failure(pool: Pool) -> None:
    for failing in (_rank_raises, _rank_kills_itself):
        with pytest.raises(RankError):
            pool.run(2, failing, 0)
        assert [result[3] for result in pool.run(2, _sum_of_ranks, 0)] == [1.0, 1.0]


def test_a_worker_killed_between_two_calls_is_replaced(pool: Pool) -> None:
    pool.run(2, _sum_of_ranks, 0)
    before = pool.worker_pids()
    os.kill(before[1], signal.SIGKILL)
    time.sleep(0.2)
    assert [result[3] for result in pool.run(2, _sum_of_ranks, 0)] == [1.0, 1.0]
    after = pool.worker_pids()
    assert after[0] == before[0] and after[1] != before[1]


def test_a_world_size_the_pool_does_not_serve_is_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match=r"world_size 9 is outside 1\.\.8"):
        pool.run(9, _sum_of_ranks, 0)
