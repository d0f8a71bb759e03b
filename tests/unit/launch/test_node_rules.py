import pytest

from launch.compose import RecipeError, compose


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["launch.nodes=3"],
            "launch.nodes=3: the ranks, data x data_replicate x tensor x pipeline",
        ),
        (["launch.nodes=3"], "= 4, must divide among the nodes; use launch.nodes=2"),
        (
            ["launch.nodes=4", "parallel.data_parallel_size=2", "parallel.tensor_parallel_size=2"],
            "parallel.tensor_parallel_size=2: these ranks must share a node, and launch.nodes=4 "
            "leaves 1 on each; use launch.nodes=2",
        ),
        (["cluster.env={1A:x}"], "cluster.env.1A: no name of an environment variable"),
        (["launch.nodes=0"], "launch.nodes=0: must be positive"),
        (["launch.max_restarts_without_progress=-1"], "must not be negative"),
    ],
)
def test_nodes_that_do_not_fit_the_ranks_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose("v4_nano", overrides)
    assert any(said in line for line in caught.value.problems), caught.value.problems


def test_what_fits_is_taken() -> None:
    compose("v4_nano", ["launch.nodes=2", "launch.max_restarts_without_progress=0"])
    compose("v4_nano", ["cluster.env.NCCL_DEBUG=WARN", "cluster.setup=[module load cuda]"])
