"""FSDP2: weights, gradients and optimizer state divided among processes, with the checkpoints of one device.

PyTorch's `fully_shard` (after FSDP, arXiv 2304.11277): each decoder layer is a unit, whose weights are whole only while
it computes; what lies outside the layers is one more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_sparse.anatomy import decoder_layers
from lit_sparse.errors import BadInput
from lit_sparse.optim import shard_like

NAME = "fsdp2"
"""The strategy's name for trainer.strategy."""


class Sharded(nn.Module):
    """A model whose weights are divided among the processes of `mesh`, and the way to compute with it.

    Each process keeps the first dimension's next part of every parameter, as a DTensor, on the mesh's device; a unit is
    moved there as it is divided, so that a model in host memory need not fit on a device. Gradients are averaged over
    the processes in fp32, and have their parameter's dtype.

    Args:
        model: A Hugging Face model, prepared by its strategies; its parameters are replaced in place.
        mesh: One dimension.

    Raises:
        BadInput: if a unit trains parameters of several dtypes; nothing is divided then.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.model = model
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        units = _units(model)
        _refuse_mixed(model, units)
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self, mesh=mesh, mp_policy=policy)
        self._settle(units)

    def _settle(self, units: Mapping[str, list[str]]) -> None:
        """Let FSDP note its dtypes, which it does once: a unit frozen then would later be reduced in its own dtype."""
        own = dict(self.model.named_parameters())
        of_one_dtype = [names for names in units.values() if len({own[name].dtype for name in names}) == 1]
        frozen = [own[name] for names in of_one_dtype for name in names if not own[name].requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.no_grad():
            self.compute(lambda: None)
        for parameter in frozen:
            parameter.requires_grad_(False)

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, while the weights outside the decoder layers are whole: not only the model reads them."""
        return function(*args)

    def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, where it may use the model; without a graph, all weights are divided again afterwards.

        Never in inference mode, in which Lightning evaluates under NCCL: what FSDP first gathers a unit's weights into
        is kept, and could as an inference tensor never be trained with.
        """
        graph = torch.is_grad_enabled()  # asked here, since leaving inference mode turns gradients on
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            result = self(function, *args)
            if not graph:
                self.reshard()  # pyright: ignore[reportCallIssue] - fully_shard has made this an FSDPModule
        return result


def _units(model: nn.Module) -> dict[str, list[str]]:
    """The names of the parameters that FSDP gathers together, by what they are."""
    layers = {parameter: n for n, layer in enumerate(decoder_layers(model)) for parameter in layer.parameters()}
    units: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        unit = f"layer {layers[parameter]}" if parameter in layers else "what lies outside the layers"
        units.setdefault(unit, []).append(name)
    return units


def _refuse_mixed(model: nn.Module, units: Mapping[str, list[str]]) -> None:
    """Refuse a unit that trains parameters of several dtypes, whose gradients FSDP cannot reduce together.

    Raises:
        BadInput: naming the first.
    """
    own = dict(model.named_parameters())
    for unit, names in units.items():
        dtypes = sorted({str(own[name].dtype).removeprefix("torch.") for name in names if own[name].requires_grad})
        if len(dtypes) > 1:
            raise BadInput(
                f"trainer.strategy is fsdp2, which cannot train parameters of several dtypes in one layer, but in "
                f"{unit} {' and '.join(dtypes)} are trained; give a base of one dtype, or set trainer.strategy to ddp."
            )


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's strategy for models that `Sharded` divides among all processes: `trainer.strategy: fsdp2`.

    A checkpoint is the same single file as that of one device, so that a run may go on with any number of processes:
    tensors are gathered one after the other into the host memory of the first process, and each process takes its
    shards of what is loaded. A parameter of fewer than 32 bits is saved as the fp32 master that its optimizer keeps.

    Args:
        process_group_backend: As for Lightning's strategies; by the device when not given.
        timeout: Of a collective operation.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = timedelta(minutes=30)
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Checkpoints are loaded as on one device: its parent's ways demand optimizer state of every parameter.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the file; every process has to call it, since they all have shards."""
        for optimizer in self.optimizers:
            checkpoint["state_dict"].update(_masters(optimizer, checkpoint["state_dict"]))
        for state in checkpoint.get("optimizer_states", []):  # weights alone have none
            state["state"] = {key: _without_master(one) for key, one in state["state"].items()}
        whole = gathered(checkpoint, keep=self.is_global_zero)
        Strategy.save_checkpoint(self, whole, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters(remove_duplicate=False))
        values = checkpoint["state_dict"].items()
        shards = {name: shard_like(value, own[name]) if name in own else value for name, value in values}
        self.lightning_module.load_state_dict(shards, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_state_shards(optimizer, state, checkpoint["state_dict"]))


def _masters(optimizer: Optimizer, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The fp32 masters of parameters among `values`: those that train are saved in fp32, as they are on one device."""
    return {
        name: optimizer.state[parameter]["master"]
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if name in values and "master" in optimizer.state.get(parameter, {})
    }


def _without_master(state: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in state.items() if field != "master"}


def gathered(value: Any, keep: bool) -> Any:
    """`value` with a whole tensor in host memory for each DTensor in its dicts, lists and tuples; None unless `keep`.

    Every process has to call it with the same DTensors in the same order.
    """
    if isinstance(value, DTensor):
        there = value.detach().to(value.device_mesh.device_type)  # those set aside are in host memory
        full = cast(DTensor, there).full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gathered(item, keep) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(gathered(item, keep) for item in value)
    return value


def _state_shards(optimizer: Optimizer, state: dict[str, Any], values: Mapping[str, Tensor]) -> dict[str, Any]:
    """An optimizer's saved state with this process's shards, and masters for parameters of fewer than 32 bits."""
    own = {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    found = dict(state["state"])
    for group in state["param_groups"]:
        for name, key in zip(group["param_names"], group["params"], strict=True):
            if key in found and name in own:  # the optimizer itself refuses a state of other parameters
                saved = dict(found[key])
                if values[name].dtype == torch.float32 != own[name].dtype:
                    saved["master"] = values[name]
                found[key] = {field: shard_like(value, own[name]) for field, value in saved.items()}
    return {**state, "state": found}


StrategyRegistry.register(NAME, FSDP2Strategy, description="FSDP2: weights, gradients and state divided by layers")
