"""Quality tables: which trials run, in which order, which results are used again, and the tables made of them."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import measurements, power, quality, ranking, readme, trials, workload_size
from benchmarks.provenance import ROOT
from benchmarks.ranking import Results
from benchmarks.trials import Table, read_table
from lit_sparse.errors import BadInput
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Device, ModelSize

STACK = {"device": "cpu", "torch": "2.13.0"}
WORKLOAD = {
    "model": {"base": "demo"},
    "data": {"class_path": "lit_sparse.data.Synthetic", "init_args": {"batch_size": 2}},
    "trainer": {"max_steps": 5},
}
RANDOM = [{"class_path": "SMT", "init_args": {"blocks": "random"}}]
LORA = [{"class_path": "PEFT", "init_args": {"config": {"class_path": "peft.LoraConfig", "init_args": {"r": 2}}}}]
ARMS = {
    "random": {"updates": RANDOM, "lr": ["1e-3", "2e-3", "4e-3"], "group": "1 %"},
    "lora": {"updates": LORA, "lr": [5e-4], "group": "1 %"},
    "full": {"updates": [], "lr": [1e-5, 2e-5]},
}
Write = Callable[..., str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, from which subprocesses import the code under test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "profiling")))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name, **changes)`: a table's file, with its workload beside it."""

    def write(name: str = "mine", **changes: Any) -> str:
        (tmp_path / "workload.yaml").write_text(yaml.safe_dump(WORKLOAD))
        document = {"title": "Mine.", "workload": "workload.yaml", "arms": ARMS, **changes}
        path = tmp_path / f"{name}.yaml"
        kept = {key: value for key, value in document.items() if value is not None}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))
        return str(path)

    return write


class Fake(quality.Runner):
    """A runner with instant trainings: the loss is that of `losses`, a little higher with every seed.

    LoRA likes some seeds more than the other arms do.
    """

    losses = {1e-3: 2.0, 2e-3: 1.5, 4e-3: 1.8, 5e-4: 1.505, 1e-5: 1.0, 2e-5: float("nan")}
    trainable = {"random": 1000, "lora": 1020, "full": 100_000}
    wobble = {"lora": (0.0, -0.02, 0.02)}
    fail: tuple[str, ...] = ()

    def __init__(self, made: Table, path: Path) -> None:
        super().__init__(made, Results(path, STACK), Path("runs"), lambda text: None)
        self.did: list[str] = []

    def _fit(self, trial: trials.Trial) -> Path:
        self.did.append(f"{trial.arm.name} {trial.rate:g} {trial.seed}")
        if trial.arm.name in self.fail:
            raise RuntimeError("refused: no such thing.")
        folder = self.root / f"{self._name(trial)}-1"
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").write_text("weights")
        loss = self.losses[trial.rate] + 0.01 * trial.seed + self.wobble.get(trial.arm.name, (0.0,) * 3)[trial.seed % 3]
        RunRecord(
            name=folder.name,
            versions={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
            device=Device("cpu", "x86_64", cores=2),
            model=ModelSize("demo", 100_000, self.trainable[trial.arm.name]),
            outcome={"before": {"heldout_loss": 3.0}, "after": {"heldout_loss": loss, "text_loss": 4.0}},
        ).write(folder / "record.json")
        return folder


def run(name: str, path: Path = Path("q.jsonl"), minutes: float | None = None, **options: Any) -> Fake:
    runner = Fake(read_table(name, **options), path)
    runner.run(minutes)
    return runner


def cells(runner: Fake) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in ranking.cells(runner.made, runner.results)}


# ---- identity and reuse


def test_first_the_sweeps_then_seed_by_seed_at_the_best_rate(write: Write) -> None:
    assert run(write()).did == [
        *("random 0.001 0", "random 0.002 0", "random 0.004 0", "lora 0.0005 0", "full 1e-05 0", "full 2e-05 0"),
        *("random 0.002 1", "lora 0.0005 1", "full 1e-05 1"),
        *("random 0.002 2", "lora 0.0005 2", "full 1e-05 2"),
    ]


