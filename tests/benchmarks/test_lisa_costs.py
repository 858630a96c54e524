"""LISA's study: the norms of layers, the target, tables and figures."""

import json

import pytest
import torch

from benchmarks import lisa_costs as study
from benchmarks.lisa_costs import moved, verdict
from benchmarks.plots import lisa_norms, lisa_state
from benchmarks.step_tables import lisa
from lit_sparse.testing import tiny_llm

ABOUT = {"commit": "abc", "date": "2026-11-22", "device": "a CPU", "versions": {"torch": "2.13.0"}}
MODE = {"trainable": 5, "trainable_share": 0.5, "peak_rss": 2**30, "saved_bytes": 2**20}


def policy(name, growth):
    states = [[2 * n + 1, 2**20, n * growth] for n in range(21)]
    return {**ABOUT, "policy": name, "trainable": 5, "states": states, "full_state": 2**24, "peak_rss": 2**30}


def arm(name, changes):
    layers = [{"layer": layer, "norm": 2.0, "change": change} for layer, change in changes.items()]
    return {**ABOUT, "norms": name, "lr": 1e-3, "steps": 2, "after": {}, "layers": layers}


LINES = [
    {**ABOUT, "mode": "full", **MODE},
    {**ABOUT, "mode": "frozen", **MODE},
    {**ABOUT, "pair": ["frozen", "full"], "ratio_median": 0.5, "ratio_low": 0.4, "ratio_high": 0.6},
    policy("reset", 0),
    policy("keep", 2**20),
    arm("full", {"model.embed_tokens.weight": 0.1, "0": 0.2, "1": 0.3, "model.norm.weight": 0.1}),
    arm("lora", {"model.embed_tokens.weight": 0.0, "0": 0.2, "1": 0.3, "model.norm.weight": 0.0}),
]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_norms_and_changes_of_each_layer(kind):
    base, model = tiny_llm(kind), tiny_llm(kind)
    with torch.no_grad():
        weight = model.get_submodule("model.layers.1.mlp.up_proj").weight
        weight[0, 0] += 3.0
    found = {at["layer"]: at for at in moved(base, model)}
    assert list(found)[:5] == ["model.embed_tokens.weight", "0", "1", "2", "model.norm.weight"]
    assert {name: at["change"] for name, at in found.items() if at["change"]} == {"1": pytest.approx(3.0)}
    everything = torch.cat([parameter.detach().flatten() for parameter in base.parameters()]).norm()
    assert sum(at["norm"] ** 2 for at in found.values()) == pytest.approx(float(everything) ** 2, rel=1e-5)


def test_the_promised_step_time_is_judged():
    assert verdict(LINES).startswith("met    frozen: step time 0.500")
    assert verdict([{"pair": ["frozen", "full"], "ratio_median": 0.8}]).startswith("missed")
    assert verdict(LINES[:2]) is None


@pytest.mark.parametrize(("asked", "done"), [([], ["time", "state", "norms"]), (["norms"], ["norms"])])
def test_what_is_asked_for_is_measured_and_kept(tmp_path, monkeypatch, asked, done):
    for part in study.PARTS:
        monkeypatch.setattr(study, part, lambda *_, part=part: iter([{"part": part}]))
    monkeypatch.chdir(tmp_path)
    assert study.main([*asked, "--results", str(tmp_path / "lisa.jsonl")]) == 0
    assert [json.loads(line)["part"] for line in (tmp_path / "lisa.jsonl").read_text().splitlines()] == done


def test_tables_of_the_readme(tmp_path):
    (tmp_path / "lisa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    text = lisa(tmp_path)
    assert "| frozen | 5 (50.00%) | 0.500 [0.400, 0.600] | 1.00 | 1.0 |" in text
    assert "| reset | 1.0 | 1.0 | 1.0 | 16.0 | 1.00 |" in text
    assert "| keep | 1.0 | 11.0 | 21.0 | 16.0 | 1.00 |" in text


def test_figures_show_every_policy_and_method(tmp_path):
    axes = lisa_state(LINES).axes[0]
    assert [line.get_label() for line in axes.lines] == ["reset", "keep", "full fine-tuning"]
    assert list(axes.lines[1].get_ydata())[-1] == 21.0
    _, changes = lisa_norms(LINES).axes
    assert [line.get_label() for line in changes.lines] == ["full fine-tuning", "LoRA, all linear layers"]
    assert list(changes.lines[0].get_ydata()) == [0.05, 0.1, 0.15, 0.05]
