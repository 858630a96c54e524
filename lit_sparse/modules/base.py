"""The host: a LightningModule that trains a Hugging Face model with update strategies, and knows no method's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_sparse.demo import DEMO
from lit_sparse.errors import BadInput
from lit_sparse.modules.checks import (
    check_async_save,
    check_callbacks,
    check_data_alike,
    check_masters,
    check_sharding,
    check_trainer,
    check_updates_alike,
)
from lit_sparse.modules.forward_only import WindowLoss
from lit_sparse.modules.loading import Quantization
from lit_sparse.modules.precision import Precision
from lit_sparse.modules.schedule import Schedule, scheduler_of
from lit_sparse.modules.scores import Scored
from lit_sparse.optim import AdamW, match_by_name
from lit_sparse.ranks import all_reduce_sum, average_gradients
from lit_sparse.strategies import UpdateStrategy

MAX_SKIPPED = 10
"""Steps in a row whose loss may be no finite number, by default."""


class LitSparse(Scored):
    """Train a Hugging Face model with update strategies.

    Args:
        base: The model: `demo` (SmolLM2-135M-Instruct, downloaded once), a folder, a Hugging Face name, a `config.json`
            (random weights, drawn from `seed_everything`), or in Python a loaded transformers model.
        updates: Update strategies to train with, together; none is full fine-tuning.
        lr: Peak learning rate.
        optimizer: Optimizer of the trainable parameters; none is AdamW, or what an update strategy insists on. Biases
            and norms are in a group without weight decay.
        schedule: Course of the learning rate after warm-up, a step at a time, to the end of training.
        warmup_steps: Optimizer steps of linear warm-up; below 1, a share of all steps.
        precision: Type of the frozen weights and of the computation. What is trained is kept in fp32 always. `auto` is
            bfloat16 on a GPU and float32 on a CPU.
        activation_checkpointing: Recompute activations layer by layer in the backward instead of keeping them.
        attention: Attention implementation of transformers: `sdpa`, `eager`, `flash_attention_2`, ...; none is the one
            that transformers chooses for the model.
        compile: Compile the model with torch.compile.
        full_checkpoints: Save all weights in checkpoints instead of what was trained.
        quantize: Keep the linear layers of the frozen base in 4 bits (`nf4`, with quantised scales) or 8 (`int8`)
            through bitsandbytes; for adapters only, which leave the base as it is.
        max_skipped: Steps in a row that may be skipped since their loss is not finite, before the run ends.

    Attributes:
        take_earlier_steps: Called with the module before the first step of a fit, once the optimizer exists, to take
            the steps of a log again; None for a fit that begins at the base or a checkpoint.
    """

    def __init__(
        self,
        base: str = DEMO,
        updates: list[UpdateStrategy] = [],  # noqa: B006 - jsonargparse shows and appends to this default; it is copied
        lr: float = 2e-5,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = "linear",
        warmup_steps: float = 0,
        precision: Precision = "auto",
        activation_checkpointing: bool = False,
        attention: str | None = None,
        compile: bool = False,
        full_checkpoints: bool = False,
        quantize: Quantization | None = None,
        max_skipped: int = MAX_SKIPPED,
    ) -> None:
        super().__init__(
            base,
            updates,
            precision,
            activation_checkpointing,
            attention,
            compile,
            quantize,
            full_checkpoints=full_checkpoints,
        )
        for name, value in {"lr": lr, "warmup_steps": warmup_steps}.items():
            if not 0 <= value < float("inf"):  # nor NaN
                raise BadInput(f"model.{name} is {value}; it must be a number from 0 on.")
        if max_skipped < 0:
            raise BadInput(f"model.max_skipped is {max_skipped}; it must be 0 or more.")
        if max_skipped != MAX_SKIPPED and self.updates.backward == "none":
            raise BadInput(
                f"model.max_skipped is {max_skipped}, but {self.updates.names} counts the steps that it skips itself; "
                "set its own max_skipped."
            )
        self.lr, self.make_optimizer = lr, optimizer
        self.guard.most = max_skipped
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps
        self._batches: list[Any] = []  # of an optimizer step, for a method that computes losses itself
        self._value = torch.zeros(())  # its last loss
        self.take_earlier_steps: Callable[[LitSparse], None] | None = None

    def configure_callbacks(self) -> list[Any]:
        if self.trainer.state.fn == "fit":
            check_callbacks(self.trainer)  # here, before any of them acts
        return []

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_trainer(self.trainer, self.updates)
            check_data_alike(self.trainer)
            if self.to_shard:
                check_sharding(self.updates, {"quantize": self.quantize, "compile": self.compile_model})
                check_async_save(self.trainer)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._batches.clear()  # of a step that an earlier fit did not take
        if self.take_earlier_steps is not None:
            self.take_earlier_steps(self)
            self._moved = True

    def weighed_loss(self, batch: Mapping[str, Tensor], micro_batches: int) -> Tensor:
        """Return the loss of a batch with the strategies' penalties, weighed for its accumulation window."""
        with self.autocast():
            loss, penalized, hits = self.compute(self._penalized_loss, batch)
        return self._window.weigh(loss, penalized, self.scored_count(batch), hits, micro_batches)

    def _penalized_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch's mean loss without and with the strategies' penalties, and its right predictions.

        Call it through `compute`: penalties use the model too.
        """
        loss, output, hits = self.graded_loss(batch)
        return loss, self.updates.penalized(loss, batch, output), hits

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.updates.backward == "none":
            self._batches.append(batch)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        if self.updates.backward == "none":  # the optimizer step has computed it, or will
            return self._value
        return self.weighed_loss(batch, self._micro_batches)

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        if self.updates.backward == "none":
            return
        backward = super().backward
        last, fused = not self.trainer.fit_loop._should_accumulate(), self.updates.backward == "fused"
        self.guard.note(loss, last or fused)
        if not fused or not self.guard.lost():  # a fused backward pass moves weights
            self.updates.run_backward(loss, lambda value, **more: backward(value, *args, **{**options, **more}))
        if last:
            self._average_replicated()
            self._close_window()

    def _average_replicated(self) -> None:
        """Average over ranks the gradients that the trainer's strategy leaves alone.

        They are those of parameters that each rank has whole beside a sharded model, and, where the trainable set
        changes under DDP, all.
        """
        if self._sharded or self._follows_trainable_set:
            average_gradients(parameter for _, parameter in self.updates.named if not isinstance(parameter, DTensor))

    @property
    def _follows_trainable_set(self) -> bool:
        """True under DDP with a trainable set that changes: DDP would reduce what is trainable when it starts."""
        return isinstance(self.trainer.strategy, DDPStrategy) and any(u.period is not None for u in self.updates)

    def configure_model(self) -> None:
        super().configure_model()
        forward_only = isinstance(self.trainer.strategy, DDPStrategy) and self.updates.backward == "none"
        if self._follows_trainable_set or forward_only:
            # The module is not wrapped. Its gradients are averaged by `_average_replicated`, if there are any.
            self.trainer.strategy.configure_ddp = lambda: None  # pyright: ignore[reportAttributeAccessIssue]

    def configure_optimizers(self) -> Any:
        try:
            optimizer = self.updates.optimizer(self.lr, self.make_optimizer)
        except BadInput:
            raise
        except ValueError as error:  # of torch's and others' optimizers, in a few words
            raise BadInput(f"model.optimizer refuses its settings: {error}; correct them.") from error
        if self.updates.masters:
            check_masters(optimizer)
        match_by_name(optimizer)
        scheduler = scheduler_of(optimizer, self.schedule, self.warmup_steps, self.trainer.estimated_stepping_batches)
        self._base_lrs = list(scheduler.base_lrs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if self.guard.skips:
            return
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and isinstance(optimizer, AdamW):
            optimizer.clip_norm(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.updates.backward == "autograd":
            if self.guard.skips:
                self.updates.skip_step(optimizer)
            else:
                self._before_step(optimizer)

    def _before_step(self, optimizer: Optimizer) -> None:
        numbers = self.updates.before_step(self.global_step + 1, optimizer)
        if self.updates.backward != "none":
            self._log_numbers(numbers)
        self.log("lr", optimizer.param_groups[0]["lr"])
        every = self.trainer.log_every_n_steps or 1  # pyright: ignore[reportAttributeAccessIssue]
        step = self.global_step + 1
        if step % every == 0 or step == self.trainer.max_steps:  # one that is logged: it is a pass over all gradients
            self._log_norm()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        plain, step = getattr(optimizer, "optimizer", optimizer), self.global_step + 1
        if self.updates.backward != "autograd":
            self._before_step(plain)
        if self.updates.backward == "none":
            self._step_without_graph(plain, optimizer_closure)
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._moved = True
        # Here, since later hooks come after the checkpoint is written; global_step rises after this one.
        if self.updates.after_step(step, plain):
            self.follow_trainable_set(plain)
        plain.zero_grad()  # Lightning does it after the next forward only, which gradients need not live through

    def follow_trainable_set(self, optimizer: Optimizer) -> None:
        """Give the optimizer what trains now, after `Updates.after_step` returned true."""
        self._upcast()
        self.updates.regroup(optimizer)
        self.note_trained()
        check_updates_alike(self.updates, self.base_fingerprint)

    def _step_without_graph(self, optimizer: Optimizer, closure: Callable[[], Any]) -> None:
        """Give the method the loss of all batches since the last step, to compute as often as it likes."""
        loss = WindowLoss(self, self._batches)
        with torch.no_grad():
            value = optimizer.step(loss)  # pyright: ignore[reportArgumentType, reportCallIssue]
        self._value = torch.as_tensor(value, device=self.device)
        self._log_numbers(self.updates.logged())
        self._count_tokens(all_reduce_sum(torch.stack([self.scored_count(batch) for batch in self._batches]).sum()))
        self._batches.clear()
        self._log_scores(self._value, loss.accuracy)
        closure()  # Lightning takes the step's result from it
