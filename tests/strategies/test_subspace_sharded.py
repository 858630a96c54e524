"""GaLore, Fira and AdaLomo under FSDP2 on two processes give the results of one process on the same rows."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_sparse.modules import LitSparse
from lit_sparse.testing import tiny_llm
from tests.methods import module
from tests.modules.test_sharding import FSDP2Strategy, fit, moments, saved, saving, timedelta
from tests.pair import attempt, result, run_pair

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # resumed runs save otherwise
SETTINGS = {"lr": 1e-3, "warmup_steps": 0}
ATOLS = {"basis": 1e-4, "limiter": 1e-3, "row": 1e-8, "column": 1e-8}
"""Of state; a basis has entries of 0.1 and depends on gaps between singular values, a limiter is about 10."""
ATOL = 5e-6
"""Of weights and moments: a step is 1e-3, and a subspace about 1e-5 apart. AdaLomo divides a gradient by its own size,
and that of a key's bias is rounding alone, since no shift of the scores moves a softmax."""


def subspace(**fields: object) -> dict:
    return {"class_path": "SubspaceAdam", "init_args": {"refresh_every": 2, **fields}}


LISA = {"class_path": "LISA", "init_args": {"sampler": "cyclic", "active_layers": 1, "interval": 2}}
CASES: dict[str, tuple[str, list[dict], dict]] = {
    # base, updates, options of the fit
    "galore": ("llama", [subspace()], {}),
    "odd": ("qwen2", [subspace(rank=3, residual="fira", fused_backward=True)], {}),  # shards of unlike sizes, tied head
    "transposed": ("gpt2", [subspace(residual="fira")], {"gradient_clip_val": 0.05}),
    "svd": ("llama", [subspace(basis="svd", head=True)], {"accumulate_grad_batches": 2}),
    "groups": ("llama", [subspace(residual="fira"), LISA], {"replicas": 2}),
    "adalomo": ("llama", [{"class_path": "AdaLomo"}], {}),
    "adalomo transposed": ("gpt2", [{"class_path": "AdaLomo"}, LISA], {}),
    "adalomo clipped": ("qwen2", [{"class_path": "AdaLomo", "init_args": {"fused_backward": False}}], {}),
}
RESUMED = {"fira": [subspace(residual="fira")], "adalomo": [{"class_path": "AdaLomo"}]}
"""Saved after the third of six steps, between two refreshes."""


def made(folder: Path, base: str, updates: list[dict], **options: object) -> LitSparse:
    return module("full", folder / base, **{**SETTINGS, "updates": updates, **options})


def trained(folder: Path, name: str, sharded: bool):
    base, updates, options = CASES[name]
    options = dict(options)
    if replicas := options.pop("replicas", None):
        options |= {"strategy": FSDP2Strategy(replicas=replicas, timeout=timedelta(seconds=60))} if sharded else {}
    return fit(made(folder, base, updates), sharded, 4, **options)


def act(folder: Path, rank: int) -> None:
    def write(name: str) -> dict[str, list]:
        trainer = trained(folder, name, True)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        return sizes(trainer)

    def resume(name: str) -> None:
        for number, (steps, start) in enumerate(((6, None), (6, folder / name / "step=3.ckpt"))):
            options = {} if number else saving(folder / name)
            trainer = fit(made(folder, "llama", RESUMED[name]), True, steps, start, seed=number, **options)
            trainer.save_checkpoint(folder / f"{name} {'again' if number else 'straight'}.ckpt")
        one = folder / f"{name} one" / "step=3.ckpt"
        fit(made(folder, "llama", RESUMED[name]), True, 6, one).save_checkpoint(folder / f"{name} from one.ckpt")

    for name in CASES:
        attempt(folder, rank, name, lambda name=name: write(name))
    for name in RESUMED:
        attempt(folder, rank, f"{name} resumed", lambda name=name: resume(name))
    attempt(folder, rank, "refused", lambda: refused(folder))


