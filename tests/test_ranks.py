"""Two processes select the same blocks, from both ranks' data, and train to the same weights."""

import hashlib
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
import yaml

from lit_sparse.configs import configs_folder
from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.optim import trainable
from lit_sparse.runs import build_module
from lit_sparse.strategies import SMT
from lit_sparse.strategies.base import ALONE
from lit_sparse.testing import tiny_llm
from tests.pair import attempt, result, run_pair

METHODS = sorted(path.stem for path in configs_folder().glob("*.yaml"))
OPTIONS = {"trainable_fraction": 0.05, "block_size": 8, "targets": ["all"], "selection_batches": 2}


def losses(model, seeds):
    for seed in seeds:
        ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(seed))
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        yield torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def chosen(seeds):
    model, strategy = tiny_llm("llama"), SMT(**OPTIONS)
    strategy.attach(model, lambda steps: losses(model, seeds), ALONE)
    return {name: blocks.index.tolist() for name, blocks in strategy.choice.items()}


def choose(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(chosen([10 * rank, 10 * rank + 1]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_choose_the_same_blocks_of_all_data(tmp_path):
    torch.multiprocessing.spawn(choose, (tmp_path,), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
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
    """Each method's YAML under DDP in one of two processes."""
    for method in METHODS:
        attempt(folder, rank, method, lambda method=method: replica(folder, method))


def replica(folder: Path, method: str) -> str:
    config = yaml.safe_load((configs_folder() / f"{method}.yaml").read_text())["model"]
    module = build_module({"model": {**config, "base": str(folder / "base")}})
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
        trainer.fit(module, datamodule=rows)
    except BadInput as error:
        return str(error)
    return digest(module)


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
    if method.startswith("lisa"):
        assert "but DDP reduces only the gradients of weights that are trainable when it starts; set trainer" in first
    else:
        assert len(first) == 64, first


def test_the_weights_of_replicas_tell_methods_apart(pair):
    trained = [result(pair, method) for method in METHODS if not method.startswith("lisa")]
    assert len(set(trained)) == len(trained), "the hashes must be of what was trained, or they prove nothing"
