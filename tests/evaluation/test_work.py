import pytest

from simla_ray.evaluation.work import Work, chunks_of, interleave

from .conftest import on_ranks


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_gets_all_results_in_order(n, world):
    def run(rank, gather):
        return Work(rank, world, gather).map(lambda x: x * x, range(n))

    assert on_ranks(world, run) == [[i * i for i in range(n)]] * world


def test_ranks_share_the_chunks():
    done = [[], [], []]
    on_ranks(3, lambda rank, gather: Work(rank, 3, gather).map(done[rank].append, range(8)))
    assert done == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_shards_that_are_no_deal_of_one_list_are_refused():
    assert interleave([[0, 2, 4], [1, 3]]) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"ranks hold \[1, 2\] rows, expected \[2, 1\]"):
        interleave([[0], [1, 2]])


def test_chunks():
    assert [list(c) for c in chunks_of(5, 2)] == [[0, 1], [2, 3], [4]]
    assert chunks_of(0, 2) == []
