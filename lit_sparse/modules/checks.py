"""Refuse incompatible trainer, strategy and optimizer settings."""

from collections.abc import Collection, Mapping, Sequence, Sized
from typing import Any

import lightning as L
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lit_sparse.anatomy import embedded_tokens
from lit_sparse.data import TokenData
from lit_sparse.data.loader import Loader
from lit_sparse.errors import BadInput
from lit_sparse.modules.checkpoint_io import WholeCheckpoints, is_remote
from lit_sparse.modules.precision import HALF
from lit_sparse.modules.sharding import FSDP2Strategy
from lit_sparse.optim import AdamW
from lit_sparse.ranks import check_agreement, digest_of, world_size
from lit_sparse.strategies import Updates
from lit_sparse.strategies.base import UpdateStrategy


def check_tokens(model: PreTrainedModel, data: TokenData) -> None:
    """Refuse data with token ids for which `model` has no embeddings, or rows longer than its positions.

    Raises:
        BadInput: naming the token, or the length.
    """
    size = embedded_tokens(model)
    room = positions(model)
    for name, highest, longest in data.extremes():
        if highest >= size:
            raise BadInput(
                f"the {name} rows have the token {highest} ({data.tokenizer.convert_ids_to_tokens(highest)!r}), but "
                f"the model has embeddings for {size} tokens only; give the tokenizer that belongs to the model."
            )
        if room is not None and room < longest:
            raise BadInput(
                f"the longest of the {name} rows has {longest} tokens, but the model has {room} positions "
                f"(max_position_embeddings); set data.max_length to {room} or less."
            )


def positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a model; None if it has no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def check_data_alike(trainer: L.Trainer) -> None:
    """Refuse ranks with other data or limits, before one of them waits in a batch that another does not have.

    Raises:
        BadInput: naming what differs.
    """
    if trainer.world_size == 1:
        return
    loader = trainer.fit_loop._data_source.dataloader()
    limits = f"max_steps {trainer.max_steps}, max_epochs {trainer.max_epochs}"
    check_agreement(
        {
            "the number of training batches": len(loader) if isinstance(loader, Sized) else "an unknown number",
            "the order of the rows": loader.batches.fingerprint()[:12] if isinstance(loader, Loader) else "unknown",
            "the trainer": f"{limits}, accumulate_grad_batches {trainer.accumulate_grad_batches}",
        }
    )


def check_updates_alike(updates: Updates, base: str) -> None:
    """Refuse ranks that train other weights than rank 0, or chose others: each would wait for the others.

    Args:
        base: Hash of the base's weights.

    Raises:
        BadInput: naming what differs.
    """
    if world_size() == 1:  # and nothing to hash for
        return
    trained = [(name, tuple(parameter.shape)) for name, parameter in updates.named]
    check_agreement(
        {
            "the base model": base[:12],
            f"what {updates.names} selected or drew": digest_of(updates.state_dict()),
            f"what is trained with {updates.names}": digest_of(trained),
        }
    )


def check_trainer(trainer: L.Trainer, updates: Sequence[UpdateStrategy]) -> None:
    """Refuse trainer settings that the module or one of its strategies cannot honour.

    Raises:
        BadInput: naming the setting.
    """
    if trainer.precision != "32-true":
        raise BadInput(
            f"trainer.precision is {trainer.precision}, but the module itself keeps trained weights in fp32; leave it "
            "at 32-true and set model.precision."
        )
    for update in updates:
        check_gradients_live(trainer, update)
        if isinstance(trainer.strategy, DDPStrategy) and update.backward == "fused":
            raise BadInput(
                f"{type(update).__name__} updates weights in the backward pass, before ddp has averaged their "
                "gradients over ranks; set trainer.strategy to fsdp2, which averages a layer's gradients at once, "
                "train on one device, or set fused_backward to false where the method has it."
            )
    sharding = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    if sharding and not isinstance(trainer.strategy, FSDP2Strategy):
        raise BadInput(
            f"trainer.strategy is {type(trainer.strategy).__name__}, which does not support update strategies and "
            "their checkpoints; set it to fsdp2."
        )


def check_callbacks(trainer: L.Trainer) -> None:
    """Refuse callbacks of Lightning that would do nothing, or harm, beside small checkpoints and a changing model.

    Raises:
        BadInput: naming the callback.
    """
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        for kind, (why, instead) in UNSUPPORTED.items():
            if isinstance(callback, kind):
                raise BadInput(
                    f"trainer.callbacks has {type(callback).__name__}, which does not work here: {why}; {instead}."
                )


def check_monitors(trainer: L.Trainer, known: Collection[str]) -> None:
    """Refuse callbacks that monitor a metric which nothing logs: Lightning finds out only after an epoch.

    Args:
        known: Names of what the task logs. A callback of the user's may log others, so that then nothing is refused.

    Raises:
        BadInput: naming the callback and the metrics that there are.
    """
    callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    if any(type(callback).__module__.partition(".")[0] not in ("lightning", "lit_sparse") for callback in callbacks):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in known:
            raise BadInput(
                f"trainer.callbacks has {type(callback).__name__} with monitor {monitor}, which nothing logs; give one "
                f"of {', '.join(sorted(known))}."
            )


