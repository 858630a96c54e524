"""The host: a LightningModule that trains a Hugging Face model with update strategies, and knows no method's name."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lit_sparse.anatomy import is_quantized, weights_in
from lit_sparse.checkpoints import alike, fingerprint, forked_rng, get_rng, read_checkpoint, set_rng
from lit_sparse.demo import DEMO
from lit_sparse.errors import BadInput
from lit_sparse.modules.checks import HALF, check_masters, check_sharding, check_trainer
from lit_sparse.modules.loading import Quantization, checkpoint_activations, load_base
from lit_sparse.modules.schedule import Schedule, factor
from lit_sparse.modules.sharding import FSDP2Strategy, Sharded
from lit_sparse.optim import AdamW, match_by_name, parameter_groups, regroup, trainable, whole
from lit_sparse.strategies.base import UpdateStrategy, check_keeps_base, compose
from lit_sparse_profiling.phases import Phases

Precision = Literal["auto", "float32", "bfloat16"]
CLIP_EPS = 1e-6
"""What torch adds to a norm before it divides by it, in clip_grad_norm_."""


class LitSparse(L.LightningModule, ABC):
    """Train a Hugging Face model with update strategies.

    Args:
        base: The model: `demo` (SmolLM2-135M-Instruct, downloaded once), a folder, a Hugging Face name, a `config.json`
            (random weights), or in Python a loaded transformers model.
        updates: Update strategies to train with, together; none is full fine-tuning.
        lr: Peak learning rate.
        optimizer: Optimizer of the trainable parameters; none is AdamW, or what an update strategy insists on. Biases
            and norms are in a group without weight decay.
        schedule: Course of the learning rate after warm-up, a step at a time, to the end of training.
        warmup_steps: Optimizer steps of linear warm-up; below 1, a share of all steps.
        precision: Type of the frozen weights and of the computation. What is trained is kept in fp32 always. `auto` is
            bfloat16 on a GPU and float32 on a CPU.
        activation_checkpointing: Recompute activations layer by layer in the backward instead of keeping them.
        attention: Attention implementation of transformers: `sdpa`, `eager`, `flash_attention_2`, ...
        compile: Compile the model with torch.compile.
        full_checkpoints: Save all weights in checkpoints instead of what was trained.
        quantize: Keep the linear layers of the frozen base in 4 bits (`nf4`, with quantised scales) or 8 (`int8`)
            through bitsandbytes; for adapters only, which leave the base as it is.
    """

    auto_class: ClassVar[Any]
    """The transformers Auto class that loads the model of this task."""

    def __init__(
        self,
        base: Any = DEMO,
        updates: list[UpdateStrategy] = [],  # noqa: B006 - jsonargparse shows and appends to this default; it is copied
        lr: float = 2e-5,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = "linear",
        warmup_steps: float = 0,
        precision: Precision = "auto",
        activation_checkpointing: bool = False,
        attention: str = "sdpa",
        compile: bool = False,
        full_checkpoints: bool = False,
        quantize: Quantization | None = None,
    ) -> None:
        super().__init__()
        # A loaded model is kept in a tuple: as an attribute it would be a submodule, beside `self.model`.
        self._given: tuple[PreTrainedModel, ...] = (base,) if isinstance(base, PreTrainedModel) else ()
        self.base: Any = type(base).__name__ if self._given else base
        self.updates = compose(updates)
        if quantize is not None:
            check_keeps_base(f"model.quantize is {quantize}", self.updates)
            if self._given:
                raise BadInput(
                    f"model.quantize is {quantize}, but the base given is loaded already; give its folder or name, or "
                    "load it quantised and leave model.quantize out."
                )
        self.lr, self.make_optimizer = lr, optimizer
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps
        self.precision: Precision = precision
        self.activation_checkpointing, self.attention, self.compile_model = activation_checkpointing, attention, compile
        self.full_checkpoints = full_checkpoints
        self.quantize: Quantization | None = quantize
        self.model: PreTrainedModel | None = None
        self.base_fingerprint = ""
        self.base_parameters = 0
        self.resume_from: str | Path | None = None
        self.phases = Phases()
        self.strict_loading = False  # checkpoints hold what was trained; check_complete sees that all of it is there
        self.trained: set[str] = set()  # names of what was trainable at any time: small checkpoints hold just these
        self.of_training = {"train_loss"}  # names of what is logged in training, which scores no evaluation
        self._attached = False
        self._moved = False  # whether what trains has other values than it began with
        self._sharded: tuple[Sharded, ...] = ()  # a tuple, as above
        self._widened: dict[torch.nn.Parameter, torch.dtype] = {}
        self._rng: Any = None

    # ---- the task's part

    @abstractmethod
    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Mean loss of a batch (scalar with a graph), and the model's output, for strategies with a penalty."""

    @property
    def config_options(self) -> dict[str, Any]:
        """What the task sets in the configuration of the base that it loads."""
        return {}

    def always_trained(self) -> Iterator[torch.nn.Parameter]:
        """What trains whatever the strategies freeze: parts of the model that are the task's own."""
        return iter(())

    # ---- building

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.phases = Phases(self.device_to_be)
            check_trainer(self.trainer, self.updates)
            if self.to_shard:
                check_sharding(self.updates, {"quantize": self.quantize, "compile": self.compile_model})

    def configure_model(self) -> None:
        with self.phases("loading"):
            self.build()
        if self._attached or self.trainer.state.fn != "fit":
            return
        with torch.device("cpu"):  # Lightning has made its own device the default one, where draws would be others
            if self.resume_from is not None:
                self.restore(read_checkpoint(self.resume_from))
            else:
                self._attach()

    def build(self) -> PreTrainedModel:
        """The base model, loaded in the precision of its frozen weights (also set as `self.model`)."""
        if self.model is None:
            task, dtype = self.auto_class, self.frozen_dtype
            if self._given:
                self.model = self._given[0]
            else:
                device = self.device_to_be
                self.model = load_base(
                    task, self.base, dtype, self.attention, self.quantize, device, self.config_options
                )
            if is_quantized(self.model):
                check_keeps_base(f"the base {self.base} is quantised", self.updates)
            self.base_fingerprint = fingerprint(self.model)
            self.base_parameters = sum(weights_in(parameter) for parameter in self.model.parameters())
        return self.model

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Type of the weights that are not trained, and of the computation."""
        on_gpu = self.device_to_be.type == "cuda"
        return {
            "auto": torch.bfloat16 if on_gpu else torch.float32,
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
        }[self.precision]

    @property
    def device_to_be(self) -> torch.device:
        """The trainer's device, where the model may not have been moved yet; the module's own without a trainer."""
        return self.trainer.strategy.root_device if self._trainer is not None else self.device

    def _attach(self) -> None:
        assert self.model is not None
        self._prepare()
        with self.phases("selection"), forked_rng(self.device_to_be):
            for update in self.updates:
                update.attach(self.model, self.probe)
        self._after_attach()

    def _prepare(self) -> None:
        """Have the model as strategies find it: on its device, since they keep copies there, and in training mode."""
        model = self.build()
        if self._trainer is not None and not self.to_shard:  # which moves one layer after the other
            model.to(self.device_to_be)  # pyright: ignore[reportArgumentType]
        if self.activation_checkpointing:
            checkpoint_activations(model)
        model.train()

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Rebuild what the strategies made of the model, from a checkpoint of the same configuration.

        Raises:
            BadInput: if the checkpoint is of another base or of other strategies.
        """
        model, ours = self.build(), checkpoint["lit_sparse"]
        if ours["base"] != self.base_fingerprint:
            raise BadInput(
                f"the checkpoint was trained on another base than {self.base!r}; give the base of the run that "
                f"wrote it."
            )
        names = [type(update).__name__ for update in self.updates]
        if names != [entry["class"] for entry in ours["updates"]]:
            raise BadInput(
                f"the checkpoint was trained with "
                f"{[e['class'] for e in ours['updates']] or 'full fine-tuning'}, this run has "
                f"{names or 'full fine-tuning'}; give the configuration of the run that wrote it."
            )
        self._prepare()
        with forked_rng(self.device_to_be):
            for update, entry in zip(self.updates, ours["updates"], strict=True):
                update.restore(model, entry["state"])
        self._after_attach()

    def _after_attach(self) -> None:
        assert self.model is not None
        self._attached = True
        for parameter in self.always_trained():
            parameter.requires_grad_(True)
        self._widen()
        if not trainable(self.model):
            raise BadInput(f"nothing is left to train with {self.updates}.")
        if self.compile_model:
            self.model.base_model.compile()
        self._note_trained()
        if self.to_shard:
            self._shard()

    @property
    def to_shard(self) -> bool:
        """Whether the trainer's strategy divides the model among processes."""
        return self._trainer is not None and isinstance(self.trainer.strategy, FSDP2Strategy)

    def _shard(self) -> None:
        if is_quantized(self.build()):
            raise BadInput(
                "trainer.strategy is fsdp2, which cannot divide a quantised base; set it to ddp, where each "
                "process has the whole."
            )
        assert self.device_mesh is not None
        self._sharded = (Sharded(self.build(), self.device_mesh["data_parallel"]),)
        for update in self.updates:
            update.divided()

    def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, which uses the model: all that does has to come by here, for a model may be divided."""
        return self._sharded[0].compute(function, *args) if self._sharded else function(*args)

    def _widen(self) -> None:
        """Keep what trains in fp32, where an update at a small lr is not lost, and what stopped training as it was.

        What is divided stays in its dtype, which FSDP2 cannot change; the optimizer keeps fp32 masters of it.
        """
        if self.to_shard:
            return
        for parameter in self.build().parameters():
            if parameter.requires_grad and parameter.dtype in HALF:
                self._widened[parameter] = parameter.dtype
                parameter.data = parameter.data.float()
            elif not parameter.requires_grad and parameter in self._widened:
                parameter.data = parameter.data.to(self._widened.pop(parameter))

    def _note_trained(self) -> None:
        everything = any(update.moves_all for update in self.updates)
        named = self.build().named_parameters() if everything else trainable(self.build())
        self.trained |= {f"model.{name}" for name, _ in named}

    def detach(self) -> PreTrainedModel:
        """Take every strategy off again, last one first, and return the plain model with what was trained merged in.

        Where weights of its own trained in fp32, all of it is in fp32; else it is in the base's type, to which an
        adapter or blocks were rounded.

        Raises:
            BadInput: if the model is divided among processes.
        """
        if self._sharded:
            raise BadInput(
                "the model is divided among processes and cannot be put together in place; save a checkpoint, and "
                "load or export that in a process of its own."
            )
        model = self._take_off()
        mixed = any(parameter in self._widened for parameter in model.parameters())
        return model.float() if mixed and not is_quantized(model) else model

    def _take_off(self) -> PreTrainedModel:
        model = self.build()
        for update in reversed(self.updates):
            update.detach(model)
        self._attached = False
        return model

    def probe(self, steps: int) -> Iterator[Tensor]:
        """Losses of the first `steps` training batches (or as many as there are), in the training's precision."""
        names = " and ".join(type(update).__name__ for update in self.updates)
        rank_zero_info(f"{names} looks at {steps} training batches before training.")
        self.build().to(self.device_to_be)  # pyright: ignore[reportArgumentType]
        loader = self.trainer.fit_loop._data_source.dataloader()
        for _, batch in zip(range(steps), loader, strict=False):
            with self.autocast():
                yield self.loss(move_data_to_device(batch, self.device_to_be))[0]

    # ---- training

    def autocast(self) -> AbstractContextManager[Any]:
        """The computation's precision: autocast to bfloat16 where the frozen weights are."""
        if self.frozen_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_to_be.type, self.frozen_dtype)

    def on_fit_start(self) -> None:
        frozen, masters = str(self.frozen_dtype).removeprefix("torch."), self._sharded and self.frozen_dtype in HALF
        trained = "the masters of what is trained" if masters else "what is trained and its optimizer"
        rank_zero_info(f"Frozen weights and computation are in {frozen}, {trained} in float32.")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._rng is not None:  # only now: making the loaders' iterators draws random numbers too
            self._go_on_drawing(self._rng)
            self._rng = None

    def _go_on_drawing(self, states: Any) -> None:
        before, now = set_rng(states, self.device, self.global_rank, self.trainer.world_size), self.trainer.world_size
        if before != now:
            rank_zero_info(
                f"The checkpoint has random states of {before} processes, this run has {now}: each draws anew, from a "
                "seed of the old state and its rank."
            )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        with self.autocast():
            loss, output = self.compute(self.loss, batch)
            penalties = [p for update in self.updates if (p := update.penalty(batch, output)) is not None]
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss + torch.stack(penalties).sum() if penalties else loss

    def configure_optimizers(self) -> Any:
        assert self.model is not None
        named = [(f"model.{name}", parameter) for name, parameter in trainable(self.model)]
        own = [
            (update, optimizer)
            for update in self.updates
            if (optimizer := update.optimizer(named, self.lr)) is not None
        ]
        if own and self.make_optimizer is not None:
            raise BadInput(
                f"model.optimizer is set, but {type(own[0][0]).__name__} brings its own optimizer; remove "
                f"model.optimizer."
            )
        make = self.make_optimizer or AdamW
        optimizer = own[0][1] if own else make(parameter_groups(named), lr=self.lr)  # pyright: ignore
        check_masters(optimizer)
        match_by_name(optimizer)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * total
        scheduler = LambdaLR(optimizer, lambda step: factor(self.schedule, step, int(warmup), total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        by_norm = gradient_clip_algorithm in (None, "norm")
        if not gradient_clip_val or not by_norm or not isinstance(optimizer, AdamW):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        # The optimizer divides gradients as it reads them; to clip them in place would be a pass of its own.
        norm = torch.nn.utils.get_total_norm(grads)  # of bf16 gradients a bf16 number
        norm = whole(norm).float()
        optimizer.grad_scale = ((norm + CLIP_EPS) / gradient_clip_val).clamp(min=1)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for update in self.updates:
            update.before_step(self.global_step + 1, optimizer)
            numbers = dict(update.logged())
            self.of_training |= numbers.keys()
            self.log_dict(numbers)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._moved = True
        plain = getattr(optimizer, "optimizer", optimizer)
        # Here, since later hooks come after the checkpoint is written; global_step rises after this one.
        changed = [update.after_step(self.global_step + 1, plain) for update in self.updates]
        if any(changed):
            assert self.model is not None
            self._widen()
            regroup(plain, [(f"model.{name}", parameter) for name, parameter in trainable(self.model)])
            self._note_trained()
        plain.zero_grad()  # Lightning does it after the next forward only, which gradients need not live through

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.full_checkpoints:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value for name, value in state.items() if name in self.trained}
        checkpoint["lit_sparse"] = {
            "base": self.base_fingerprint,
            "precision": str(self.frozen_dtype).removeprefix("torch."),
            "updates": self._update_states(),
            "rng": get_rng(self.device, 1 if self._trainer is None else self.trainer.world_size),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "lit_sparse" not in checkpoint:
            raise BadInput("this is not a checkpoint of a lit_sparse run.")
        if self.resume_from is None and not self._fits(checkpoint["lit_sparse"], checkpoint["state_dict"].keys()):
            if self._attached or self._moved:  # given to the Trainer alone: what was prepared or trained is taken back
                self._start_over()
            self.restore(checkpoint)
        self.check_complete(checkpoint)
        self._moved, self._rng = True, checkpoint["lit_sparse"]["rng"]

    def _fits(self, ours: Mapping[str, Any], names: Collection[str]) -> bool:
        """Whether a checkpoint's values, loaded over those that are there, leave nothing of another training."""
        if not self._attached or self._sharded or not self.trained <= set(names):
            return False
        here = {"base": self.base_fingerprint, "updates": self._update_states(), "classes": self.classes}
        return all(alike(value, ours.get(key)) for key, value in here.items())

    def _update_states(self) -> list[dict[str, Any]]:
        return [{"class": type(update).__name__, "state": update.state_dict()} for update in self.updates]

    @property
    def classes(self) -> Any:
        """What the task keeps in a checkpoint of the classes that it tells apart; None where it tells none."""
        return None

    def _start_over(self) -> None:
        """Take back what was prepared for a fresh start, to the bit; and a training, by beginning with the base."""
        rewritten = is_quantized(self.build()) or any(update.rewrites_base for update in self.updates)
        if not (rewritten or self._moved or self._sharded):
            self._take_off()
            for parameter, dtype in self._widened.items():
                parameter.data = parameter.data.to(dtype)
            self._widened, self.trained = {}, set()
            return
        if self._given:
            raise BadInput(
                "the checkpoint was given to the trainer alone, after the model given as base had been changed in a "
                "way that cannot be taken back exactly; make a new module of the model loaded anew, and set its "
                "resume_from to the checkpoint too."
            )
        self.model, self._attached, self._moved, self._sharded, self._widened = None, False, False, (), {}
        self.trained = set()
        self.updates = [dataclasses.replace(update) for update in self.updates]  # pyright: ignore[reportArgumentType]
        self.build()

    def check_complete(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that lacks a value of what this module trains; call it after `restore`.

        Raises:
            BadInput: naming the first that is missing.
        """
        if missing := sorted(self.trained - set(checkpoint["state_dict"])):
            raise BadInput(
                f"the checkpoint lacks {len(missing)} trained parameters of this configuration, the first is "
                f"{missing[0]}."
            )
        if not self.full_checkpoints:
            self.trained |= set(checkpoint["state_dict"])
