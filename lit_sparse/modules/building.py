"""Building the model of a run: the base, what the strategies make of it, its precision, its sharding."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice, repeat
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_sparse.anatomy import decoder_layers, is_quantized, settle_trainable, weights_in
from lit_sparse.checkpoints import forked_rng, hash_of, read_checkpoint, sums_of
from lit_sparse.errors import BadInput
from lit_sparse.modules.checks import check_updates_alike
from lit_sparse.modules.hollow import Hollow
from lit_sparse.modules.loading import Quantization, compile_model, is_drawn, load_base, load_hollow
from lit_sparse.modules.precision import DTYPES, Masters, Precision, cast_norm_inputs
from lit_sparse.modules.sharding import FSDP2Strategy, Sharded
from lit_sparse.modules.task import Task
from lit_sparse.modules.window import weigh_batches
from lit_sparse.optim import trainable
from lit_sparse.recompute import checkpoint_activations
from lit_sparse.strategies import Context, Updates, UpdateStrategy
from lit_sparse.strategies.base import Attaches
from lit_sparse.strategies.updates import ATTACHES
from lit_sparse_profiling.phases import Phases


class BuiltModel(Task):
    """The part of the host that builds the model. `LitSparse` documents the arguments.

    Attributes:
        model: The model, None before it is loaded.
        tokenizer_name: Folder of the tokenizer that a run's text was made tokens with, where that is not its base's.
        updates: The update strategies.
        masters: The parameters that were upcast to fp32.
        base_fingerprint: Hash of the base's weights.
        base_sums: Hash of all their bits; "" where they are drawn or quantised.
        base_parameters: Number of the base's weights.
        init_seed: Seed of the random weights of a bare configuration: that of `seed_everything`, 0 without, and of a
            resumed or loaded run that which it began with.
        trained: Names of what was trainable at any time.
        phases: Time and peak memory of loading, selection and the phases of a step; a `Profile` of a fit sets its own.
        before_loading: Called once, when data and settings of a fit are checked and its model is not loaded yet.
    """

    def __init__(
        self,
        base: Any,
        updates: list[UpdateStrategy],
        precision: Precision,
        activation_checkpointing: bool,
        attention: str | None,
        compile: bool,
        quantize: Quantization | None,
    ) -> None:
        super().__init__()
        # These are kept in tuples: as attributes they would be submodules, beside `self.model`.
        self._given: tuple[PreTrainedModel, ...] = (base,) if isinstance(base, PreTrainedModel) else ()
        self._sharded: tuple[Sharded, ...] = ()
        self._hollow: Hollow | None = None  # until the model is sharded
        self.base: Any = type(base).__name__ if self._given else base
        self.updates = Updates(updates, prefix="model.")
        if compile and (again := [type(update).__name__ for update in self.updates if update.recomputes]):
            raise BadInput(
                f"model.compile is true, but {again[0]} computes layers again in the backward pass, where what is not "
                "compiled rounds otherwise; set model.compile to false."
            )
        if quantize is not None:
            self.updates.check_quantizable(f"model.quantize is {quantize}")
            if self._given:
                raise BadInput(
                    f"model.quantize is {quantize}, but the base given is loaded already; give its folder or name, or "
                    "load it quantised and leave model.quantize out."
                )
        self.precision: Precision = precision
        self.activation_checkpointing, self.attention, self.compile_model = activation_checkpointing, attention, compile
        self.quantize: Quantization | None = quantize
        self.tokenizer_name: str | None = None  # a run's own, which is not its base's
        self.model: PreTrainedModel | None = None
        self.masters = Masters()
        self.base_fingerprint, self.base_sums, self.base_parameters = "", "", 0
        self.init_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # where Lightning keeps it, also for other ranks
        self.trained: set[str] = set()
        self.resume_from: Any = None
        self.before_loading: Callable[[], None] = lambda: None
        self.phases = Phases()
        self._attached = False
        self._casts: list[RemovableHandle] = []  # of LayerNorms' inputs

    # ---- building

    def configure_model(self) -> None:
        announce, self.before_loading = self.before_loading, lambda: None
        announce()
        with self.phases("loading"):
            self.build()
        self.check_data()
        if self._attached or self.trainer.state.fn != "fit":
            return
        with torch.device("cpu"):  # Lightning has made its own device the default one, where draws would be others
            if self.resume_from is not None:
                rank_zero_info(f"Restoring {self.resume_from}.")
                together = self.trainer.world_size > 1
                mesh = self._mesh_of_states
                self.restore(read_checkpoint(self.resume_from, ("lit_sparse",), mesh, together=together))
            else:
                self._attach()

    def build(self) -> PreTrainedModel:
        """Return the base model, loaded in the dtype of its frozen weights (also set as `self.model`)."""
        if self.model is None:
            self.model = self._given[0] if self._given else self._load()
            if is_quantized(self.model):
                self.updates.check_quantizable(f"the base {self.base} is quantised")
            if self._hollow is None:  # else it is known once it is filled
                self._note_base(sorted(self.model.named_parameters()))
            self.base_parameters = sum(weights_in(parameter) for parameter in self.model.parameters())
        return self.model

    def _note_base(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Note by what the base is known again: its fingerprint, and where its values come from files their bits."""
        assert self.model is not None
        self.base_fingerprint = hash_of(named)
        # Each machine draws by itself.
        self.base_sums = "" if self.is_drawn or is_quantized(self.model) else sums_of(named)

    @property
    def is_drawn(self) -> bool:
        """True if the base is a bare configuration, whose model has random weights."""
        return is_drawn(self.base)

    def _load(self) -> PreTrainedModel:
        rank_zero_info(f"Loading {self.base}.")
        whole = [type(update).__name__ for update in self.updates if update.attaches_to == "whole"]
        if self.to_shard and self.trainer.state.fn == "fit" and whole:
            rank_zero_info(f"Each rank loads all of {self.base}: {whole[0]} has to see the whole model.")
        if self._may_be_hollow:
            how = (self.frozen_dtype, self.attention, self.config_options, self.init_seed)
            found = load_hollow(self.auto_class, self.base, *how)
            if isinstance(found, Hollow):
                self._hollow = found
                return found.model
            rank_zero_info(f"Each rank loads all of {self.base}: {found}.")
        how = (self.frozen_dtype, self.attention, self.quantize, self.device_to_be, self.config_options, self.init_seed)
        return load_base(self.auto_class, self.base, *how)

    @property
    def _may_be_hollow(self) -> bool:
        """True if the model is to be sharded, and no strategy has to see all of it before."""
        if not self.to_shard or self.trainer.state.fn != "fit" or self.quantize is not None:
            return False
        return isinstance(self.base, str) and all(update.attaches_to != "whole" for update in self.updates)

    @property
    def frozen_dtype(self) -> torch.dtype:
        if self.precision == "auto":
            return torch.bfloat16 if self.device_to_be.type == "cuda" else torch.float32
        return DTYPES[self.precision]

    @property
    def device_to_be(self) -> torch.device:
        """The trainer's device, where the model may not have been moved yet; the module's own without a trainer."""
        return self.trainer.strategy.root_device if self._trainer is not None else self.device

    @property
    def to_shard(self) -> bool:
        """True if the trainer's strategy shards the model over ranks."""
        return self._trainer is not None and isinstance(self.trainer.strategy, FSDP2Strategy)

    def _attach(self) -> None:
        self._prepare()

        def attach(kinds: Collection[Attaches]) -> None:
            with self.phases("selection"):
                self.updates.attach(self.build(), self.probe, self._context, kinds)

        self._attach_and_shard(attach)
        self._after_attach()

    def _attach_and_shard(self, attach: Callable[[Collection[Attaches]], None]) -> None:
        """Call `attach` with the kinds of strategies (`attaches_to`) that see the model as it is then.

        The model is sharded, and filled if it is hollow, after those that need only shapes; one that was loaded whole
        is sharded here if a strategy asks for shards, else in the end.
        """
        left: Collection[Attaches] = ATTACHES
        if self._hollow is not None or (self.to_shard and any(u.attaches_to == "shards" for u in self.updates)):
            left = [kind for kind in ATTACHES if kind != "shapes"]
            with forked_rng(self.device_to_be):
                attach(("shapes",))
            self._shard()
        with forked_rng(self.device_to_be):
            attach(left)
        self._hollow = None

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Rebuild what the strategies made of the model, from a checkpoint of the same configuration.

        Raises:
            BadInput: if the checkpoint is of another task, another base or other strategies.
        """
        self.take_task(checkpoint)
        self.take_seed(checkpoint["lit_sparse"])
        model, saved = self.build(), checkpoint["lit_sparse"]

        def restore(kinds: Collection[Attaches]) -> None:
            if self.base_fingerprint not in ("", saved["base"]):
                raise BadInput(
                    f"the checkpoint was trained on another base than {self.base!r}; give the base of the run that "
                    f"wrote it."
                )
            self._check_sums(saved)
            self.updates.restore(model, saved["updates"], self._context, kinds)

        self._prepare()
        self._attach_and_shard(restore)
        self._after_attach()

    def take_seed(self, saved: Mapping[str, Any]) -> None:
        """Draw a bare configuration's weights from the seed of the run that wrote a checkpoint."""
        seed = saved.get("init_seed", 0)  # older checkpoints lack it: all drew from 0
        if self.is_drawn and seed != self.init_seed:
            self.init_seed, self.model, self._hollow = seed, None, None  # what was drawn of another goes

    def _check_sums(self, saved: Mapping[str, Any]) -> None:
        """Refuse a base that differs from the checkpoint's by bits that its fingerprint rounds away or leaves out."""
        before, alike = saved.get("base_sums"), saved.get("precision") == str(self.frozen_dtype).removeprefix("torch.")
        if before and self.base_sums and alike and before != self.base_sums:
            raise BadInput(
                f"the weights of the base {self.base!r} are not quite those that the run began with: its files are "
                "damaged, or were written anew in another precision; bring the same files again."
            )

    @property
    def _mesh_of_states(self) -> DeviceMesh | None:
        """Where each rank reads its shards of what strategies saved: none if one of them attaches to a whole model."""
        if not self.to_shard or any(update.attaches_to not in ("either", "shards") for update in self.updates):
            return None
        assert isinstance(self.trainer.strategy, FSDP2Strategy)
        return self.trainer.strategy.mesh

    @property
    def _context(self) -> Context:
        units = tuple(decoder_layers(self.build())) if self.to_shard else ()
        shard = self._shard_copy if self.to_shard else None
        return Context((), self.activation_checkpointing, units, self._compute_in_precision, shard)

    def _prepare(self) -> None:
        """Prepare the model for strategies: move it to its device, where they keep copies, and set training mode."""
        model = self.build()
        if self._trainer is not None and not self.to_shard:  # which moves one layer after the other
            model.to(self.device_to_be)  # pyright: ignore[reportArgumentType]
        if self.activation_checkpointing and self.updates.backward == "none":
            (method,) = [type(update).__name__ for update in self.updates if update.backward == "none"]
            rank_zero_info(f"model.activation_checkpointing has no effect: {method} computes losses without a graph.")
        elif self.activation_checkpointing:
            checkpoint_activations(model)
        model.train()

    def _after_attach(self) -> None:
        model, self._attached = self.build(), True
        settle_trainable(model)
        self._upcast()
        self._casts = cast_norm_inputs(model)
        if not trainable(model):
            raise BadInput(f"nothing is left to train with {self.updates}.")
        if self.compile_model:
            compile_model(model, by_layer=any(update.period is not None for update in self.updates))
        self.note_trained()
        if self._trainer is not None:
            check_updates_alike(self.updates, self.base_fingerprint)
        if self.to_shard:
            if not self._sharded:
                self._shard()
            self._sharded[0].check_dtypes()
            with forked_rng(self.device_to_be), self.phases("selection"):
                self.updates.on_shard()
            self._sharded[0].reshard()  # pyright: ignore[reportCallIssue] - what a pass without a backward leaves

    def _upcast(self) -> None:
        """Upcast what trains to fp32; FSDP2 cannot change a sharded dtype, so the optimizer keeps masters there."""
        if self.updates.masters and not self.to_shard:
            self.masters.upcast(self.build())

    def _shard(self) -> None:
        if is_quantized(self.build()):
            raise BadInput(
                "trainer.strategy is fsdp2, which cannot shard a quantised base; set it to ddp, where each rank has "
                "the whole."
            )
        assert isinstance(self.trainer.strategy, FSDP2Strategy)
        self._sharded = (self.trainer.strategy.shard(self.build()),)
        if self._hollow is not None:
            with self.phases("loading"):
                self._hollow.fill()
                self._note_base(sorted(self._hollow.parameters()))

    def _shard_copy(self, model: nn.Module) -> Callable[..., Any]:
        """Shard a frozen copy of the base, made before the model itself was sharded; return how to compute with it."""
        assert isinstance(self.trainer.strategy, FSDP2Strategy)
        assert isinstance(model, PreTrainedModel)
        hollow = None if self._hollow is None else self._hollow.of_copy(model)
        sharded = self.trainer.strategy.shard(model)
        if hollow is not None:
            with self.phases("loading"):
                hollow.fill()
        return sharded.compute

    def _compute_in_precision(self, function: Callable[..., Any], *args: Any) -> Any:
        with self.autocast():  # weights may be of several dtypes
            return self.compute(function, *args)

    def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`. Call the model only through this: its parameters may be sharded."""
        return self._sharded[0].compute(function, *args) if self._sharded else function(*args)

    def detach(self) -> PreTrainedModel:
        """Take every strategy off again, last one first, and return the plain model with what was trained merged in.

        Where weights of its own trained in fp32, all of it is in fp32; else it is in the base's dtype, to which an
        adapter or blocks were rounded.

        Raises:
            BadInput: if the model is sharded.
        """
        if self._sharded:
            raise BadInput(
                "the model is sharded over ranks and cannot be put together in place; save a checkpoint, and load or "
                "export that in a process of its own."
            )
        model = self.take_off()
        mixed = any(parameter in self.masters for parameter in model.parameters())
        return model.float() if mixed and not is_quantized(model) else model

    def probe(self, steps: int, /, weighed: bool = True) -> Iterator[Tensor]:
        """Yield losses of the first `steps` training batches (or as many as there are), in the training's precision.

        `Probe` documents `weighed`.
        """
        rank_zero_info(f"{self.updates.names} looks at {steps} training batches before training.")
        if not self._sharded:  # else its shards are there
            self.build().to(self.device_to_be)  # pyright: ignore[reportArgumentType]
        batches = islice(self.trainer.fit_loop._data_source.dataloader(), steps)
        weighing = weigh_batches(batches, self.scored_count, self.device_to_be)
        for batch, weight in weighing if weighed else zip(batches, repeat(1.0)):
            batch = move_data_to_device(batch, self.device_to_be)
            with self.autocast():
                yield self.compute(self.loss, batch)[0] * weight

    def note_trained(self) -> None:
        """Remember the names of what is trainable now, or of all weights where frozen ones were moved."""
        moved = any(update.base == "moved" for update in self.updates)
        named = self.build().named_parameters() if moved else trainable(self.build())
        self.trained |= {f"model.{name}" for name, _ in named}

    def take_off(self) -> PreTrainedModel:
        """Detach the strategies and return the plain model."""
        self.updates.detach(self.build())
        for handle in self._casts:
            handle.remove()
        self._attached, self._casts = False, []
        return self.build()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the computation: autocast to bfloat16 where the frozen weights are."""
        if self.frozen_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_to_be.type, self.frozen_dtype)
