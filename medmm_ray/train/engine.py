"""DeepSpeed around a stage's model: one step of AdamW over the group, and every trained weight whole, by its name.

DeepSpeed divides optimizer states, gradients and weights among the workers (ZeRO) and moves them to CPU memory
(off-load); here they come together again, parameter by parameter, so that what a checkpoint holds says nothing of the
number of workers or the ZeRO stage that made it (DeepSpeed's own checkpoints do).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from medmm_ray.train.config import TrainConfig
from medmm_ray.train.schedule import Part

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a weight


def deepspeed_config(config: TrainConfig, dtype: str) -> dict[str, Any]:
    """DeepSpeed's settings. An update's micro-batches vary in number, so the loop owns their accumulation."""
    zero: dict[str, Any] = {"stage": zero_stage(config, dtype), "overlap_comm": False}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm if zero["stage"] else 0.0,  # without ZeRO `Engine` clips
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def zero_stage(config: TrainConfig, dtype: str) -> int:
    """In bfloat16 at least 1: there AdamW works on a float32 copy of the weights, which ZeRO 1 divides."""
    return max(1, config.zero_stage) if dtype == "bfloat16" else config.zero_stage


def parameter_groups(
    module: "torch.nn.Module", default: float, rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups, by learning rate and weight decay: matrices decay, biases, norms and scalars do not."""
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), default)
            decay = weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    settings: list[dict[str, Any]] = []
    # Sorted: every worker, and a training that goes on, must have the same groups in the same order.
    for rate, decay in sorted(groups):
        settings.append(
            {"params": groups[rate, decay], "lr": rate, "highest_lr": rate, "weight_decay": decay},
        )
    return settings