def test_nothing_is_trained_twice_whatever_table_asks_for_it(write: Write) -> None:
    run(write())
    assert run(write()).did == []
    other = write("other", title="Other.", arms={"sparse": ARMS["random"], "more": {"updates": LORA, "lr": [1e-3]}})
    runner = Fake(read_table(other), Path("q.jsonl"))
    runner.trainable = {"more": 1}
    runner.run()
    assert runner.did == ["more 0.001 0", "more 0.001 1", "more 0.001 2"]
    assert cells(runner)["sparse"][-2] == "3"


def test_processes_share_the_work(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing else can be done, a process waits for the work of others, and does not repeat it."""
    made = read_table(write(arms={"lora": ARMS["lora"]}))
    runner, other = (Fake(made, Path("q.jsonl")) for _ in range(2))
    trial = made.sweep(made.arms[0])[0]
    taken = quality.claim(other.claim_of(quality.Work(trial)))

    def finish(seconds: float) -> None:
        other.train(trial)
        taken.__exit__(None, None, None)

    monkeypatch.setattr(quality.time, "sleep", finish)
    assert taken.__enter__()
    runner.run()
    assert runner.did == ["lora 0.0005 1", "lora 0.0005 2"]
    assert other.did == ["lora 0.0005 0"]


def test_what_makes_another_result_is_another_trial(write: Write, tmp_path: Path) -> None:
    made = read_table(write())
    trial = made.trial(made.arms[0], 1e-3, 0)
    identity = trial.identity(STACK)
    assert read_table(write()).trial(made.arms[0], 1e-3, 0).identity(STACK) == identity
    assert trial.identity({**STACK, "device": "cuda"}) != identity
    longer = read_table(write(), steps=6)
    first, second = made.arms[:2]
    for other in (
        made.trial(first, 2e-3, 0),
        made.trial(first, 1e-3, 1),
        made.trial(second, 1e-3, 0),
        longer.trial(first, 1e-3, 0),
    ):
        assert other.identity(STACK) != identity


def test_local_data_count_by_their_contents(write: Write, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("one")
    data = {"class_path": "lit_sparse.data.Instructions", "init_args": {"train": str(rows)}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**WORKLOAD, "data": data}))
    made = read_table(write(), workload=tmp_path / "own.yaml")
    trial = made.trial(made.arms[0], 1e-3, 0)
    assert trial.config["data"]["init_args"] == {"train": str(rows), "seed": 0}
    before = trial.identity(STACK)
    rows.write_text("two")
    assert trial.identity(STACK) != before


def test_a_class_of_ours_that_moves_keeps_its_trials() -> None:
    def of(path: str) -> str:
        return trials.digest({"trainer": {"callbacks": [{"class_path": path}]}}, STACK)

    assert of("lit_sparse.callbacks.Forgetting") == of("lit_sparse.forgetting.Forgetting")
    assert of("lit_sparse.callbacks.Forgetting") != of("lit_sparse.callbacks.DensityMonitor")
    assert of("lit_sparse.optim.AdamW") != of("torch.optim.AdamW")


@pytest.mark.parametrize("name", ["quality", "forgetting"])
def test_what_was_measured_belongs_to_the_configuration_beside_it(name: str) -> None:
    lines = ranking.read_results(ROOT / "benchmarks" / "results" / f"{name}.jsonl")
    fits = [line for line in lines if line["kind"] == "fit"]
    assert fits
    assert [line["identity"] for line in fits] == [trials.digest(line["config"], line["stack"]) for line in fits]


def test_blocks_and_batches_follow_the_seed(write: Write) -> None:
    shira = {"class_path": "PEFT", "init_args": {"config": {"init_args": {"random_seed": "${seed}"}}}}
    arms = {"a": {"updates": [*RANDOM, shira], "lr": [1]}, "smt": {"method": "smt.yaml", "lr": [1]}}
    made = read_table(write(arms=arms))
    config = made.trial(made.arms[0], 1.0, 7).config
    assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 7
    first, second = config["model"]["updates"]
    assert first["init_args"] == {"blocks": "random", "seed": 7}
    assert second["init_args"]["config"]["init_args"]["random_seed"] == 7
    shipped = made.trial(made.arms[1], 1.0, 7).config["model"]
    assert shipped["updates"][0]["init_args"]["seed"] == 7
    assert shipped["lr"] == 1.0
    assert shipped["warmup_steps"] == 4


# ---- resuming


def test_a_killed_run_goes_on_where_it_was(write: Write) -> None:
    class Killed(Fake):
        def _fit(self, trial: trials.Trial) -> Path:
            if len(self.did) == 4:
                raise KeyboardInterrupt
            return super()._fit(trial)

    name = write()
    killed = Killed(read_table(name), Path("q.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = run(name)
    assert killed.did + resumed.did == run(name, Path("straight.jsonl")).did
    lines = [json.loads(line) for line in Path("q.jsonl").read_text().splitlines()]
    assert len({line["identity"] for line in lines}) == len(lines) == 12
    assert all(line.keys() >= {"commit", "date", "device", "versions", "seconds", "model", "steps"} for line in lines)


def test_time_that_is_up_leaves_the_rest(write: Write) -> None:
    runner = run(write(), minutes=0)
    assert runner.did == []
    assert quality.left(runner.made, runner.results) == (12, 0)
    assert quality.in_words((12, 1)) == "12 trainings and 1 test"
    assert cells(runner)["lora"][-1] == "not measured"


def test_what_fails_is_told_stays_undone_and_stops_nothing(write: Write) -> None:
    class Failing(Fake):
        fail = ("lora",)

    runner = Failing(read_table(write()), Path("q.jsonl"))
    runner.run()
    assert runner.failed == {"lora, lr 0.0005, seed 0": "refused: no such thing."}
    assert quality.left(runner.made, runner.results) == (3, 0)
    assert run(write()).did == ["lora 0.0005 0", "lora 0.0005 1", "lora 0.0005 2"]


def test_the_best_trials_answer_and_beaten_checkpoints_go(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        quality, "answers", lambda trial, test, folder: asked.append(trial.name) or {"choices_accuracy": 0.5}
    )
    name = write(test={"data": {"init_args": {"batch_size": 9}}}, arms={"random": ARMS["random"]})
    runner = Fake(read_table(name), Path("q.jsonl"))
    steps = quality.work(runner.made, runner.results)
    for _ in range(3):
        runner.train(next(steps).trial)
    assert [path.parts[1].partition("_")[0] for path in Path("runs").rglob("last.ckpt")] == ["random"]
    runner.run()
    assert asked == [f"random, lr 0.002, seed {seed}" for seed in (0, 1, 2)]
    assert not list(Path("runs").rglob("last.ckpt"))
    assert cells(runner)["random"][6] == "50.0% ± 0.0% of choices"
    assert quality.left(runner.made, runner.results) == (0, 0)
    changed = write(test={"trainer": {"limit_test_batches": 1}}, arms={"random": ARMS["random"]})
    again = run(changed)  # its checkpoints are gone: trained again to answer, but no second line of the training
    assert again.did == [f"random 0.002 {seed}" for seed in (0, 1, 2)]
    assert [json.loads(line)["kind"] for line in Path("q.jsonl").read_text().splitlines()].count("fit") == 5


def test_the_base_is_scored_once_a_seed(write: Write) -> None:
    runner = run(write())
    made = runner.made
    assert runner.results.before(made.trial(made.arms[1], 9.0, 1)) == {"heldout_loss": 3.0}
    assert runner.results.before(made.trial(made.arms[1], 9.0, 5)) is None


def test_a_base_is_scored_again_for_an_outcome_that_it_lacks(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(write())
    commands: list[list[str]] = []

    def execute(job: Any, root: Path) -> Path:
        commands.append(job.command)
        raise RuntimeError("enough.")

    monkeypatch.setattr(quality, "execute", execute)
    arms = {"other": {"updates": [{"class_path": "SMT", "init_args": {"num_blocks": 3}}], "lr": [1]}}
    for also in ([], ["density"]):
        made = read_table(write(arms=arms, also=also), seeds=[0])
        quality.Runner(made, Results(Path("q.jsonl"), STACK), Path("runs"), lambda text: None).run()
    assert [word.rpartition("=")[2] for words in commands for word in words if "sanity" in word] == ["0", "-1"]
    trial = first.made.sweep(first.made.arms[0])[0]
    first.results.append({**(first.results.fit(trial) or {}), "before": {"density": 0.9}})
    assert first.results.before(trial) == {"heldout_loss": 3.0, "density": 0.9}


# ---- the table


def test_means_spread_ties_and_ends_of_the_sweep(write: Write) -> None:
    shown = cells(run(write()))
    assert shown["untrained"] == ["", "0", "-", "3.0000 ± 0.0000", "-", "-", "-", "-", ""]
    row = ["1 %", "1,000 (1.00%)", "0.002", "1.5100 ± 0.0100", "4.0000 ± 0.0000", "-", "-", "3", "best"]
    assert shown["random"] == row
    assert shown["lora"][2:4] == ["0.0005 (not swept)", "1.5150 ± 0.0265"]
    assert shown["lora"][5] == "+0.0050 [-0.0447, +0.0547]"
    assert shown["lora"][-1] == "tie"
    assert shown["full"][0] == "reference"
    assert shown["full"][2] == "1e-05 (lowest tried)"
    assert shown["full"][-1] == ""  # of no group: it is not ranked


def test_unequal_counts_are_named(write: Write) -> None:
    class Larger(Fake):
        trainable = {**Fake.trainable, "lora": 1031}

    runner = Larger(read_table(write()), Path("q.jsonl"))
    runner.run()
    assert cells(runner)["lora"][-1] == "tie; unequal: +3.1% weights beside random"
    assert cells(runner)["random"][-1] == "best"


def test_fewer_seeds_are_marked(write: Write) -> None:
    shown = cells(run(write(), seeds=[0, 1]))
    assert shown["random"][-1] == "tie; incomplete: 2 of 3 seeds"
    runner = Fake(read_table(write()), Path("part.jsonl"))
    runner.train(next(quality.work(runner.made, runner.results)).trial)
    expected = "incomplete: not all learning rates were tried; incomplete: 1 of 3 seeds"
    assert cells(runner)["random"][-1] == expected


def test_a_loss_that_is_no_number_is_never_best(write: Write) -> None:
    class Diverged(Fake):
        losses = dict.fromkeys(Fake.losses, float("nan")) | {5e-4: 9.0}

    runner = Diverged(read_table(write()), Path("q.jsonl"))
    runner.run()
    assert cells(runner)["lora"][-1] == "best"
    assert cells(runner)["random"][3] == "inf ± nan"


# ---- what a table can tell


def test_arms_may_have_fewer_seeds(write: Write) -> None:
    arms = {"random": {**ARMS["random"], "lr": [2e-3]}, "lora": {**ARMS["lora"], "seeds": 3}}
    runner = run(write(arms=arms, seeds=[0, 1, 2, 3]))
    both = [f"{arm} {seed}" for seed in range(3) for arm in ("random 0.002", "lora 0.0005")]
    assert runner.did == [*both, "random 0.002 3"]
    assert quality.left(runner.made, runner.results) == (0, 0)
    shown = cells(runner)
    assert (shown["random"][-2:], shown["lora"][-2:]) == (["4", "best"], ["3", "tie"])
    assert shown["lora"][5] == "+0.0050 [-0.0447, +0.0547]"  # of the three seeds that both have
    assert "unlike numbers of seeds" in ranking.notes(runner.made, runner.results)
    asked = read_table(write(arms=arms), seeds=[0, 1, 2, 3])
    assert [asked.seeds_of(arm) for arm in asked.arms] == [(0, 1, 2, 3)] * 2


def test_a_sweep_goes_on_while_the_best_rate_is_at_an_end(write: Write) -> None:
    arms = {"random": {**ARMS["random"], "lr": [1e-3, 2e-3]}}
    runner = run(write(arms=arms, widen=2, seeds=[0, 1]))
    assert runner.did == ["random 0.001 0", "random 0.002 0", "random 0.004 0", "random 0.002 1"]
    assert cells(runner)["random"][2] == "0.002"
    assert len(ranking.belonging(runner.made, runner.results)) == 4
    assert cells(run(write(arms=arms, seeds=[0, 1])))["random"][2] == "0.002 (highest tried)"
    low = {"random": {**ARMS["random"], "lr": [2e-3, 4e-3]}}
    assert run(write(arms=low, widen=1), Path("low.jsonl")).did[2] == "random 0.001 0"


def test_costs_stand_beside_the_losses(write: Write) -> None:
    runner = run(write(costs=True))
    first, second = (runner.results.fit(trial) for trial in runner.made.sweep(runner.made.arms[0])[1:])
    for line in (first, second):
        assert line is not None
        line.update(peak_resident=3 * 2**29, step_seconds=2.0)
    columns = ranking.head(runner.made)
    assert columns[6:9] == ["peak resident, GiB", "step, s", "beside the best [95 %]"]
    shown = cells(runner)
    assert shown["random"][5:7] == ["1.50", "2.00"]
    assert shown["lora"][5:7] == shown["untrained"][5:7] == ["-", "-"]


def test_a_table_says_what_it_can_tell_and_what_it_lost(write: Write) -> None:
    runner = run(write())
    text = ranking.notes(runner.made, runner.results)
    # Of two arms, the pooled error is that of their paired t test: 0.0115 with two degrees of freedom.
    assert text.startswith(
        "**This table has lost its power:** at an end of the sweep (or the only one tried) is the best learning "
        "rate of lora, full; all arms tie. Smallest difference to the best arm of a group"
    )
    told = f"{(4.30265 + 1.06066) * 0.02 / 3**0.5:.4f}"
    assert f"in nats a token of the held-out loss: {told} in 1 %; pair by pair, over seeds alone" in text
    assert "over seeds alone: the losses of rows were not kept" in text
    unmeasured = Fake(read_table(write()), Path("none.jsonl"))
    assert "Smallest difference" not in ranking.notes(unmeasured.made, unmeasured.results)


@pytest.mark.parametrize(
    ("data", "trainer", "said"),
    [
        ({"heldout": 64, "max_length": 144}, {}, "at most 9,216 tokens of answers"),
        ({"heldout": 128, "max_length": 144}, {"limit_val_batches": 6}, "at most 3,456 tokens of answers"),
        ({"heldout": 128, "max_length": 144}, {"limit_val_batches": 0.5}, None),
        ({"heldout": 240, "max_length": 256}, {}, None),
        ({}, {}, None),
    ],
)
def test_too_few_scored_tokens_are_told(write: Write, data: Any, trainer: Any, said: str | None) -> None:
    made = read_table(write())
    made.workload["data"]["init_args"] = data
    made.workload["trainer"] |= trainer
    assert [*power.few(made, [])] == ([] if said is None else [f"{said} are scored (10,000 are needed)"])


def test_kept_rows_are_paired_and_counted(write: Write) -> None:
    runner = run(write())
    for arm in runner.made.arms[:2]:
        for seed in runner.made.seeds:
            line = runner.results.fit(runner.made.trial(arm, {"random": 2e-3, "lora": 5e-4}[arm.name], seed))
            assert line is not None
            loss = line["after"]["heldout_loss"]
            rows = {"of": "a", "tokens": [100, 300], "nll": [100 * loss + 1, 300 * loss - 1]}
            line["rows"] = {"heldout": rows, "text": rows}
    text = ranking.notes(runner.made, runner.results)
    assert "only 400 tokens of answers are scored (10,000 are needed)" in text
    assert "pair by pair, over seeds and scored rows" in text
    runner.results.fits.popitem()  # full's last, which no group has
    line = runner.results.fit(runner.made.trial(runner.made.arms[1], 5e-4, 2))
    assert line is not None
    del line["rows"]
    assert "over rows where both arms kept them (5 of 6 trainings did)" in ranking.notes(runner.made, runner.results)
    found = ranking.rows(runner.made, runner.results)
    runner.made.workload["data"]["class_path"] = "lit_sparse.data.Labelled"
    assert [*power.few(runner.made, found)] == ["only 400 labels are scored (10,000 are needed)"]


# ---- publishing


@pytest.fixture
def tables(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write()
    monkeypatch.setattr(trials, "TABLES", tmp_path)
    monkeypatch.setitem(readme.BLOCKS, "quality-mine", lambda results: readme.quality("mine", results))
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- begin:quality-mine -->\n<!-- end:quality-mine -->\n")
    return tmp_path / "benchmarks" / "results" / "quality.jsonl"


def test_the_readme_has_the_table(tables: Path, tmp_path: Path) -> None:
    assert readme.main([], tmp_path) == 0
    assert "Not measured yet: `python -m benchmarks.quality mine`" in (tmp_path / "README.md").read_text()
    run("mine", tables)
    assert readme.main([], tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| random | 1 % | 1,000 (1.00%) | 0.002 | 1.5100 ± 0.0100 |" in text
    assert "Model demo, 5 steps of 2 rows, some rows held out, 0.0 hours on " in text


def test_a_table_under_way_shows_no_number(
    tables: Path, tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run("mine", tables, seeds=[0])
    assert readme.main([], tmp_path) == 0
    said = (tmp_path / "README.md").read_text()
    assert re.search(r"Under way: \d+ trainings are done, and the learning rates of (\d) of the \1 arms are", said)
    assert "`python -m benchmarks.quality mine` goes on" in said
    assert "| arm |" not in said
    run("mine", tables)
    assert readme.main([], tmp_path) == 0
    assert "| random | 1 % | 1,000 (1.00%) | 0.002 | 1.5100 ± 0.0100 |" in (tmp_path / "README.md").read_text()
    write(seeds=[0])
    assert readme.main([], tmp_path) == 1
    assert capsys.readouterr().err.strip() == "quality-mine: a table of one seed shows no spread; give it 3 seeds."


# ---- bad input

BAD = {
    "an unknown key": ({"arm": {}}, r"has the key arm, which means nothing; known are against, also, arms"),
    "no arms": ({"arms": {}}, "names no arm"),
    "no title": ({"title": None}, "has no title"),
    "an arm without updates": ({"arms": {"a": {"lr": [1]}}}, "arm a must have either updates or the YAML of a method"),
    "an unknown key of an arm": ({"arms": {"a": {"rank": 1, "lr": [1]}}}, "arm a has the key rank"),
    "no rate": ({"arms": {"a": {"updates": [], "lr": []}}}, r"lr is \[\]; give a list of different numbers above 0"),
    "one rate, no list": ({"arms": {"a": {"updates": [], "lr": 1e-3}}}, "lr is 0.001; give a list"),
    "a negative rate": ({"arms": {"a": {"updates": [], "lr": [-1]}}}, "numbers above 0"),
    "a name that is no folder's": ({"arms": {"a/b": {"updates": [], "lr": [1]}}}, "made|make it of letters"),
    "updates that are no list": ({"arms": {"a": {"updates": "SMT", "lr": [1]}}}, "give a list"),
    "an unknown strategy": ({"arms": {"a": {"updates": ["SMTT"], "lr": [1]}}}, "no update strategy SMTT"),
    "no strategy's module": ({"arms": {"a": {"updates": ["no.such.X"], "lr": [1]}}}, "no update strategy no.such.X"),
    "an update without class": ({"arms": {"a": {"updates": [{"r": 1}], "lr": [1]}}}, "give its class_path"),
    "a fixed seed": (
        {"arms": {"a": {"updates": [{"class_path": "SMT", "init_args": {"seed": 3}}], "lr": [1]}}},
        "arm a fixes the seed of SMT",
    ),
    "seeds twice": ({"seeds": [1, 1]}, r"the seeds are \[1, 1\]; give different whole numbers"),
    "no workload": ({"workload": "nowhere.yaml"}, "nowhere.yaml cannot be read as YAML"),
    "a test that is none": ({"test": 5}, "`test` is 5"),
    "one outcome, no list": ({"also": "density"}, "`also` is 'density'; give a list of different outcomes"),
    "an outcome twice": ({"also": ["density", "density"]}, "give a list of different outcomes"),
    "beside no arm": (
        {"also": ["density"], "against": "dora", "reduce": ["density"]},
        r"`against` is 'dora' and `reduce` is \['density'\]; give one of its arms \(random, lora, full\)",
    ),
    "reduce what is not shown": (
        {"also": ["density"], "against": "lora", "reduce": ["sparsity"]},
        r"some of the outcomes in `also` \(density\), or neither key",
    ),
    "reduce beside nothing": ({"also": ["density"], "reduce": ["density"]}, "`against` is None"),
    "beside an arm, but what": ({"against": "lora"}, r"`reduce` is \[\]"),
    "a race to no arm": (
        {"race": {"every": 5, "to": "mezo"}},
        "race names the arm mezo; give one of random, lora, full",
    ),
    "a race without validations": ({"race": {"every": 0, "to": "lora"}}, "race.every is 0; give the steps between"),
    "parts of no arm": (
        {"race": {"every": 5, "to": "lora", "without": {"full": "LoRA"}}},
        "race has without, but no whole",
    ),
    "costs that are no flag": ({"costs": "yes"}, "`costs` is .yes.; give true"),
    "a sweep that never ends": ({"widen": -1}, "`widen` is -1; give a whole number from 0 on"),
    "seeds of an arm, no number": (
        {"arms": {"a": {"updates": [], "lr": [1], "seeds": [0]}}},
        r"arm a: `seeds` is \[0\]; give a whole number from 1 on",
    ),
    "a race that is none": ({"race": 5}, "`race` is 5"),
    "a base that is only named": ({"base": "minilm"}, "`base` is 'minilm'; give the model it is made `of`"),
    "a base that changes nothing": ({"base": {"of": "minilm", "config": {}}}, "and the `config` it is to have"),
}


@pytest.mark.parametrize(("changes", "finding"), BAD.values(), ids=BAD.keys())
def test_a_bad_table_is_refused_in_a_sentence(write: Write, changes: dict[str, Any], finding: str) -> None:
    with pytest.raises(BadInput, match=finding) as refusal:
        run(write(**changes))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (["nowhere"], "there is no table nowhere; give one of answers, blocks_0.84, blocks_5, budgets, choices,"),
        (["tiny", "--steps", "0"], "trainer.max_steps is 0"),
        (["tiny", "--minutes", "-1"], "--minutes -1.0 was asked for"),
        (["tiny", "--results", "bad.jsonl"], "bad.jsonl:1 is no JSON"),
        (["tiny", "--results", "peers.jsonl"], "no measurement of quality, it has no identity"),
    ],
)
def test_the_command_refuses_in_a_sentence(words: list[str], finding: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text("{\n")
    Path("peers.jsonl").write_text(json.dumps(dict.fromkeys(measurements.PROVENANCE, "")) + "\n")
    assert quality.main(words) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("quality: ")
    assert finding in said
    assert "\n" not in said


# ---- a base that is made first


def test_a_base_with_another_configuration_is_the_model_of_all_trials(write: Write, tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    given = json.loads((tmp_path / "tiny" / "config.json").read_text())
    made = read_table(write(base={"of": "tiny", "config": {"hidden_act": "relu"}}))
    assert made.base is not None
    made.base.write()
    assert made.workload["model"]["base"] == str(made.base.path) == "runs/bases/tiny-hidden_act_relu"
    changed = json.loads((made.base.path / "config.json").read_text())
    assert changed == {**given, "hidden_act": "relu"} != given
    weights = {file.name for file in made.base.path.iterdir() if file.suffix == ".safetensors"}
    assert weights == {file.name for file in (tmp_path / "tiny").iterdir() if file.suffix == ".safetensors"} != set()
    assert (made.base.path / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("base", "finding"),
    [
        ({"of": "tiny", "config": {"hidden_akt": "relu"}}, "base.config has hidden_akt, which tiny has not"),
        ({"of": "nowhere", "config": {"hidden_act": "relu"}}, "base.of is nowhere, which has no config.json"),
    ],
)
def test_a_base_that_cannot_be_made_is_refused(
    base: dict[str, Any], finding: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "tiny")
    assert quality.main([write(base=base), "--minutes", "0", "--results", "q.jsonl"]) == 2
    assert finding in capsys.readouterr().err
    assert not list(Path("runs").rglob("*.safetensors"))


# ---- the tables that come with it


@pytest.mark.parametrize("path", sorted(trials.TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_table_makes_trials_that_differ_by_seed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = read_table(path.stem)
    all_trials = [made.trial(arm, rate, seed) for arm in made.arms for rate in arm.rates for seed in (0, 1)]
    identities = [trial.identity(STACK) for trial in all_trials]
    assert len(set(identities)) == len(identities)
    assert trials.SEED not in json.dumps([made.trial(arm, 1.0, 0).config for arm in made.arms])
    assert f"quality-{path.stem}" in readme.BLOCKS


def test_the_tables_share_their_baselines() -> None:
    def identities(name: str) -> set[str]:
        made = read_table(name)
        return {trial.identity(STACK) for arm in made.arms for trial in made.sweep(arm)}

    assert len(identities("budgets") & identities("blocks_0.84")) == 11
    assert len(identities("budgets") & identities("blocks_5")) == 9
    assert identities("answers") <= identities("blocks_0.84")


# ---- the whole


def test_a_table_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "cache"))
    write_tiny(tmp_path / "tiny")
    pairs = [(a, b) for a in range(6) for b in range(3)]
    rows = [{"question": f"{a} and {b}", "choices": [str(a), str(a + b)], "label": 1} for a, b in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "workload.yaml").write_text(
        "model: {base: tiny}\n"
        "data:\n  class_path: lit_sparse.data.Instructions\n"
        "  init_args: {train: rows.jsonl, heldout: 4, max_length: 32}\n"
        "trainer: {accelerator: cpu, max_steps: 2, callbacks: [lit_sparse.callbacks.DensityMonitor]}\n"
    )
    (tmp_path / "small.yaml").write_text(
        "title: Small.\nworkload: workload.yaml\ntest: {data: {init_args: {batch_size: 2}}}\n"
        "also: [density_above_0.01]\n"
        "arms:\n  random:\n    lr: [1e-2]\n"
        "    updates: [{class_path: SMT, init_args: {blocks: random, num_blocks: 4, block_size: 8}}]\n"
    )
    words = ["small.yaml", "--seeds", "0", "--results", "q.jsonl", "--markdown"]
    assert quality.main(words) == 0, [path.read_text() for path in Path("runs").rglob("*.txt")]
    fit, test = (json.loads(line) for line in Path("q.jsonl").read_text().splitlines())
    assert fit["trainable"] == 4 * 64
    assert fit["before"]["heldout_loss"] != fit["after"]["heldout_loss"]
    assert test["scores"].keys() == {"choices_accuracy"}
    assert test["identity"] == fit["identity"]
    kept = fit["rows"]["heldout"]
    assert len(kept["nll"]) == len(kept["tokens"]) == 4
    assert sum(kept["nll"]) / sum(kept["tokens"]) == pytest.approx(fit["after"]["heldout_loss"], abs=1e-3)
    assert fit["config"]["trainer"]["callbacks"] == ["lit_sparse.callbacks.DensityMonitor"]  # the identity is as ever
    assert fit["peak_resident"] > 2**20
    assert not list(Path("runs").rglob("*.ckpt"))
    row = capsys.readouterr().out.splitlines()[-1]
    loss = f"{fit['after']['heldout_loss']:.4f}"
    density = f"{fit['after']['density_above_0.01']:.4f}"
    assert row.startswith(f"| random | reference | 256 (0.75%) | 0.01 (not swept) | {loss} | - | {density} |")
    assert quality.main(words) == 0
    assert len(Path("q.jsonl").read_text().splitlines()) == 2
    sizes = workload_size.sets(read_table("small.yaml").workload)
    assert sizes["heldout"][::2] == (4, sum(kept["tokens"]))
    assert sizes["train"][0] == 14


def write_tiny(folder: Path) -> None:
    tiny_llm("llama").save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", "and", "Question", "Answer", ":", *map(str, range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
