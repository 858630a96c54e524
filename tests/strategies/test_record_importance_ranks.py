"""Two processes record what one does."""

from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig

from lit_sparse.optim import trainable
from lit_sparse.strategies import PEFT, RecordFisher, RecordImportance, compose
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import tiny_llm
from tests.pair import run_pair


def mean_loss(model, seeds):
    losses = []
    for seed in seeds:
        ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(seed))
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))
    return torch.stack(losses).mean()


def sums_of(adapter: bool, seeds, ranks: int = 1):
    """Return the record of two steps on the mean loss of the batches `seeds`; gradients are averaged over `ranks`."""
    lora = PEFT(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    model, recorder = tiny_llm(), RecordImportance()
    torch.manual_seed(1)
    updates = compose([*([lora] if adapter else []), recorder])
    for update in updates:
        update.attach(model, no_probe, ALONE)
    optimizer = torch.optim.SGD([parameter for _, parameter in trainable(model)], lr=0.1)
    for step in (1, 2):
        optimizer.zero_grad()
        mean_loss(model, seeds).backward()
        for _, parameter in trainable(model) if ranks > 1 else []:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
        for update in updates:
            update.before_step(step, optimizer)
        optimizer.step()
        for update in updates:
            update.after_step(step, optimizer)
    return {name: one["sums"] for name, one in recorder.state_dict()["importance"]["matrices"].items()}


def fisher_of(seeds):
    """Return the Fisher of a sample of each of `seeds`."""
    model, recorder = tiny_llm(), RecordFisher(samples=len(seeds), targets=["q", "v"])

    def losses(steps, weighed):
        for seed in seeds[:steps]:
            ids = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(seed))
            yield torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])

    recorder.attach(model, losses, ALONE)
    return {name: one["sums"] for name, one in recorder.state_dict()["importance"]["matrices"].items()}


def record(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    sums = [sums_of(adapter, [rank], ranks=2) for adapter in (True, False)]
    torch.save([*sums, fisher_of([2 * rank, 2 * rank + 1])], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_record_what_one_does(tmp_path):
    run_pair(record, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case, adapter in enumerate((True, False)):
        one, alone = sums_of(adapter, [0, 1]), sums_of(adapter, [0])
        assert len(one) == (6 if adapter else 30)
        for name, sums in one.items():
            assert torch.equal(first[case][name], second[case][name]), name
            # Sums of products of fp32 gradients and movements, each added up in another order.
            torch.testing.assert_close(first[case][name], sums, rtol=1e-3, atol=1e-5 * float(sums.abs().max()))
            assert not torch.allclose(alone[name], sums, rtol=0.1, atol=0), "the other rank's data must matter"
    one = fisher_of([0, 1, 2, 3])
    assert len(one) == 6
    for name, sums in one.items():
        assert torch.equal(first[2][name], second[2][name]), name
        torch.testing.assert_close(first[2][name], sums, rtol=1e-5, atol=1e-6 * float(sums.max()))