AVERAGES = "it averages a copy of the model made before the strategies changed it, and checkpoints lack the average"
UNSUPPORTED: dict[type[L.Callback], tuple[str, str]] = {
    StochasticWeightAveraging: (AVERAGES, "remove it"),
    WeightAveraging: (AVERAGES, "remove it"),
    LearningRateFinder: (
        "it sets an attribute that the optimizer was not made of",
        "remove it, and try a few values of model.lr with trainer.max_steps=20",
    ),
    BatchSizeFinder: (
        "it trains with other rows per step than the data's order was made for",
        "remove it, and compare values of data.batch_size with lit-sparse bench",
    ),
    ModelPruning: (
        "it replaces weights by masked copies that neither the optimizer nor a checkpoint knows",
        "remove it; gmt.yaml and smt.yaml train few weights",
    ),
    BaseFinetuning: (
        "it freezes and unfreezes weights, which is what update strategies do",
        "remove it; lisa.yaml trains some layers at a time",
    ),
}
"""Callbacks that are refused, each with the reason and what to do instead."""


def check_gradients_live(trainer: L.Trainer, update: UpdateStrategy) -> None:
    """Refuse accumulation and clipping with a strategy that keeps no gradients until the optimizer step.

    Raises:
        BadInput: naming the setting.
    """
    if trainer.accumulate_grad_batches > 1 and update.accumulates:
        raise BadInput(
            f"{type(update).__name__} accumulates by itself, without gradients, so trainer.accumulate_grad_batches is "
            "not for it; give data.batch_size the rows of a step, and micro_batch those of a forward pass."
        )
    settings = {
        "accumulate_grad_batches": trainer.accumulate_grad_batches > 1 and update.backward == "fused",
        "gradient_clip_val": bool(trainer.gradient_clip_val) and update.backward != "autograd",
    }
    for key, given in settings.items():
        if given:
            raise BadInput(
                f"{type(update).__name__} keeps no gradients until the optimizer step (its backward is "
                f"{update.backward}), so trainer.{key} has no effect; remove trainer.{key}."
            )


def check_sharding(updates: Sequence[UpdateStrategy], options: Mapping[str, Any]) -> None:
    """Refuse strategies and options that do not work on a sharded model.

    Args:
        options: Values of the module's keys that must be off, by key of `UNSHARDED`.

    Raises:
        BadInput: naming the strategy, or the key.
    """
    for update in updates:
        if not update.supports_sharding:
            why = f": {update.unsharded_reason}" if update.unsharded_reason else ""
            raise BadInput(
                f"trainer.strategy is fsdp2, but {type(update).__name__} with these settings cannot train a sharded "
                f"model{why}; or set trainer.strategy to ddp, where each rank has the full model."
            )
    for key, given in options.items():
        if given:
            raise BadInput(
                f"trainer.strategy is fsdp2, which does not support model.{key}: {UNSHARDED[key]}; leave model.{key} "
                "out, or set trainer.strategy to ddp, where each rank has the full model."
            )


def check_async_save(trainer: L.Trainer) -> None:
    """Refuse to write checkpoints in the background where one rank writes them.

    Raises:
        BadInput: if they go to a URL, or by a plugin of the user's.
    """
    strategy, root = trainer.strategy, trainer.default_root_dir
    if not (isinstance(strategy, FSDP2Strategy) and strategy.async_save):
        return
    plugin = type(strategy.checkpoint_io)
    if is_remote(root) or plugin not in (TorchCheckpointIO, WholeCheckpoints):
        where = f"go to {root}" if is_remote(root) else f"are written by {plugin.__name__}"
        raise BadInput(
            f"trainer.strategy has async_save, which writes shards to a local folder, but checkpoints {where}; leave "
            "async_save out."
        )


UNSHARDED = {
    "quantize": "bitsandbytes packs several weights into a byte, with scales beside them, which cannot be cut by rows "
    "(of a bf16 base, shards on four ranks take 4 bits a weight too)",
    "compile": "it makes one graph of layers between which FSDP2 gathers and frees their weights",
}
"""Keys of the module that do not work on a sharded model, with the reason."""


def check_masters(optimizer: Optimizer) -> None:
    """Refuse an optimizer without fp32 masters for trainable weights in half precision.

    In bf16, which has 8 bits of significand, an update below about 2^-9 of a weight is rounded away.

    Raises:
        BadInput: naming the optimizer.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(parameter.dtype in HALF for parameter in trained) and not isinstance(optimizer, AdamW):
        name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise BadInput(
            f"model.optimizer is {name}, which keeps no fp32 masters, but under fsdp2 trained weights are in bfloat16, "
            "where small updates are lost; use lit_sparse.optim.AdamW, or set model.precision to float32."
        )
