from hypothesis import given
from hypothesis import strategies as st

from parallel.owners import balance, shard_rows


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 9))
def test_no_rank_has_much_more_than_the_mean(costs: list[int], num_ranks: int) -> None:
    owners = balance(costs, num_ranks)
    loads = [0] * num_ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    assert sum(loads) == sum(costs)
    # When its last job came, the busiest rank had at most the mean of the others.
    assert num_ranks * max(loads) <= sum(costs) + (num_ranks - 1) * max(costs)


def test_equal_jobs_go_round() -> None:
    assert balance([5] * 6, 4) == [0, 1, 2, 3, 0, 1]


@given(st.integers(0, 50), st.integers(1, 9))
def test_shards_cover_the_rows_in_order(num_rows: int, num_ranks: int) -> None:
    shards = shard_rows(num_rows, num_ranks)
    assert [row for shard in shards for row in shard] == list(range(num_rows))
    assert len(shards) == num_ranks
