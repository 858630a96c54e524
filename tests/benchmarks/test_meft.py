"""MEFT beside checkpointing: the rival computes what plain adapters do; targets, table and command."""

import copy
import json
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_methods, meft, step_tables
from benchmarks.adapters import PlainAdapters
from benchmarks.trials import read_table
from lit_sparse.optim import trainable
from lit_sparse.strategies import Updates
from lit_sparse.testing import next_token_cross_entropy, tiny_llm

ABOUT = {"commit": "abc", "date": "2026-11-22", "device": "a CPU", "versions": {"torch": "2.13.0"}}
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def curve(name: str, first: int, last: int) -> dict[str, Any]:
    return {**ABOUT, "curve": name, "depths": [4, 32], "bytes": [first, last], "tokens": 1}


LINES = [
    curve("full fine-tuning", 10_000, 80_000),
    curve("frozen layers, adapters", 8_000, 36_000),
    curve("MEFT 1, exact", 1_000, 1_280),
    {**ABOUT, "mode": "meft", "trainable": 5, "trainable_share": 0.5, "peak_rss": 2**30, "saved_bytes": 2**20},
    {**ABOUT, "pair": ["meft", "adapters_every_1"], "ratio_median": 1.5, "ratio_low": 1.4, "ratio_high": 1.6},
]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_recomputing_layers_changes_neither_loss_nor_gradients(kind: str) -> None:
    found = []
    for every in (0, 1, 2):
        model = copy.deepcopy(tiny_llm(kind)).train()
        torch.manual_seed(0)
        Updates([PlainAdapters(every=every)]).attach(model)
        for _, parameter in trainable(model):
            torch.nn.init.normal_(parameter, std=0.1)
        loss = next_token_cross_entropy(model(input_ids=IDS).logits, IDS)
        loss.backward()
        found.append((loss, {name: parameter.grad for name, parameter in trainable(model)}))
    (loss, gradients), *others = found
    assert all(gradient is not None for gradient in gradients.values())
    for other, theirs in others:
        assert torch.equal(loss, other)
        assert all(torch.equal(gradients[name], theirs[name]) for name in gradients)


def test_the_curve_is_judged() -> None:
    met = list(meft.verdicts(LINES))
    assert met == [
        "met    MEFT 1, exact: a further layer keeps 1.00% of a frozen one's bytes, at most 5%",
        "met    MEFT 1, exact: 32 layers keep 1.60% of full fine-tuning's bytes, at most 16%",
    ]
    worse = [*LINES[:2], curve("MEFT 1, exact", 1_000, 15_000)]
    assert [said[:6] for said in meft.verdicts(worse)] == ["missed", "missed"]


def test_a_small_curve_is_counted_and_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(meft, "DEPTHS", (4, 8))
    monkeypatch.setattr(meft, "TOKENS", 8)
    monkeypatch.setattr(meft, "SIZES", {**meft.SIZES, "hidden_size": 64, "intermediate_size": 256})
    monkeypatch.chdir(tmp_path)
    assert meft.main(["curve", "--results", str(tmp_path / "meft.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "meft.jsonl").read_text().splitlines()]
    assert [line["curve"] for line in lines] == list(meft.ARMS)
    assert all(line["bytes"][0] < line["bytes"][1] for line in lines)


def test_tables_of_the_page(tmp_path) -> None:
    assert step_tables.meft(tmp_path) == "Not measured yet: `python -m benchmarks.meft` measures these tables."
    (tmp_path / "meft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    text = step_tables.meft(tmp_path)
    assert "| MEFT 1, exact | 1 | 1 | 10 |" in text
    assert "| meft | 5 (50.00%) | 1.500 [1.400, 1.600] | 1.00 | 1.0 |" in text


def test_all_that_is_timed_and_compared_is_there() -> None:
    assert all((meft.HERE / f"{name}.yaml").is_file() for name in (meft.RIVAL, *meft.TIMED))
    made = read_table("meft")
    assert [arm.name for arm in made.arms] == ["meft", "meft_3", "meft_segments", "plain", "lora"]


def test_lengths_are_a_stage_on_a_gpu(tmp_path) -> None:
    (step,) = gpu.plan(["meft"], tmp_path, tmp_path, dry=True)
    assert step.commands["meft"][:3] == ["-m", "benchmarks.gpu_methods", "lengths"]
    words = gpu_methods.commands(tmp_path, ["--x=1"], [16, 32])["lengths"]
    assert [[word for word in one if "max_length" in word] for one in words] == [
        ["--data.max_length=16"],
        ["--data.max_length=32"],
    ]
    assert all({"meft.yaml", *gpu_methods.LONG, "--x=1"} < set(one) for one in words)
