"""DeepSpeed's ZeRO as the data engine: for one node whose devices have little memory.

`train.zero` builds it around a model and its AdamW; `train.step` and `train.checkpoint` use it as
they use FSDP2. Checked with DeepSpeed 0.19.8, of which this file uses a few names without documentation.

DeepSpeed averages gradients over ranks, ours are sums (`train.step`). So its loss scale is set to
1 / ranks, while losses are not scaled: the division of the average by it, in the pass that also
clips, gives back the sum. DeepSpeed runs in fp32 throughout; `parallel.cast` makes the model
compute in bf16, as FSDP2 does, with fp32 parameters, gradient sums and states.
"""

from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from parallel.backend.base import Backend
from parallel.collectives import sum_over
from parallel.deepspeed_traffic import count_deepspeed_traffic

_STATES = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """A model whose gradients, updates and states are DeepSpeed's.

    Args:
        deepspeed: of `parallel.deepspeed_setup`, like `model` and `settings`.
        backend: whose process group is joined.
        model: with its start values.
        optimizer: AdamW over the model's parameters, without states; a group's `lr` is the
            schedule's times its `learning_rate_multiplier`.
        settings: DeepSpeed's configuration.
    """

    def __init__(
        self,
        deepspeed: ModuleType,
        backend: Backend,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        settings: dict[str, Any],
    ) -> None:
        self._parameters = dict(model.named_parameters())
        deepspeed.init_distributed(backend.process_group_backend, dist_init_required=False)
        count_deepspeed_traffic(deepspeed)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._deepspeed = deepspeed
        self._stage: int = settings["zero_optimization"]["stage"]
        self._zero.loss_scale = 1.0 / dist.get_world_size()
        self._host = init_device_mesh("cpu", (dist.get_world_size(),))
        self._groups = optimizer.param_groups
        self._states = optimizer.state
        self._allocate_states()
        self._reached: set[str] = set()
        self._further_square = 0.0
        # It clips by the norm that it is told, whatever the stage.
        unscale_and_clip = self._zero.unscale_and_clip_grads
        self._zero.unscale_and_clip_grads = lambda gradients, norm: unscale_and_clip(
            gradients, self._joined(norm)
        )
        for name, parameter in self._parameters.items():
            parameter.register_hook(partial(self._reach, name))  # type: ignore[no-untyped-call]

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        """Add the gradient of a microbatch; see `train.engine.DataEngine`.

        Communication: stage 1 sums gradients over ranks in the last microbatch, 2 and 3 in each.
        """
        self._zero.clear_backward_seen_flag()
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed's own backward() would scale this loss, but not those that routers and indexers
        # add (`train.model.add_loss`).
        self._engine._backward_prologue()
        loss.backward()  # type: ignore[no-untyped-call]

    def clip_gradients(self, further_square: float = 0.0) -> Float[Tensor, ""]:
        """The global gradient norm before clipping; `step` clips.

        Communication: an all-reduce of one number for each parameter group, and of two more.

        Raises:
            RuntimeError: some rank has a parameter that got no gradient. DeepSpeed would take 0,
                or at stage 3 that of the step before.
        """
        missing = self._parameters.keys() - self._reached
        self._reached.clear()
        numbers = torch.tensor([len(missing), further_square], dtype=torch.float64)
        num_missing, self._further_square = sum_over(numbers).tolist()
        if num_missing:
            raise RuntimeError(
                f"no gradient after backward for {sorted(missing) or 'parameters of other ranks'}: "
                "they did not take part in the loss"
            )
        if self._stage < 3:
            norm = self._zero.scaled_global_norm()
        else:
            combine = self._deepspeed.runtime.utils.combine_grad_norm_groups
            norm = combine(self._zero._get_norm_groups())
        unscaled: Tensor = self._joined(norm) / self._zero.loss_scale
        return unscaled

    def step(self, learning_rate: float) -> None:
        """Clip, update, and free the gradients.

        Communication: stages 1 and 2 gather the parameters.
        """
        for group in self._groups:
            group["lr"] = learning_rate * group["learning_rate_multiplier"]
        self._engine.step()

    @torch.no_grad()
    def state(self, *, only_weights: bool = False) -> dict[str, Tensor]:
        """Copies of parameters and states by their global names, rows spread over the ranks' hosts.

        Communication: gathers every tensor, one at a time.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            found[f"model.{name}"] = self._spread(
                self._deepspeed.utils.safe_get_full_fp32_param(parameter)
            )
            if only_weights:
                continue
            for key in _STATES:
                whole = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
                found[f"optim.{key}.{name}"] = self._spread(whole)
            found[f"optim.step.{name}"] = next(iter(self._states.values()))["step"].clone()
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned, after a checkpoint was read into it.

        Communication: gathers every tensor, one at a time.

        Raises:
            ValueError: AdamW counted its steps differently for different parameters.
        """
        for name, parameter in self._parameters.items():
            self._put(parameter, state[f"model.{name}"], None)
            for key in _STATES:
                if f"optim.{key}.{name}" in state:
                    self._put(parameter, state[f"optim.{key}.{name}"], key)
        updates = {value.item() for name, value in state.items() if name.startswith("optim.step.")}
        if len(updates) > 1:
            raise ValueError(
                f"parallel.data_engine=deepspeed: the checkpoint's parameters were updated "
                f"{sorted(updates)} times, because stages froze some, and DeepSpeed counts for all "
                "together; use parallel.data_engine=fsdp"
            )
        for kept in self._states.values() if updates else ():
            kept["step"].fill_(*updates)
        self._show_updated_parameters()

    def _joined(self, norm: Tensor) -> Tensor:
        """The norm of the model's gradients and of those outside it; scaled, as DeepSpeed has it."""
        if not self._further_square:
            return norm
        further = self._further_square**0.5 * self._zero.loss_scale
        return torch.hypot(norm, torch.full_like(norm, further))

    def _reach(self, name: str, gradient: Tensor) -> None:
        self._reached.add(name)

    def _allocate_states(self) -> None:
        """What the first step would make: a checkpoint is loaded into it before that."""
        zero = self._zero
        if self._stage < 3:
            for flat in zero.single_partition_of_fp32_groups:
                self._states[flat] = _zero_state(flat)
            zero._lazy_init_hp_params_optimizer_state()
            return
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            on_nvme = zero._swappable_optimizer_subgroup(index)
            if on_nvme:
                zero._optimizer_states_and_gradient_swap_in(index)
            self._states[flat] = _zero_state(flat)
            if on_nvme:
                zero._optimizer_states_and_gradient_swap_out(index)

    def _spread(self, whole: Tensor) -> DTensor:
        """This rank's rows of a tensor that all ranks have, in host memory."""
        rows, rank = whole.chunk(dist.get_world_size()), dist.get_rank()
        own = rows[rank] if rank < len(rows) else whole[:0]
        return DTensor.from_local(
            own.cpu().clone(), self._host, [Shard(0)], shape=whole.shape, stride=whole.stride()
        )

    def _put(self, parameter: Any, value: Tensor, key: str | None) -> None:  # noqa: ANN401 - DeepSpeed's
        """Overwrite a parameter or a state of it with a tensor from `_spread`."""
        assert isinstance(value, DTensor)
        whole = value.full_tensor().flatten()
        utils: Any = self._deepspeed.utils
        if self._stage < 3:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, key)
            return
        # DeepSpeed's setter of whole values fails where they do not divide by the ranks.
        shard = torch.zeros(parameter.partition_numel())
        start = dist.get_rank() * len(shard)
        own = whole[start : start + len(shard)]
        shard[: len(own)] = own
        if key is None:
            utils.safe_set_local_fp32_param(parameter, shard)
        else:
            utils.safe_set_local_optimizer_state(parameter, shard, key)

    def _show_updated_parameters(self) -> None:
        """Let the model see what was put into the fp32 shards."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if resident := zero.persistent_parameters:
            resident[0].partition(resident)
            resident[0].all_gather(resident)


def _zero_state(flat: Tensor) -> dict[str, Tensor]:
    """AdamW's before its first step, for one flat shard."""
    step = torch.zeros((), dtype=torch.float32, device=flat.device)
    return {"step": step, **{key: torch.zeros_like(flat) for key in _STATES}}
