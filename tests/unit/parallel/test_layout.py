import subprocess
import sys

from parallel.config import ParallelConfig
from parallel.layout import SEQUENCE_AXES, ParallelLayout


def test_from_config_takes_every_size() -> None:
    config = ParallelConfig(
        data_parallel_size=2,
        data_replicate_parallel_size=4,
        tensor_parallel_size=3,
        pipeline_parallel_size=5,
        context_parallel_size=7,
        expert_parallel_size=6,
        expert_sharding="replicate",
    )
    layout = ParallelLayout.from_config(config)
    assert layout == ParallelLayout(
        data=2, data_replicate=4, tensor=3, pipeline=5, context=7, expert=6, whole_experts=True
    )
    assert layout.world_size == 4 * 2 * 3 * 5 * 7
    assert layout.expert_data_parallel_size == 4 * 7
    assert layout.data_parallel_size == 8


def test_groups_of_an_example_worked_by_hand() -> None:
    """The rank is four times its place on dp, plus twice that on cp, plus that on tp."""
    layout = ParallelLayout(data=2, context=2, tensor=2, expert=4)
    assert layout.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("cp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups(*SEQUENCE_AXES) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.groups("ep") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.groups("edp") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_copies_of_experts() -> None:
    assert ParallelLayout(data_replicate=2, data=4, expert=4).expert_replicate == 2
    # The expert groups of 8 ranks span both copies of 4.
    assert ParallelLayout(data_replicate=2, data=4, expert=8).expert_replicate == 1
    assert ParallelLayout(data=8, expert=2, whole_experts=True).expert_replicate == 4
    assert ParallelLayout(data=8, expert=2).expert_replicate == 1


def test_problem_says_what_to_type() -> None:
    (problem,) = ParallelLayout(data=16, expert=6).problems(32)
    assert problem == (
        "parallel.expert_parallel_size=6: must divide both "
        "parallel.data_parallel_size*data_replicate*context*tensor=16 and model.moe.num_experts=32; "
        "use 1, 2, 4, 8 or 16"
    )


def test_experts_are_divided_within_a_pipeline_stage_only() -> None:
    problems = ParallelLayout(pipeline=2, data=2, expert=4).problems(4)
    assert any(line.startswith("parallel.expert_parallel_size=4: must") for line in problems)
    assert any(line.endswith("; use 1 or 2") for line in problems)


def test_layout_imports_no_torch() -> None:
    code = "import sys, parallel.layout, parallel.runs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
