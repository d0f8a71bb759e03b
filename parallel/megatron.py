"""Our process groups as megatron-core names them, for its modules that take groups.

What of megatron-core runs on every backend computes the same numbers as ours (tests hold both to
each other): vocabulary-parallel embedding and cross-entropy, column- and row-parallel linear layers
with their all-reduces. Of these the model uses the cross-entropy, where a recipe asks for it
(`parallel.megatron_cross_entropy`). Embedding and linear layers are our own, because

* megatron-core's sequence parallelism calls CUDA by name, so elsewhere each rank would compute the
  residual streams of all tokens, which is what mHC makes wide;
* its layers hold plain tensors: a checkpoint could not move to another layout by itself;
* its modules would stand in the model's code, which knows no ranks.
"""

from megatron.core.process_groups_config import ProcessGroupCollection

from parallel.mesh import Meshes
from parallel.torch_compat import flatten_mesh


def process_groups(meshes: Meshes) -> ProcessGroupCollection:
    """The groups of this rank, for `pg_collection` and `tp_group` of megatron-core's modules.

    Experts are never cut by tensor parallelism, so `tp_ep` is `ep`. Groups that have no meaning here
    (of embeddings, of its optimizer) stay unset.

    Communication: creates process groups, so all ranks of the world call it.
    """
    dense, experts = meshes.dense, meshes.experts
    joined = {
        "mp": dense["pp", "tp"],
        "dp": dense["dp_replicate", "dp_shard"],
        "dp_cp": dense["dp_replicate", "dp_shard", "cp"],
        "tp_ep_pp": experts["expert_pp", "expert_ep"],
    }
    groups = {
        "tp": dense["tp"],
        "pp": dense["pp"],
        "cp": dense["cp"],
        "tp_cp": meshes.sequence,
        "tp_dp_cp": meshes.stage,
        "ep": experts["expert_ep"],
        "tp_ep": experts["expert_ep"],
        "expt_dp": experts["expert_edp"],
    } | {name: flatten_mesh(mesh, f"megatron_{name}") for name, mesh in joined.items()}
    return ProcessGroupCollection(**{name: mesh.get_group() for name, mesh in groups.items()})
