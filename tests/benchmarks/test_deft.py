"""The study of the penalty on activations: its tables, and the runs, target and table of its cost."""

import json
from pathlib import Path

import pytest

from benchmarks import deft, readme, trials
from benchmarks.trials import read_table, read_yaml
from lit_sparse.commands.bench import OWN, existing, parser, take
from lit_sparse.strategies import ActivationDensity

ABOUT = {"commit": "abc", "date": "2026-11-22", "device": "a CPU", "versions": {"torch": "2.13.0"}}
PAIR = {"pair": ["lora_deft", "lora"], "ratio_low": 1.02, "ratio_high": 1.09}


def mode(name, saved):
    return {**ABOUT, "mode": name, "trainable": 5, "trainable_share": 0.5, "saved_bytes": saved * 2**20}


@pytest.mark.parametrize("name", ["deft", "deft_minilm", "deft_relu"])
def test_penalised_arms_differ_in_the_penalty_alone(name):
    made = read_table(name)
    plain, *penalised = made.arms
    assert plain.name == made.against == "lora"
    assert len({arm.rates for arm in made.arms}) == 1
    for arm in penalised:
        *others, penalty = arm.model["updates"]
        assert (others, penalty["class_path"]) == (plain.model["updates"], "ActivationDensity")
        assert ActivationDensity(**penalty["init_args"]).weight > 0


@pytest.mark.parametrize(("ours", "original"), [("density", "demo"), ("density_classify", "classify")])
def test_trials_that_count_activations_are_those_that_do_not_but_shorter(ours, original):
    workloads = [read_yaml(trials.TABLES / "workloads" / f"{file}.yaml") for file in (ours, original)]
    assert workloads[0].pop("trainer")["callbacks"] == ["lit_sparse.callbacks.DensityMonitor"]
    assert workloads[1].pop("trainer").keys() == {"max_steps"}
    rows = [workload["data"]["init_args"].pop("heldout") for workload in workloads]
    assert rows[0] >= rows[1]
    assert workloads[0] == workloads[1]


def test_the_model_with_relu_is_trained_twice_as_long():
    gelu, relu = (read_table(name).workload for name in ("deft_minilm", "deft_relu"))
    assert relu["trainer"]["max_steps"] == 2 * gelu["trainer"]["max_steps"]
    assert relu["model"]["warmup_steps"] == 2 * gelu["model"]["warmup_steps"]
    assert relu["model"]["base"] == "runs/bases/minilm-hidden_act_relu"
    assert relu["data"] == gelu["data"]


def test_the_two_differ_in_the_penalty_alone():
    plain, penalised = (read_yaml(Path(path))["model"]["updates+"] for path in (deft.WITHOUT, deft.WITH))
    assert penalised[:-1] == plain
    assert penalised[-1]["class_path"] == "ActivationDensity"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_its_benches_are_of_files_that_are_there(kind):
    for words in deft.commands(Path("runs"), 3, kind):
        asked = parser().parse_intermixed_args(take(words, OWN)[0])
        files = [*asked.yamls, *asked.config, *([] if asked.against is None else [asked.against])]
        assert all(existing(file).is_absolute() for file in files)
        assert asked.steps == 3


@pytest.mark.parametrize(
    ("ratio", "kind", "met"), [(1.1, "cpu", True), (1.101, "cpu", False), (1.03, "cuda", True), (1.04, "cuda", False)]
)
def test_the_promised_step_time_is_judged(ratio, kind, met):
    said = deft.verdict([mode("lora", 1), {**ABOUT, **PAIR, "ratio_median": ratio}], kind)
    assert said.startswith("met" if met else "missed")
    assert f"{ratio:.3f} of LoRA's alone" in said


def test_the_table_of_the_readme(tmp_path):
    assert readme.BLOCKS["deft"](tmp_path).startswith("Not measured yet: `python -m benchmarks.deft`")
    found = [mode("lora", 10), mode("lora_deft", 12), {**ABOUT, **PAIR, "ratio_median": 1.05}]
    (tmp_path / "deft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    text = readme.BLOCKS["deft"](tmp_path)
    assert "| lora | 5 (50.00%) | 1 | 10.0 |" in text
    assert "| lora_deft | 5 (50.00%) | 1.050 [1.020, 1.090] | 12.0 |" in text
