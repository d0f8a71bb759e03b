from dataclasses import replace

import pytest
import torch

from parallel.backend.cpu import CpuBackend
from parallel.backend.simulated import SimulatedBackend
from parallel.torch_compat import find_cpp_compiler
from train import build
from train.config import RunConfig, TrainConfig
from train.model.config import HyperConnectionConfig, ModelConfig

COMPILED = ModelConfig(residual="mhc", hyper_connection=HyperConnectionConfig(compile=True))


def test_compiled_passes_without_a_compiler_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(build, "find_cpp_compiler", lambda: None)
    with pytest.raises(ValueError, match=r"hyper_connection\.compile=true: .*no C\+\+ compiler"):
        build.check_compiler(COMPILED, cpu)
    build.check_compiler(replace(COMPILED, residual="plain"), cpu)
    build.check_compiler(ModelConfig(), cpu)
    monkeypatch.setattr(build, "find_cpp_compiler", lambda: "g++")
    build.check_compiler(COMPILED, cpu)


def test_fp64_is_refused_where_there_is_none() -> None:
    config = RunConfig(name="n", train=TrainConfig(dtype="fp64"))
    with pytest.raises(
        ValueError, match=r"train\.dtype=fp64: backend simulated has none; use fp32"
    ):
        build.check_dtype(config, SimulatedBackend())
    build.check_dtype(config, CpuBackend())
    build.check_dtype(RunConfig(name="n", train=TrainConfig(dtype="bf16")), SimulatedBackend())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compiler_is_the_one_of_torch() -> None:
    from torch._inductor import config  # noqa: PLC0415

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert find_cpp_compiler() is None
