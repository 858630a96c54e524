"""Every method under configs/ goes on from a checkpoint as if it had not stopped, and a model goes back to one."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_sparse.calls import evaluating
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.testing import tiny_llm
from tests.methods import METHODS, adapted, data, dropout, in_turn, module, over_gradients, strategies, trained, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # PEFT puts it right itself for GPT-2
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # the resumed runs save nothing
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),  # PEFT takes the next that divides the side
]


@pytest.mark.parametrize(
    ("method", "kind", "workers", "accumulate"),
    [(*pair, 0, 1) for pair in in_turn()] + [(*pair, 2, 2) for pair in in_turn(1)],
)
def test_resumed_is_straight(method, kind, tiny_base, tmp_path, workers, accumulate):
    """Bit for bit, from the middle of an epoch, with dropout, clipping, workers and accumulation."""
    base = tiny_base(adapted(method, kind), dropout(method))
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    L.seed_everything(0)
    straight = module(method, base)
    options = {"num_sanity_val_steps": 0, **over_gradients(straight, accumulate)}
    trainer(5, callbacks=[checkpoint], enable_checkpointing=True, **options).fit(
        straight, datamodule=data(num_workers=workers)
    )
    L.seed_everything(1)  # nothing of it may matter
    resumed = module(method, base)
    resumed.resume_from = tmp_path / "ckpt" / "step=2.ckpt"
    trainer(5, **options).fit(resumed, datamodule=data(num_workers=workers), ckpt_path=resumed.resume_from)
    expected = trained(straight)
    assert expected.keys() == trained(resumed).keys()
    for name, value in trained(resumed).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_given_to_the_trainer_alone_resumes_too(method, tiny_base, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    straight, resumed = module(method, tiny_base()), module(method, tiny_base())
    trainer(4, callbacks=[checkpoint], enable_checkpointing=True).fit(straight, datamodule=data())
    ckpt, wanted = tmp_path / "ckpt" / "step=2.ckpt", trained(straight)
    trainer(4).fit(resumed, datamodule=data(), ckpt_path=ckpt)
    for name, value in trained(resumed).items():
        assert torch.equal(value, wanted[name]), name
    fresh, batch = module(method, tiny_base()), {"input_ids": torch.arange(3, 9)[None]}
    logits = []
    for one in (straight, fresh):  # also to one that went on training since: nothing of that is left
        trainer(4).validate(one, datamodule=data(), ckpt_path=ckpt, verbose=False)
        with torch.no_grad(), evaluating(one.build()):
            logits.append(one.build()(**batch).logits)
    assert torch.equal(*logits)
    trainer(4).fit(straight, datamodule=data(), ckpt_path=ckpt)
    for name, value in trained(straight).items():
        assert torch.equal(value, wanted[name]), name
    straight.detach()
    trainer(4).validate(straight, datamodule=data(), ckpt_path=ckpt, verbose=False)
    with torch.no_grad(), evaluating(straight.build()):
        assert torch.equal(straight.build()(**batch).logits, logits[0])


@pytest.mark.parametrize("method", ["full", "lora", "smt", "pissa", "lisa"])
def test_a_model_given_goes_back_to_a_checkpoint(method, tmp_path):
    """The checkpoint replaces all that was trained since, or is refused."""
    task, batch = (
        CausalLM(tiny_llm("llama"), updates=strategies(method), lr=1e-2),
        {"input_ids": torch.arange(3, 9)[None]},
    )
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(3, callbacks=[checkpoint], enable_checkpointing=True).fit(task, datamodule=data())
    if method == "lisa":
        names = set(task.trained)
        for _ in range(2):  # also once it is detached, when what was trained is in the base's own weights
            with pytest.raises(BadInput, match="make a new module of the model loaded anew"):
                trainer(3).validate(task, datamodule=data(), ckpt_path=tmp_path / "step=1.ckpt", verbose=False)
            assert task.trained == names
            task.detach()
        return
    with torch.no_grad(), evaluating(task.build()):
        wanted = task.build()(**batch).logits
    before = {name: value.clone() for name, value in task.build().state_dict().items()}
    trainer(3).validate(task, datamodule=data(), ckpt_path=tmp_path / "step=1.ckpt", verbose=False)
    assert not all(torch.equal(value, before[name]) for name, value in task.build().state_dict().items())
    trainer(3).validate(task, datamodule=data(), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    with torch.no_grad(), evaluating(task.build()):
        assert torch.equal(task.build()(**batch).logits, wanted)
    assert all(torch.equal(value, before[name]) for name, value in task.build().state_dict().items())