def sizes(trainer) -> dict[str, list]:
    """Return the shapes of a matrix's state that this rank has, by parameter and name."""
    (optimizer,) = trainer.optimizers
    names = {p: name for name, p in trainer.lightning_module.named_parameters()}
    found: dict[str, list] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            found[f"{names[parameter]} {key}"] = list(local.shape)
    return found


def refused(folder: Path) -> list[str]:
    updates = [[{"class_path": "AdaLomo", "init_args": {"two_pass_clip": 1.0}}]]
    blocks = {"class_path": "SMT", "init_args": {"trainable_fraction": 0.05, "block_size": 8, "targets": ["all"]}}
    updates.append([{"class_path": "AdaLomo"}, blocks])
    said = []
    for one in updates:
        try:
            fit(made(folder, "llama", one), True, 1)
        except ValueError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for kind in ("llama", "qwen2", "gpt2"):
        tiny_llm(kind).save_pretrained(folder / kind)
    for name, updates in RESUMED.items():
        trainer = fit(made(folder, "llama", updates), False, 6, **saving(folder / f"{name} one"))
        trainer.save_checkpoint(folder / f"{name} one straight.ckpt")
    run_pair(act, folder)
    return folder


def assert_alike(got: dict, wanted: dict, exact: bool = False) -> None:
    close = lambda key: 0.0 if exact else ATOLS.get(key, ATOL)  # noqa: E731
    assert got["state_dict"].keys() == wanted["state_dict"].keys()
    for name, value in wanted["state_dict"].items():
        torch.testing.assert_close(got["state_dict"][name], value, rtol=0, atol=close("weight"), msg=name)
    ours, theirs = moments(got), moments(wanted)
    assert ours.keys() == theirs.keys()
    for name, state in theirs.items():
        assert ours[name].keys() == state.keys()
        for key, value in state.items():
            assert isinstance(value, Tensor)
            torch.testing.assert_close(
                ours[name][key], value, rtol=0, atol=close(key), msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(name, pair):
    result(pair, name)
    trained(pair, name, False).save_checkpoint(pair / f"{name} one.ckpt")
    assert_alike(saved(pair / f"{name}.ckpt"), saved(pair / f"{name} one.ckpt"))


def test_each_rank_has_its_rows_of_the_state(pair):
    """Of moments (long, r) and basis (short, r), whichever side is sharded with the weight's rows."""
    for rank in range(2):
        shapes = result(pair, "galore", rank)
        for layer in ("up", "down"):  # (64, 32) and (32, 64), ranks of 8
            name = f"model.model.layers.0.mlp.{layer}_proj.weight"
            assert shapes[f"{name} exp_avg"] == [32, 8]
            assert shapes[f"{name} basis"] == [16, 8]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_exactly_and_on_another_number_of_processes(name, pair):
    result(pair, f"{name} resumed")
    straight = saved(pair / f"{name} straight.ckpt")
    assert_alike(saved(pair / f"{name} again.ckpt"), straight, exact=True)
    assert_alike(saved(pair / f"{name} from one.ckpt"), saved(pair / f"{name} one straight.ckpt"))
    trainer = fit(made(pair, "llama", RESUMED[name]), False, 6, pair / name / "step=3.ckpt", seed=1)
    trainer.save_checkpoint(pair / f"{name} on one.ckpt")
    assert_alike(saved(pair / f"{name} on one.ckpt"), straight)


def test_what_shards_cannot_have_is_refused_on_both_ranks(pair):
    first, second = (result(pair, "refused", rank) for rank in range(2))
    assert first == second
    clip, blocks = first
    assert clip.startswith(
        "BadInput: trainer.strategy is fsdp2, but AdaLomo with these settings cannot train a sharded"
    )
    assert "FSDP2 frees a layer's gathered weights in the first backward pass" in clip
    assert blocks.startswith("BadInput: fused_backward is true, but ")
    assert "trained parameters are whole on each of 2 ranks" in blocks
