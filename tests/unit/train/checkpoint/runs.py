"""Runs and Hugging Face folders on disk, for the tests of conversions."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from launch.checkpoint import export_hf, import_hf
from tests.unit.train.model.tiny import build
from train.checkpoint.commit import begin, commit, newest_checkpoint
from train.checkpoint.huggingface.stored import stored_tensors
from train.checkpoint.state import write_meta
from train.config import RunConfig
from train.model.config import ModelConfig
from train.model.transformer import Transformer
from train.recipe import load_resolved, save_resolved


def noisy(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model of which no number is zero or equal to another, buffers included."""
    model = build(config, noise=0.1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Streams that hardly differ would make the gradients of their gates sums that cancel.
            if name.endswith(("_site.bias", "read_out.bias")):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    for layer in model.moe_layers():
        if layer.expert_bias is not None:
            noise = torch.randn(layer.expert_bias.shape, generator=generator)
            layer.expert_bias.copy_(0.1 * noise)
    return model.eval()


def write_run(run_dir: Path, model: Transformer, dtype: torch.dtype | None = None) -> Path:
    """A run whose only checkpoint is this model, its matrices in `dtype`."""
    keys = stored_tensors(model.config)
    state = {
        key: tensor if key.startswith("buffer.") or dtype is None else tensor.to(dtype)
        for name, tensor in model.state_dict().items()
        for key, _ in [keys[name]]
    }
    temporary = begin(run_dir, 3)
    save(state, checkpoint_id=temporary, no_dist=True)
    write_meta(temporary, step=3, tokens=9, corpus="c", world_size=1)
    commit(temporary)
    save_resolved(RunConfig(name="tiny", model=model.config), run_dir / "recipe.yaml")
    return run_dir


def read_run(run_dir: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint of a run, in the types that it is stored in."""
    newest = newest_checkpoint(run_dir)
    assert newest
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # noqa: PLC0415

    entries = FileSystemReader(newest[1]).read_metadata().state_dict_metadata
    keys = stored_tensors(load_resolved(run_dir / "recipe.yaml").model)
    state = {
        key: torch.empty(shape, dtype=entries[key].properties.dtype)  # type: ignore[union-attr]
        for key, shape in keys.values()
    }
    load(state, checkpoint_id=newest[1], no_dist=True)
    return state


def read_model(run_dir: Path) -> Transformer:
    """The model of the newest checkpoint of a run, in fp32."""
    model = Transformer(load_resolved(run_dir / "recipe.yaml").model)
    keys = stored_tensors(model.config)
    stored = read_run(run_dir)
    model.load_state_dict({name: stored[key] for name, (key, _) in keys.items()})
    return model.eval()


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder, by their reader."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def exported(
    run_dir: Path, folder: Path, *, dtype: str | None = None, max_shard_size: str = "20KB"
) -> Path:
    assert export_hf(run_dir, folder, dtype=dtype, max_shard_size=max_shard_size) == 0
    return folder


def imported(folder: Path, run_dir: Path) -> Path:
    assert import_hf(folder, run_dir, recipe=None, overrides=[]) == 0
    return run_dir


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bitwise, with names, types and shapes."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )
