"""Two processes: they choose the same blocks, of both ranks' data, and train to the same weights."""

import hashlib
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.callbacks import Callback

from lit_sparse.configs import configs_folder
from lit_sparse.data import Synthetic
from lit_sparse.optim import trainable
from lit_sparse.runs import build_module
from lit_sparse.strategies import SMT
from lit_sparse.testing import tiny_llm

METHODS = sorted(path.stem for path in configs_folder().glob("*.yaml"))
OPTIONS = {"trainable_fraction": 0.05, "block_size": 8, "targets": ["all"], "selection_batches": 2}


def losses(model, seeds):
    for seed in seeds:
        ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(seed))
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        yield torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def chosen(seeds):
    model, strategy = tiny_llm("llama"), SMT(**OPTIONS)
    strategy.attach(model, lambda steps: losses(model, seeds))
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


class Digest(Callback):
    """Writes a hash of what was trained, by rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module) -> None:
        digest = hashlib.sha256()
        for name, parameter in trainable(pl_module.build()):
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
        (self.folder / str(trainer.global_rank)).write_text(digest.hexdigest())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")  # of the processes' start; that they agree is what counts here
def test_replicas_train_to_the_same_weights(method, tmp_path):
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    config = yaml.safe_load((configs_folder() / f"{method}.yaml").read_text())["model"]
    module = build_module({"model": {**config, "base": str(tmp_path / "base")}})
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_steps=3,
        use_distributed_sampler=False,
        callbacks=[Digest(tmp_path)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = Synthetic(vocab_size=96, max_length=12, rows=16, heldout=2, batch_size=2)
    if any(update.period is not None for update in module.updates):
        with pytest.raises(Exception, match="but DDP reduces the gradients of those alone that train when it starts"):
            trainer.fit(module, datamodule=rows)
        return
    trainer.fit(module, datamodule=rows)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
