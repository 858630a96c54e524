"""FSDP2: shard weights, gradients and optimizer state over ranks, and write and read checkpoints of them.

Uses PyTorch's `fully_shard` (FSDP, arXiv 2304.11277). Each decoder layer is a unit: its weights are gathered only while
it computes. The parameters outside the decoder layers form one more unit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_sparse.anatomy import decoder_layers
from lit_sparse.errors import BadInput
from lit_sparse.modules.checkpoint_io import WholeCheckpoints, is_remote
from lit_sparse.optim import shard_like
from lit_sparse.storage.shards import BackgroundWriter, write_sharded

NAME = "fsdp2"
"""The strategy's name for trainer.strategy."""
TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others in a collective operation: rank 0 may be writing a checkpoint. A third of
torch's default; `RankWatch` ends a run sooner if a rank has died."""


class Sharded(nn.Module):
    """Shard a model over the ranks of `mesh`, and run functions that use it.

    Every parameter becomes a DTensor on the mesh's device, sharded along its first dimension. Units are moved to the
    device one at a time as they are sharded, so a model in host memory need not fit on one device. Gradients are
    averaged over ranks in fp32, and have their parameter's dtype.

    Args:
        model: A Hugging Face model, prepared by its strategies; its parameters are replaced in place.
        mesh: A mesh of one dimension, or of two: groups of ranks that each have the whole model, and the ranks of a
            group (HSDP).
        offload: Keep the shards in host memory, where the optimizer works too; a unit's weights are copied to the
            device while it computes.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, offload: bool = False) -> None:
        super().__init__()
        self.model = model
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
        if offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
        self._units = _units(model)
        _check_rows(model, self._units, mesh.size(mesh.ndim - 1))
        for layer in decoder_layers(model):
            _make_contiguous(layer)
            fully_shard(layer, **options)
        _make_contiguous(self)
        fully_shard(self, **options)
        self._initialize_dtypes()

    def _initialize_dtypes(self) -> None:
        """Run FSDP's lazy initialization while every unit is trainable, in one dtype.

        FSDP fixes the dtype of a unit's gradient reduction at its first forward pass, from the parameters that require
        grad then. A unit that is frozen at that moment and trains later (LISA, SMT's selection) would be reduced in its
        own dtype instead of fp32.
        """
        own = dict(self.model.named_parameters())
        were = {parameter: parameter.requires_grad for parameter in own.values()}
        for names in self._units.values():
            dtype = _main_dtype([own[name] for name in names])
            for name in names:
                own[name].requires_grad_(own[name].dtype == dtype)
        with torch.no_grad():
            self.compute(lambda: None)
        for parameter, was in were.items():
            parameter.requires_grad_(was)

    def check_dtypes(self) -> None:
        """Refuse a unit that trains parameters of several dtypes: FSDP reduces a unit's gradients as one flat tensor.

        Raises:
            BadInput: naming the first such unit.
        """
        own = dict(self.model.named_parameters())
        for unit, names in self._units.items():
            trained = [own[name] for name in names if name in own and own[name].requires_grad]
            dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained})
            if len(dtypes) > 1:
                raise BadInput(
                    f"trainer.strategy is fsdp2, which cannot train parameters of several dtypes in one layer, but in "
                    f"{unit} {' and '.join(dtypes)} are trained; give a base of one dtype, or set trainer.strategy to "
                    "ddp."
                )

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`, with the weights outside the decoder layers gathered.

        The function may read them without calling a module, as the chunked loss reads the head's weight.
        """
        return function(*args)

    def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`, which may use the model. Without a graph, reshard all weights afterwards.

        Leaves inference mode, in which Lightning evaluates under NCCL: FSDP keeps the buffer into which it first
        gathers a unit's weights, and autograd refuses an inference tensor there once training goes on.
        """
        graph = torch.is_grad_enabled()  # read first: leaving inference mode turns gradients on
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            result = self(function, *args)
            if not graph:
                self.reshard()  # pyright: ignore[reportCallIssue] - fully_shard has made this an FSDPModule
        return result


def _check_rows(model: nn.Module, units: Mapping[str, Sequence[str]], shards: int) -> None:
    """Refuse more ranks than a unit has rows: some would have nothing of it.

    Raises:
        BadInput: naming the unit.
    """
    for unit, names in units.items():
        rows = max((model.get_parameter(name).shape[:1].numel() for name in names), default=shards)
        if rows < shards:
            raise BadInput(
                f"trainer.strategy is fsdp2, which shards rows over {shards} ranks, but no matrix of {unit} has more "
                f"than {rows} rows; train on at most {rows} ranks, or set trainer.strategy to ddp."
            )


def _make_contiguous(unit: nn.Module) -> None:
    """Give hollow parameters memory, and transposed ones another: FSDP cuts rows of contiguous ones only."""
    for parameter in unit.parameters():
        if not isinstance(parameter, DTensor) and not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def _units(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the parameters of each FSDP unit, by a description of the unit."""
    layers = {parameter: n for n, layer in enumerate(decoder_layers(model)) for parameter in layer.parameters()}
    units: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        unit = f"layer {layers[parameter]}" if parameter in layers else "the parameters outside the decoder layers"
        units.setdefault(unit, []).append(name)
    return units


def _main_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that most weights of a unit have: of those that train, if any do."""
    weights: dict[torch.dtype, int] = {}
    for parameter in [one for one in parameters if one.requires_grad] or parameters:
        weights[parameter.dtype] = weights.get(parameter.dtype, 0) + parameter.numel()
    return max(weights, key=lambda dtype: weights[dtype])


class FSDP2Strategy(ModelParallelStrategy):
    """The Lightning strategy `trainer.strategy: fsdp2`: all ranks shard one model, through `Sharded`.

    Each rank writes its shards of a checkpoint, and reads them again (`lit_sparse.storage.shards`); a run can resume on
    any number of ranks, and on one device. To a URL, or with a checkpoint plugin of the user's, rank 0 writes one file,
    the same as on one device, for which it gathers one tensor after the other in its host memory. A parameter of fewer
    than 32 bits is saved as the fp32 master that its optimizer keeps.

    Args:
        replicas: Groups of ranks that each have the whole model, sharded within the group (HSDP): gradients are reduced
            within a group, then between groups. With as many as there are machines, weights are gathered within one.
        offload: Keep weights, gradients and optimizer state in host memory, where the optimizer steps.
        async_save: Write checkpoints in the background: a save copies this rank's shards to host memory, and training
            goes on while they are written. The next save and the end of the fit wait until they are.
        process_group_backend: As for Lightning's strategies; chosen by the device when not given.
        timeout: Timeout of a collective operation, 10 minutes by default.

    Raises:
        BadInput: if the ranks cannot be divided into that many groups.
    """

    def __init__(
        self,
        replicas: int = 1,
        offload: bool = False,
        async_save: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = TIMEOUT,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.replicas, self.offload, self.async_save = replicas, offload, async_save
        self._writer = BackgroundWriter(timeout)

    def setup_environment(self) -> None:
        world = self.num_nodes * self.num_processes
        if self.replicas < 1 or world % self.replicas:
            raise BadInput(
                f"trainer.strategy has replicas {self.replicas}, but {world} ranks cannot be divided into as many "
                f"groups of one size; give a divisor of {world}."
            )
        self._data_parallel_size = world
        super().setup_environment()

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The ranks of this run, in groups that each have the whole model."""
        mesh = self.device_mesh["data_parallel"]
        if self.replicas == 1:
            return mesh
        shape = self.replicas, mesh.size() // self.replicas
        return init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))

    def shard(self, model: nn.Module) -> Sharded:
        """Shard `model` over the ranks of this run."""
        return Sharded(model, self.mesh, self.offload)

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        # Norms of gradients in host memory are reduced there.
        return f"cpu:gloo,cuda:{backend}" if self.offload and backend == "nccl" else backend

    def model_to_device(self) -> None:
        if not self.offload:  # else `Sharded` has moved what belongs on the device
            super().model_to_device()

    # Checkpoints are loaded as on one device. ModelParallelStrategy's own loading demands optimizer state of every
    # parameter, and frozen ones have none.

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
        """Write a checkpoint. Every rank must call it: each writes its shards."""
        # On one device trained weights are in fp32 and there is no master: move it to where that checkpoint has it.
        for optimizer in self.optimizers:
            checkpoint["state_dict"].update(_masters(optimizer, checkpoint["state_dict"]))
        for state in checkpoint.get("optimizer_states", []):  # absent if only weights are saved
            state["state"] = {key: _without_master(one) for key, one in state["state"].items()}
        if isinstance(self.checkpoint_io, WholeCheckpoints) and not is_remote(filepath):
            assert self.lightning_module is not None
            running = self.lightning_module.trainer.state.status == TrainerStatus.RUNNING  # else nobody would wait
            (self._writer.write if self.async_save and running else write_sharded)(checkpoint, filepath)
            return
        full = gather(checkpoint, keep=self.is_global_zero)
        Strategy.save_checkpoint(self, full, filepath, storage_options)

    def wait_until_saved(self) -> None:
        """Wait until the last checkpoint is written. Every rank must call it.

        Raises:
            BadInput: on all ranks, if it could not be; the one before it is there still.
        """
        self._writer.wait()

    def teardown(self) -> None:
        failure = sys.exception()  # of the fit that ends
        try:
            self._writer.close()
        except Exception as error:
            if failure is None:
                raise
            failure.add_note(f"The checkpoint that was being written is not: {error}")
        finally:
            super().teardown()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if isinstance(self.checkpoint_io, WholeCheckpoints):
            assert self.lightning_module is not None
            fits = self.lightning_module.trainer.state.fn == "fit"  # evaluations have the whole model
            self.checkpoint_io.mesh = self.mesh if fits else None
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
    """Return the fp32 masters of the parameters in `values`, by name: they are saved in fp32, as on one device."""
    return {
        name: optimizer.state[parameter]["master"]
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if name in values and "master" in optimizer.state.get(parameter, {})
    }


def _without_master(state: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in state.items() if field != "master"}


def gather(value: Any, keep: bool) -> Any:
    """Replace each DTensor nested in dicts, lists and tuples by its full tensor in host memory, or by None.

    Every rank must call it with the same DTensors in the same order: each one is a collective.

    Args:
        keep: Return full tensors; false on ranks that do not write, which get None.
    """
    if isinstance(value, DTensor):
        there = value.detach().to(
            value.device_mesh.device_type
        )  # an offloaded one is in host memory, where NCCL cannot gather
        full = cast(DTensor, there).full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gather(item, keep) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(gather(item, keep) for item in value)
    return value


def _state_shards(optimizer: Optimizer, state: dict[str, Any], values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a saved optimizer state with this rank's shards.

    Masters are not saved: a parameter of fewer than 32 bits takes its saved fp32 value as its master.
    """
    own = {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    found = dict(state["state"])
    for group in state["param_groups"]:
        for name, key in zip(group["param_names"], group["params"], strict=True):
            if key in found and name in own:  # other names: load_state_dict refuses them with a better message
                saved = dict(found[key])
                if values[name].dtype == torch.float32 != own[name].dtype:
                    saved["master"] = values[name]
                found[key] = {field: shard_like(value, own[name]) for field, value in saved.items()}
    return {**state, "state": found}


StrategyRegistry.register(
    NAME, FSDP2Strategy, description="FSDP2: weights, gradients and optimizer state sharded over ranks"
)
