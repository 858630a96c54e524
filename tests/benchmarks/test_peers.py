"""The comparison with peers: its floor, its lines made of records, and its targets."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import gpu, gpu_methods, kernel_tables, kernels, peers, provenance, step_tables, turns
from benchmarks.floor import Floor
from lit_sparse.modules import CausalLM
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.ceilings import Ceilings
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Allocator, Device, Driver, Held, Ledger, Memory, ModelSize, Phase
from lit_sparse_profiling.speed_sections import Kernels, Pair, Throughput

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "python": "3.11"}
PEERS = peers.PEERS


def record(name: str, **fields: Any) -> RunRecord:
    known: dict[str, Any] = {
        "versions": VERSIONS,
        "device": Device("cpu", "x86_64", cores=2),
        "model": ModelSize("demo", 1000, 10),
        "phases": [Phase("selection", 1.5, 1, peak_rss=2**30), Phase("training", 9.0, 1, peak_rss=2**31)],
        "memory": Memory(2**31, "VmHWM", saved_for_backward=5 * 2**20),
        "throughput": Throughput(100, 100, 2.0, 2, median_step=1.0, flops=10**9),
    }
    return RunRecord(name=name, **{**known, **fields})


def write_runs(into: Path, **changed: Any) -> None:
    """Write one run of each peer, as the benches do."""
    pair = Pair("floor", 1.02, 0.98, 1.04, 1.2, 12)
    for folder, names, of in (
        ("alone", [peers.FLOOR], None),
        ("floor", PEERS[1:], pair),
        ("lora_all", [peers.SMT_1, peers.SMT_5], Pair("lora_all", 0.9, 0.88, 0.92, 0.99, 12)),
    ):
        for name in names:
            run = into / folder / f"{name}-1"
            run.mkdir(parents=True)
            record(f"{name}-1", **{"pair": of, **changed}).write(run / "record.json")


def judged(*lines: dict[str, Any]) -> list[bool]:
    return [met for _, met in peers.verdicts(lines)]


def mode(name: str, **figures: Any) -> dict[str, Any]:
    return {"mode": name, "trainable": 10, "peak_rss": 2**30, **figures}


def pair(first: str, second: str, high: float, highest: float) -> dict[str, Any]:
    return {"pair": [first, second], "ratio_high": high, "ratio_max": highest, "rounds": 5}


# ---- the floor


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_the_floor_has_a_backward_and_moves_nothing(kind: str) -> None:
    task = CausalLM(base=tiny_llm(kind))  # pyright: ignore[reportArgumentType]
    model = task.build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    floor = Floor()
    floor.attach(model, no_probe, ALONE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0)
    ids = torch.randint(96, (2, 12))
    loss = task.loss({"input_ids": ids, "labels": ids})[0]
    assert loss.requires_grad
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.step()
    floor.detach(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- lines and promises


def test_every_peer_has_a_yaml_that_names_what_it_is() -> None:
    for words in peers.commands(Path("x"), 3, []):
        for word in words:
            path = Path(word.removeprefix("--config=").removeprefix("--against="))
            if path.suffix == ".yaml" and path.name != "full.yaml":
                assert isinstance(yaml.safe_load(path.read_text())["model"], dict), path


def test_lines_are_what_the_readme_reads(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs")
    found = peers.lines(tmp_path / "runs")
    assert sum("mode" in line for line in found) == len(PEERS)
    assert [line["pair"] for line in found if "pair" in line][-2:] == [["smt_0.84", "lora_all"], ["smt_5", "lora_all"]]
    assert found[0]["trainable"] == 0  # the floor's stand-in is no trained weight
    (tmp_path / "peers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    table = step_tables.peers(tmp_path)
    assert "| floor | 0 (0.00%) | 1 | 2.00 | - | 5.0 |" in table
    assert "| smt_5 | 10 (1.00%) | 1.020 [0.980, 1.040] | 2.00 | 1.00 | 5.0 |" in table


def test_a_peer_without_a_result_is_named(tmp_path: Path) -> None:
    write_runs(tmp_path)
    file = tmp_path / "floor" / "full-1" / "record.json"
    record("full-1", status="oom", reason="out of memory").write(file)
    with pytest.raises(RuntimeError, match=r"full has no result: .*out of memory"):
        peers.lines(tmp_path)


def test_promises_are_kept_up_to_their_limit_only() -> None:
    assert judged(pair(peers.SMT_1, peers.FLOOR, high=1.05, highest=2)) == [True]
    assert judged(pair(peers.SMT_1, peers.FLOOR, high=1.051, highest=1)) == [False]
    assert judged(pair(peers.SMT_5, peers.FLOOR, high=1.1, highest=2)) == [True]
    assert judged(pair(peers.SMT_5, peers.LORA_ALL, high=0.5, highest=1.0)) == [False]


def test_memory_is_compared_at_equal_counts_only() -> None:
    theirs = mode(peers.LORA_QKV)
    assert judged(mode(peers.SMT_LORA, peak_rss=2**30 - 1), theirs) == [True]
    assert judged(mode(peers.SMT_LORA), theirs) == [False]
    assert judged(mode(peers.SMT_LORA, peak_rss=1, trainable=9), theirs) == [False]


def test_the_whole_comparison_appends_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write_runs(tmp_path / "runs")
    asked: list[list[str]] = []
    monkeypatch.setattr(turns, "bench", lambda words: asked.append(words) or 0)
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results" / "peers.jsonl"
    words = ["--into", str(tmp_path / "runs"), "--results", str(results), "--rounds", "7", "--trainer.devices=1"]
    assert peers.main(words) == 0
    assert peers.main(words) == 0
    assert len(asked) == 6
    assert all("--steps=7" in one and "--trainer.devices=1" in one for one in asked)
    assert len(results.read_text().splitlines()) == 2 * (len(PEERS) + len(PEERS) - 1 + 2)
    assert "met    smt_0.84: upper end of step time / floor 1.040" in capsys.readouterr().out


def test_a_bench_that_failed_writes_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "bench", lambda words: 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        peers.main(["--results", str(tmp_path / "peers.jsonl")])
    assert not (tmp_path / "peers.jsonl").exists()


# ---- on a GPU


SHAPE = {"data": {"init_args": {"batch_size": 4, "max_length": 1024}}}


def test_a_line_of_a_gpu_is_what_the_readme_reads(tmp_path: Path) -> None:
    held = Held(Ledger(trainable=2**28, frozen=2**31), batch=0, saved=2**30, temporaries=2**28, phase="backward")
    run = record(
        "smt-1",
        device=Device("cuda", "a GPU", memory=2**36),
        model=ModelSize("benchmarks/gpu/llama-3.2-1b.json", 1000, 10),
        phases=[Phase("training", 9.0, 1, peak_reserved=2**33)],
        memory=Memory(2**31, "VmHWM", 2**30, held, Allocator("CUDA", held.total + 2**26, 0)),
        driver=Driver("a GPU", "GPU-1", "570", False, "v2", "own pid", 2**34, 2**34, 2**29, 0, 9, joules=500.0),
        kernels=Kernels(2, 1.0, 0.1, "bfloat16", 10**10, 10**9, 0, []),
        settings=SHAPE,
    )
    (tmp_path / "gpu.jsonl").write_text(json.dumps(gpu_methods.line("smt", run)) + "\n")
    table = step_tables.gpu(tmp_path)
    assert "on a GPU, peft 0.21.2" in table
    assert "Shapes of `llama-3.2-1b (random weights), 4 x 1,024 tokens`" in table
    assert "| smt | measured | 10 (1.00%) | 50 | 1000.0 | 10.0% | 3.50 | 3.56 | 1.8% | 8.00 | 16.00 | 250.0 |" in table


def test_pairs_on_a_gpu_are_judged_and_shown(tmp_path: Path) -> None:
    run = record("smt-1", device=Device("cuda", "a GPU", memory=2**36), model=ModelSize("1b", 1000, 10))
    run = replace(run, settings=SHAPE)
    pair = provenance.provenance("gpu", run, gpu_methods.shape_of(run)) | turns.pair_line(
        "smt", Pair("floor", 1.02, 1.01, 1.05, 1.1, 20)
    )
    alone = [{"method": "smt", "requested": 30, "model": "1b"}, {"method": "full", "requested": 100, "model": "1b"}]
    large = {"method": "frozen", "requested": 1, "reserved": 24.1e9, "model": "8b"}
    floor, peak, lisa = gpu_methods.verdicts([pair, *alone, large])
    assert floor == ("smt: step time / floor 1.020, at most 1.03", True)
    assert peak == ("smt: peak of the steps 70.0% below full fine-tuning's, at least 67%", True)
    assert lisa == ("LISA, frozen embeddings, 8B: 24.1 GB reserved, at most 24", False)
    assert not next(gpu_methods.verdicts([{**pair, "ratio_median": 1.04}, *alone]))[1]
    (tmp_path / "gpu.jsonl").write_text(f"{json.dumps(gpu_methods.line('smt', run))}\n{json.dumps(pair)}\n")
    assert "| smt | floor | 1.020 [1.010, 1.050] |" in step_tables.gpu(tmp_path)


def test_a_gpu_is_benchmarked_with_yamls_that_are_there() -> None:
    commands = [command for several in gpu_methods.commands(Path("runs"), []).values() for command in several]
    words = [word for command in commands for word in command]
    files = [word.rpartition("=")[2] for word in words if word.endswith(".yaml")]
    others = gpu_methods.OTHERS.values()
    shipped = {path.name for path in (provenance.ROOT / "configs").glob("*.yaml")}
    assert all((provenance.ROOT / file).is_file() or file in shipped for file in [*files, *others])


def test_the_stages_of_a_gpu_host_are_commands_with_limits(tmp_path: Path) -> None:
    steps = list(gpu.plan(gpu.STAGES, tmp_path, tmp_path, dry=False))
    assert [step.name for step in steps] == list(gpu.STAGES)
    commands = [words for step in steps for words in step.commands.values()]
    files = [word for words in commands for word in words if word.startswith("tests/")]
    assert files
    assert all((provenance.ROOT / file).is_file() for file in files)
    modules = {words[1] for words in commands if words[0] == "-m"}
    assert modules == {
        "pytest",
        "benchmarks.weights",
        "benchmarks.kernels",
        "benchmarks.gpu_methods",
        "benchmarks.planner",
        "benchmarks.deft",
    }


def test_a_step_is_stopped_at_its_limit_and_not_repeated_once_done(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    late = gpu.Step("late", 1, {"quick": ["-c", "print('said')"], "slow": ["-c", "import time; time.sleep(600)"]})
    line = gpu.run(late, 3, tmp_path)
    assert line["codes"] == {"quick": 0, "slow": None}
    assert (tmp_path / "logs" / "quick.log").read_text() == "said\n"
    done = {"step": "env", "codes": {"env": 0}, "seconds": 1}
    (tmp_path / "steps.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(done)}\n")
    assert gpu.finished(tmp_path) == {"env"}


# ---- ops


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch, to itself
def test_an_op_is_timed_beside_others(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    works = list(kernels.packings("SmolLM2-135M", 16, cpu, torch.float32))
    assert [work.op for work in works] == ["pack_columns"] * 2
    contenders = {"ours": works[0].contenders["ours"], "twice": lambda: [works[0].contenders["ours"]() for _ in "12"]}
    work = kernels.Work("pack_columns", "tiny", contenders, bytes=2 * 16 * 3 * 64 * 4)
    line = provenance.of_device("kernels", cpu) | kernels.line_of(work, cpu, Ceilings(1e9, 1e9), 3)
    assert line["peak_bytes"] == pytest.approx({"ours": 16 * 3 * 64 * 4, "twice": 2 * 16 * 3 * 64 * 4}, abs=64)
    assert line["ratio"]["twice"][1] <= line["ratio"]["twice"][0] <= line["ratio"]["twice"][2]
    (tmp_path / "kernels.jsonl").write_text(json.dumps(line) + "\n")
    table = kernel_tables.kernels(tmp_path)
    assert "| pack_columns | tiny | twice |" in table
    assert "On a GPU: not measured yet" in table


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_penalised_activation_has_the_gradients_of_its_rival() -> None:
    for work in kernels.densities("SmolLM2-135M", 5, torch.device("cpu"), torch.float32):
        ours, theirs = work.contenders["ours"](), work.contenders["torch's operations"]()
        torch.testing.assert_close(ours, theirs)
        assert work.bytes == 8 * 5 * 1536 * 4


def test_what_is_promised_of_an_op_is_judged() -> None:
    line = {
        "op": "block_grad",
        "shape": "27",
        "blocks": 27,
        "of_matmul": 0.7,
        "ratio": {kernels.DIAGONAL: [1.06, 1, 2]},
    }
    rate, times = kernels.verdicts(line)
    assert rate == ("block_grad, 27: 70% of the matmul rate, at least 70%", True)
    assert times == ("block_grad, 27: 1.060 of as many diagonal blocks, at most 1.05", False)
    assert not list(kernels.verdicts({**line, "blocks": 26}))
    (copied,) = kernels.verdicts({"op": "master_adamw", "shape": "x", "of_copy": 0.84})
    assert copied == ("master_adamw, x: 84% of the copy rate, at least 85%", False)


def test_an_op_whose_tests_fail_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(kernels, "green", lambda op, device: False)
    assert kernels.main(["pack_columns", "--results", str(tmp_path / "k.jsonl")]) == 1
    assert "the tests of pack_columns fail here" in capsys.readouterr().err
    assert not (tmp_path / "k.jsonl").exists()
    assert kernels.main(["nothing"]) == 2


def test_without_a_gpu_the_readme_says_so(tmp_path: Path) -> None:
    assert step_tables.gpu(tmp_path).startswith("Not measured yet with the present timing.")


def test_a_change_that_is_not_committed_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        provenance.subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True
        )

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == "unknown"
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in provenance.MEASURED:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "a.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    assert not provenance.commit().endswith("+")
    (tmp_path / "benchmarks" / "results" / "peers.jsonl").write_text("{}")
    assert not provenance.commit().endswith("+")
    (tmp_path / "kernels" / "a.py").write_text("1")
    assert provenance.commit().endswith("+")


@pytest.mark.parametrize(
    "name",
    [
        "against_itself",
        "deft",
        "peers",
        "gpu",
        "gpu_methods",
        "host_time",
        "kernels",
        "lisa_costs",
        "overhead",
        "quality",
    ],
)
def test_it_runs_as_a_module(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)  # else runpy warns that it is there
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert ended.value.code == 0
    assert "--results" in capsys.readouterr().out
