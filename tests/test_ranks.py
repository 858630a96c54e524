"""Two processes select the same blocks, from both ranks' data, and train to the same weights."""

import hashlib
import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist

from lit_sparse import ranks
from lit_sparse.callbacks.checkpointing import Stopped
from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.optim import AdamW, trainable
from lit_sparse.ranks import average_gradients, largest_of_ranks
from lit_sparse.strategies import LISA, MEFT, SMT, SparseEntries
from lit_sparse.strategies.base import ALONE, UpdateStrategy
from lit_sparse.strategies.layer_sampling import Cyclic
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.step_plan import Plan
from tests.methods import METHODS, module
from tests.pair import attempt, result, run_pair

OPTIONS = {"trainable_fraction": 0.05, "block_size": 8, "targets": ["all"], "selection_batches": 2}


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 2,
    "strategy": "ddp",
    "use_distributed_sampler": False,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def losses(model, seeds):
    for seed in seeds:
        ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(seed))
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        yield torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def chosen(seeds):
    model, strategy = tiny_llm("llama"), SMT(**OPTIONS)
    strategy.attach(model, lambda steps: losses(model, seeds), ALONE)
    return {name: blocks.index.tolist() for name, blocks in strategy.choice.items()}


def choose(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(chosen([10 * rank, 10 * rank + 1]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_choose_the_same_blocks_of_all_data(tmp_path):
    run_pair(choose, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second == chosen([0, 1, 10, 11])
    assert first != chosen([0, 1]), "the other rank's data must matter, or this proves nothing"


def digest(module) -> str:
    """A hash of what was trained."""
    values = hashlib.sha256()
    for name, parameter in trainable(module.build()):
        values.update(name.encode() + parameter.detach().numpy().tobytes())
    return values.hexdigest()


def replicas(folder: Path, rank: int) -> None:
    """Each method's YAML under DDP in one of two processes, and a trainable set that changes."""
    for method in METHODS:
        attempt(folder, rank, method, lambda method=method: replica(folder, method))
    attempt(folder, rank, "averages", lambda: averages(rank))
    for name in COMPARED:
        attempt(folder, rank, f"{name} compared", lambda name=name: compared(folder, name, True))
    attempt(folder, rank, "signals", lambda: signals(folder, rank))
    attempt(folder, rank, "disagreements", lambda: disagreements(folder, rank))


class Draws(Cyclic):
    """A rank-dependent draw, from the third on."""

    def draw(self, layers, count, seed, number):
        return super().draw(layers, count, seed, number + (dist.get_rank() if number > 1 else 0))


def disagreements(folder: Path, rank: int) -> dict[str, str]:
    """Return the error of fits in which this rank does otherwise than the other."""
    plans = {
        "draw": ([LISA(active_layers=1, interval=1, sampler=Draws())], {}),
        "selection": ([SMT(blocks="random", seed=rank, **OPTIONS)], {}),
        "data": ([], {"rows": 16 + 4 * rank}),
        "order": ([], {"seed": rank}),
        "steps": ([], {"max_steps": 3 + rank}),
    }
    found = {}
    for name, (updates, options) in plans.items():
        trainer = L.Trainer(max_steps=options.pop("max_steps", 3), **QUIET)
        rows = Synthetic(**{"vocab_size": 96, "max_length": 12, "rows": 16, "batch_size": 2, **options})
        try:
            trainer.fit(CausalLM(str(folder / "base"), updates), datamodule=rows)
        except BadInput as error:
            found[name] = str(error)
    return found


def signals(folder: Path, rank: int) -> dict[str, list]:
    """Send rank 1 a signal in its second step; return how the fit of this rank ends."""
    found = {}
    for number in (signal.SIGTERM, signal.SIGUSR1):
        run = folder / number.name
        recorder = Recorder(run, Plan(profiled=0), {}, 0, 100)
        callbacks = [Signalled(number), recorder] if rank else [recorder]
        trainer = L.Trainer(max_steps=4, callbacks=callbacks, **QUIET)
        try:
            rows = Synthetic(vocab_size=96, max_length=12, rows=16, batch_size=2)
            trainer.fit(CausalLM(str(folder / "base")), datamodule=rows)
        except Stopped as stopped:
            found[number.name] = [trainer.global_step, str(stopped), (run / "checkpoints" / "last.ckpt").is_file()]
    return found


class Signalled(L.Callback):
    """Send this process a signal in the second step."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 1:
            os.kill(os.getpid(), self.number)


def averages(rank: int) -> list:
    """Average gradients of which one rank has some, and neither has one; return them."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16) * 2]
    for number, parameter in enumerate(parameters[:3]):
        if number != rank:
            parameter.grad = torch.full_like(parameter, 1.0 + number + rank)
    average_gradients(parameters)
    return [None if parameter.grad is None else parameter.grad.flatten().tolist() for parameter in parameters]


COMPARED: dict[str, Callable[[], UpdateStrategy]] = {
    "lisa": partial(LISA, active_layers=1, interval=1, sampler="cyclic"),
    "entries": partial(SparseEntries, entries="gradient", policy="grow_and_prune", reselect=1, moments="seeded"),
    "meft": MEFT,
    "meft in segments": partial(MEFT, exact=False, checkpoint_every=2, variant=3),
}
"""Methods whose two replicas are held to one process: a trainable set that changes every step; a backward pass of its
own."""


def compared(folder: Path, name: str, replicated: bool) -> dict[str, list[float]]:
    """Train with accumulation and clipping; return the weights."""
    os.environ.pop("PL_GLOBAL_SEED", None)  # of another test's fit, with which DDP would seed again
    torch.manual_seed(0)  # of adapters
    update = COMPARED[name]()
    smooth = partial(AdamW, eps=1e-3)  # its update is a smooth function of the gradient, of a slope up to lr / eps
    module = CausalLM(str(folder / "base"), [update], lr=1e-2, optimizer=smooth, warmup_steps=0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2 if replicated else 1,
        strategy="ddp" if replicated else "auto",
        max_steps=3,
        accumulate_grad_batches=2,
        gradient_clip_val=0.05,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Synthetic(vocab_size=96, max_length=12, rows=32, batch_size=2 if replicated else 4))
    return {name: parameter.flatten().tolist() for name, parameter in module.build().named_parameters()}


def replica(folder: Path, method: str) -> str:
    made = module(method, folder / "base")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=3,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = Synthetic(vocab_size=96, max_length=12, rows=16, heldout=2, batch_size=2)
    try:
        trainer.fit(made, datamodule=rows)
    except BadInput as error:
        return str(error)
    return digest(made)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Return the folder with the weights that two processes trained."""
    folder = tmp_path_factory.mktemp("pair")
    tiny_llm("llama").save_pretrained(folder / "base")
    run_pair(replicas, folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_replicas_train_to_the_same_weights(method, pair):
    first, second = (result(pair, method, rank) for rank in range(2))
    assert first == second
    fused = [type(one).__name__ for one in module(method, "unused").updates if one.backward == "fused"]
    if fused:
        why = "updates weights in the backward pass, before ddp has averaged their gradients"
        assert first.startswith(f"{fused[0]} {why}")
        return
    assert len(first) == 64, first


def test_gradients_are_averaged_where_any_rank_has_one(pair):
    for rank in range(2):
        first, second, third, fourth = result(pair, "averages", rank)
        assert first == [1.0] * 6  # (0 + 2) / 2
        assert second == [1.0] * 6  # (2 + 0) / 2
        assert third == [3.5] * 6
        assert fourth is None


def test_ranks_that_differ_are_refused_on_both_in_one_sentence(pair):
    first, second = (result(pair, "disagreements", rank) for rank in range(2))
    assert first == second
    wanted = {
        "draw": "ranks differ in what LISA selected or drew: rank 0 has ",
        "selection": "ranks differ in what SMT selected or drew: rank 0 has ",
        "data": "ranks differ in the number of training batches: rank 0 has 4, rank 1 has 5; give every rank the same",
        "order": "ranks differ in the order of the rows: rank 0 has ",
        "steps": "ranks differ in the trainer: rank 0 has max_steps 3, ",
    }
    assert {name: sentence[: len(wanted[name])] for name, sentence in first.items()} == wanted


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_saves_and_ends_all(number, pair):
    for rank in range(2):
        step, sentence, saved = result(pair, "signals", rank)[number]
        assert step == 2
        assert saved
        assert sentence.startswith(f"{number} stopped the fit after step 2; go on with --ckpt_path")


def test_what_is_no_number_is_the_largest() -> None:
    assert largest_of_ranks([0.5, 2.0, 1.0]) == 2
    assert math.isnan(largest_of_ranks([0.5, math.nan, 1.0]))


def test_buckets_hold_every_parameter_once_in_order(monkeypatch):
    monkeypatch.setattr(ranks, "BUCKET_BYTES", 20)
    dtypes = [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float32]
    parameters = [torch.zeros(3, dtype=dtype) for dtype in dtypes]
    buckets = list(ranks._buckets(parameters))
    assert [len(bucket) for bucket in buckets] == [2, 1, 1, 1]
    flat = [one for bucket in buckets for one in bucket]
    assert all(one is other for one, other in zip(flat, parameters, strict=True))


@pytest.mark.parametrize("name", COMPARED)
def test_two_replicas_train_what_one_process_does(name, pair):
    first, second = (result(pair, f"{name} compared", rank) for rank in range(2))
    assert first == second
    alone, start = compared(pair, name, False), dict(tiny_llm("llama").named_parameters())
    moved = {key for key, own in alone.items() if key not in start or own != start[key].flatten().tolist()}
    assert len({key.split(".")[2] for key in moved if ".layers." in key}) == 3, "not every layer was trained"
    for key, value in alone.items():  # entries are below 0.1, so that orders of summation are 1e-8 apart
        torch.testing.assert_close(torch.tensor(first[key]), torch.tensor(value), rtol=0, atol=2e-6)


def test_the_weights_of_replicas_tell_methods_apart(pair):
    by_hash: dict[str, list[str]] = {}
    for method in METHODS:
        by_hash.setdefault(result(pair, method), []).append(method)
    alike = [several for several in by_hash.values() if len(several) > 1]
    assert not alike, "the hashes must be of what was trained, or they prove nothing"