def _skip_compilation() -> None:
    """Keep DeepSpeed from compiling its all-reduce in shared memory, which is for inference on CPUs.

    It takes a minute or more on each machine, and a kill meanwhile leaves a lock on which every later start waits.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """A stage's `module`, trained through DeepSpeed.

    `loss` is the stage's: it runs `module` on some parts in an epoch. `rates` are learning rates by the beginning of a
    parameter's name.
    """

    def __init__(
        self,
        module: "torch.nn.Module",
        loss: Callable[[Sequence[Part], int], "torch.Tensor"],
        rates: Mapping[str, float],
        config: TrainConfig,
        dtype: str,
    ) -> None:
        import deepspeed
        import torch

        from medmm_ray.engines.onednn_linear import use_onednn

        use_onednn(module)  # before DeepSpeed wraps the module: it changes the class of linear layers
        self.module = module
        self.max_grad_norm = config.max_grad_norm
        self.zero_stage = zero_stage(config, dtype)
        # DeepSpeed 0.19.8 cannot broadcast parameters without a dimension (a CLIP's scale, for one).
        self._scalars = [parameter for parameter in module.parameters() if parameter.dim() == 0]
        self._reshape_scalars((1,))
        groups = parameter_groups(module, config.learning_rate, rates, config.weight_decay)
        self.adam = torch.optim.AdamW(groups)
        _skip_compilation()
        self.engine, *_ = deepspeed.initialize(
            model=_loss_module(module, loss),
            optimizer=self.adam,
            config=deepspeed_config(config, dtype),
            dist_init_required=False,
        )
        self.device = self.engine.device
        self.trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if self.zero_stage == 0:
            self.adam.register_step_pre_hook(self._clip)
        self.reset_optimizer(updates=0)  # by itself DeepSpeed finds the moments of the first parameter group alone

    # Training

    def loss(self, parts: Sequence[Part], epoch: int) -> "torch.Tensor":
        """Run the stage's loss on a pass, through DeepSpeed's hooks."""
        loss: torch.Tensor = self.engine(parts, epoch)
        return loss

    def backward(self, loss: "torch.Tensor") -> None:
        """Add to the gradients, which DeepSpeed averages over the workers."""
        self.engine.backward(loss)

    def set_learning_rate(self, factor: float) -> float:
        """Set each group's rate to this share of its highest; gives the first group's."""
        for group in self.adam.param_groups:
            group["lr"] = group["highest_lr"] * factor
        return float(self.adam.param_groups[0]["lr"])

    def step(self) -> float:
        """One update of all weights, the gradients cleared; gives the norm that they had over the whole group.

        A norm that is not finite is given as it is. The weights are then spoilt, or the update was left out (which of
        both, depends on the ZeRO stage): the caller stops.
        """
        self.engine.step()
        if self.zero_stage == 0:
            return self._norm
        norm = float(self.engine.get_global_grad_norm())
        return norm if norm >= 0 else math.nan  # DeepSpeed's ZeRO writes -1 for NaN and infinity, and goes on

    def _clip(self, *_: Any) -> None:
        """Clip the gradients as DeepSpeed does without ZeRO; it does not give their norm."""
        import torch

        self._norm = float(torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.max_grad_norm))

    # Weights, gathered from their shards

    def master_weight(self, name: str, moment: str | None = None) -> "torch.Tensor":
        """A trained weight, whole, as AdamW sees it (float32), or one of its `MOMENTS`; all workers call it
        together."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.trainable[name]
        if self.zero_stage == 0:
            weight = parameter.data if moment is None else self.adam.state[parameter][moment]
        elif moment is None:
            weight = safe_get_full_fp32_param(parameter)
        else:
            weight = safe_get_full_optimizer_state(parameter, moment)
        full_weight: torch.Tensor = weight
        return full_weight

    def reset_optimizer(self, updates: int) -> None:
        """Give AdamW the state that it has after so many updates, its moments still 0: `set_master_weight` fills
        them."""
        import torch

        optimizer = self.engine.optimizer
        # ZeRO 3 keeps AdamW's state by flat shards of a group, the others by parameter.
        parameters: list[Any] = []
        if self.zero_stage == 3:
            parameters += optimizer.fp32_partitioned_groups_flat
        else:
            for group in self.adam.param_groups:
                parameters += group["params"]
        for weights in parameters:
            moments = {moment: torch.zeros_like(weights) for moment in MOMENTS}
            self.adam.state[weights] = {"step": torch.tensor(float(updates)), **moments}
        if self.zero_stage in (1, 2):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def set_master_weight(self, name: str, weight: "torch.Tensor", moments: Mapping[str, "torch.Tensor"]) -> None:
        """Set a trained weight and its moments from full tensors; all workers call it together."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self.trainable[name]
        # The module's own copy, which the forward pass reads; then AdamW's, wherever DeepSpeed keeps it.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.zero_stage == 3):
            parameter.data.copy_(weight)
        if self.zero_stage == 3:
            self._set_shard(parameter, weight, moments)
        elif self.zero_stage == 0:
            for moment, value in moments.items():
                self.adam.state[parameter][moment].copy_(value)
        else:
            safe_set_full_fp32_param(parameter, weight)
            for moment, value in moments.items():
                safe_set_full_optimizer_state(parameter, value, moment)

    def _set_shard(self, parameter: Any, weight: "torch.Tensor", moments: Mapping[str, "torch.Tensor"]) -> None:
        """Set this worker's shard under ZeRO 3: one of equal parts, the last padded (DeepSpeed's setter forgets it)."""
        import torch
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()

        def shard_of(full_weight: torch.Tensor) -> torch.Tensor:
            shard = full_weight.flatten()[rank * size : (rank + 1) * size]
            return torch.nn.functional.pad(shard, (0, size - shard.numel()))

        safe_set_local_fp32_param(parameter, shard_of(weight))
        for moment, value in moments.items():
            safe_set_local_optimizer_state(parameter, shard_of(value), moment)

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """All weights whole, and of their own shapes, on every worker (all must enter); rank 0's changes stay."""
        import deepspeed

        parameters = list(self.module.parameters()) if self.zero_stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=self.zero_stage == 3):
            self._reshape_scalars(())
            yield
            self._reshape_scalars((1,))

    def _reshape_scalars(self, shape: tuple[int, ...]) -> None:
        for parameter in self._scalars:
            parameter.data = parameter.data.reshape(shape)


def _loss_module(module: "torch.nn.Module", loss: Callable[[Sequence[Part], int], "torch.Tensor"]) -> "torch.nn.Module":
    """The model as a module whose forward pass is its loss: DeepSpeed's hooks want one call, one output."""
    import torch

    class LossModule(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, parts: Sequence[Part], epoch: int) -> torch.Tensor:
            return loss(parts, epoch)

    return LossModule()
