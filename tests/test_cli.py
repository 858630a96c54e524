"""The command line: configs found by name, the files of a run, and errors in one sentence."""

import contextlib
import csv
import io
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Union

import docstring_parser
import jsonargparse
import pytest
import torch
import yaml
from jsonargparse import ActionConfigFile  # pyright: ignore[reportPrivateImportUsage]
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_sparse import cli
from lit_sparse.commands import configs, usage
from lit_sparse.commands.shipped import methods
from lit_sparse.commands.words import find_data
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.places import configs_folder
from lit_sparse.refusals import subclasses
from lit_sparse.strategies import UpdateStrategy
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.record import RunRecord

SMALL = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
    "--profile.warmup=0",
    "--profile.examine=false",
    "--profile.profiled=0",
]
DATA = ["--data", "Instructions", "--data.train", "rows.jsonl", "--data.heldout", "4", "--data.max_length", "16"]


def fit(*words: str) -> None:
    cli.run(["fit", *words[:2], "--model.base", "tiny", *DATA, *SMALL, *words[2:]])


def refused(capsys, monkeypatch, *words: str) -> str:
    """The one sentence with which the command refuses `words`; it exits with status 2."""
    monkeypatch.setattr(sys, "argv", ["lit-sparse", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("lit-sparse: ")
    return message


def selected(words: list[str]) -> dict:
    """The blocks of the newest run of `smt`, fitted with `words`, by matrix."""
    fit("--config", "smt.yaml", "--trainer.max_steps=1", *words)
    run = sorted(Path("runs").glob("smt-*"))[-1]
    (update,) = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["lit_sparse"]["updates"]
    return {name: blocks["index"].tolist() for name, blocks in update["state"].items()}


def test_select_writes_what_fit_would_choose_and_fit_reads_it(home, capsys, monkeypatch):
    update = ["--model.updates.targets=[all]", "--model.updates.trainable_fraction=0.05"]
    words = ["--config", "smt.yaml", "--model.base", "tiny", *DATA, *SMALL, *update]
    assert cli.run(["select", *words, "--output", "new/blocks.json"]) == 0
    found = json.loads(Path("new/blocks.json").read_text())
    assert found.pop("sha256")
    assert not Path("runs").exists()
    assert "--model.updates.blocks new/blocks.json" in capsys.readouterr().out
    blocks = {name: entry["index"] for name, entry in found.items()}
    assert blocks == selected(update)
    first = next(iter(found))
    Path("others.json").write_text(json.dumps({**found, first: {**found[first], "shape": [7, 9]}}))
    said = refused(capsys, monkeypatch, "fit", *words, "--model.updates.blocks=others.json")
    assert f"others.json was made for another model: its {first} has the shape [7, 9], and this one is" in said
    found[first]["index"] = found[first]["index"][:1]  # so that another choice would be seen
    Path("blocks.json").write_text(json.dumps(found))
    assert selected([*update, "--model.updates.blocks=blocks.json"]) == {**blocks, first: blocks[first][:1]}
    again = refused(capsys, monkeypatch, "select", *words, "--output", "blocks.json")
    assert again == "lit-sparse: blocks.json is there already; give --output another name, or remove it."
    lift = ["--config", "lift.yaml", *words[2:-2]]
    assert cli.run(["select", *lift, "--output", "entries.json"]) == 0
    assert "trains what it names. But SparseEntries: reselect is 100, but entries is the f" in capsys.readouterr().out
    lora = ["--config", "lora.yaml", *words[2:-2]]
    assert "select writes what one method selects before training, and PEFT has 0" in refused(
        capsys, monkeypatch, "select", *lora
    )


def test_a_config_is_found_by_name(home):
    found = configs.find_configs(
        ["fit", "--config", "smt.yaml", "-c", "trainers/demo.yaml", "--config=lora.yaml", "--model.lr=1"]
    )
    shipped = configs_folder()
    assert found == [
        "fit",
        "--config",
        f"{shipped}/smt.yaml",
        "-c",
        f"{shipped}/trainers/demo.yaml",
        f"--config={shipped}/lora.yaml",
        "--model.lr=1",
    ]
    Path("smt.yaml").write_text("")
    assert configs.find_configs(["fit", "--config", "smt.yaml"]) == ["fit", "--config", "smt.yaml"]


def test_a_config_given_as_text_names_no_run(home, caplog):
    fit("--config", "lora.yaml", "--config", "{trainer: {max_steps: 4}}", "--samples=0", "--profile.examine=null")
    assert Path("runs/lora-1/record.json").is_file()
    told = (
        "Steps 1 to 2 are measured, and slower, if that takes at most 10% of the fit; --profile=false leaves that out."
    )
    assert told in caplog.messages


def test_a_run_is_a_folder_and_goes_on_by_name(home, caplog):
    fit("--config", "smt.yaml", "--trainer.max_steps=2")
    run = Path("runs/smt-1")
    assert {"config.yaml", "record.json", "metrics.csv", "checkpoints", "tensorboard"} <= {
        p.name for p in run.iterdir()
    }
    assert RunRecord.read(run / "record.json").status == "ok"
    fit("--config", "smt.yaml", "--trainer.max_steps=4", "--ckpt_path=last")
    assert [p.name for p in Path("runs").iterdir()] == ["smt-1"]
    assert RunRecord.read(run / "record.json").throughput.steps == 4  # of both fits
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    with (run / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train_loss"]] == ["0", "1", "2", "3"]
    assert [path.name for path in run.glob("metrics*")] == ["metrics.csv"]
    assert cli.run(["report", "runs", "-o", "page.html", "--card", "24"]) == 0
    assert_page(Path("page.html").read_text(), run)
    told = [message for message in caplog.messages if message.startswith("Resuming with")]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert told == ["Resuming with trainer.max_steps = 4; the run had 2."]
    words = [*DATA, "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--trainer.accelerator=cpu"]
    cli.run(["validate", "--config", "smt.yaml", "--model.base", "tiny", *words])
    assert [p.name for p in Path("runs").iterdir()] == ["smt-1"]
    cli.run(["validate", "--config", "smt.yaml", "--model.base", "tiny", *DATA, "--trainer.accelerator=cpu"])
    assert "No --ckpt_path was given, so that the base itself is scored." in caplog.messages
    fit("--config", "smt.yaml", "--trainer.max_steps=1")
    assert Path("runs/smt-2").is_dir()
    fit("--config", str(run / "config.yaml"), "--trainer.max_steps=5", "--ckpt_path=last")
    fit("--config", "smt.yaml", "--run=x", "--trainer.max_steps=6", f"--ckpt_path={run}/checkpoints/last.ckpt")
    steps = [torch.load(f"runs/smt-{n}/checkpoints/last.ckpt", weights_only=True)["global_step"] for n in (1, 2)]
    assert steps == [6, 1]  # its own last one, and not the newest of that name
    assert yaml.safe_load((run / "config.yaml").read_text())["run"] == "smt"


def assert_page(page: str, run: Path) -> None:
    """Check that the page has the figures of a short fit with SMT on a CPU, and the command that makes it."""
    assert "<code>lit-sparse report runs -o page.html --card 24</code>" in page
    assert "card of 24 GB" in page
    titles = {
        *("Where the memory goes", "Where the time goes", "Loss during training", "Memory during training"),
        "Where blocks were chosen",
    }
    assert {title for title in titles if f'"title":"{title}"' not in page} == set()
    assert json.dumps(RunRecord.read(run / "record.json").command) in page


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--card", "23"], "--card 23 was asked for; the known sizes in GB are"),
        (["-o", "nowhere/page.html"], "could not be written to nowhere/page.html"),
        (["-o", "."], "which is a folder; name a file"),
        (["--peft_results", "x", "-o", "page.html"], "none of these runs ended"),
    ],
)
def test_a_page_that_cannot_be_written_is_a_sentence(home, words, sentence):
    Path("runs/lora-1").mkdir(parents=True)
    RunRecord(name="lora-1", status="failed", reason="stopped").write("runs/lora-1/record.json")
    with pytest.raises(BadInput, match=re.escape(sentence)):
        cli.run(["report", "runs", *words])
    assert not Path("x").exists()


@pytest.mark.parametrize("word", [["--data", "rows.jsonl"], ["--data=rows.jsonl"], ["--data=./rows.jsonl"]])
def test_own_data_is_one_word(home, word):
    cli.run(["fit", "--config", "smt.yaml", "--config", "trainers/demo.yaml", "--model.base", "tiny", *word, *SMALL,
             "--trainer.max_steps=1", "--trainer.val_check_interval=1"])  # fmt: skip
    config = yaml.safe_load(Path("runs/smt-1/config.yaml").read_text())
    assert config["data"]["class_path"] == "lit_sparse.data.Instructions"
    assert config["data"]["init_args"]["train"].endswith("rows.jsonl")


def test_data_are_read_by_what_fits_them(tmp_path):
    def data(*words, task=None):
        return find_data(["fit", *words], task)[1:]

    for name in ("rows.jsonl", "a/b.JSON", "/a b/c.csv", "a.parquet", "openai/gsm8k", "openai/gsm8k:test[:9]"):
        assert data("--data", name) == ["--data=lit_sparse.data.Instructions", f"--data.train={name}"]
        assert data(f"--data={name}", "--x=1") == [
            "--data=lit_sparse.data.Instructions",
            f"--data.train={name}",
            "--x=1",
        ]
        assert data("--data", name, task="Classifier")[0] == "--data=lit_sparse.data.Labelled"
    for name in ("a.txt", f"{tmp_path}/"):
        assert data("--data", name) == ["--data=lit_sparse.data.Text", f"--data.train={name}"]
    for other in (
        "Instructions",
        "lit_sparse.data.Text",
        "my.module.Data",
        "data/mine.yaml",
        "mine.yml",
        '{"a": "b/c"}',
    ):
        assert data("--data", other) == ["--data", other]
        assert data(f"--data={other}") == [f"--data={other}"]
    assert data("--data.train", "rows.jsonl", "--run", "a/b") == ["--data.train", "rows.jsonl", "--run", "a/b"]


def test_a_phase_follows_a_run_and_has_its_own_name(home):
    """By the commands that the YAMLs give. Weight decay would be recorded as if the loss had moved the weights."""
    Path("general.txt").write_text("".join(f"{n % 7} and {n % 5} {n % 3}\n" for n in range(400)))
    text = ["--config", "data/text.yaml", "--data.train", "general.txt", "--data.max_length", "16"]
    last = ["--model.base", "tiny", "--data.num_workers=0", "--data.heldout=4", *SMALL, "--trainer.max_steps=2"]
    cli.run(["fit", "--config", "record_importance.yaml", "--run", "general", *text, *last])
    fit("--config", "phases/adaptive_regularization.yaml", "--trainer.max_steps=2")
    cli.run(["fit", "--config", "phases/record_fisher.yaml", *text, "--data.batch_size=1", *last])
    assert {path.name for path in Path("runs").iterdir()} == {
        "general-1",
        "adaptive_regularization-1",
        "record_fisher-1",
    }
    optimizer = torch.load("runs/general-1/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0, 0]


def test_callbacks_of_a_yaml_stand_beside_the_recorder(home):
    Path("counted.yaml").write_text("trainer:\n  callbacks: [lit_sparse.callbacks.DensityMonitor]\n")
    steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    fit("--config", "lora.yaml", "--config", "deft.yaml", "--config", "counted.yaml", "--run=counted", *steps)
    outcome = RunRecord.read(Path("runs/counted-1/record.json")).outcome
    assert outcome["before"].keys() == outcome["after"].keys() >= {"heldout_loss", "density", "density_within_error"}
    assert Path("runs/counted-1/checkpoints/last.ckpt").is_file()


def test_yamls_compose_in_either_order(home):
    Path("other.yaml").write_text("model:\n  updates+:\n    - class_path: tests.test_cli.Nothing\n")
    for files in (["smt.yaml", "lora.yaml"], ["lora.yaml", "smt.yaml"]):
        parser = LightningArgumentParser(parser_mode="omegaconf", exit_on_error=False)
        parser.add_argument("--config", action=ActionConfigFile)
        parser.add_class_arguments(CausalLM, "model")
        words = configs.find_configs([word for file in files for word in ("--config", file)])
        updates = parser.parse_args(words).model.updates
        assert [update.class_path.rpartition(".")[2] for update in updates] == [
            {"smt.yaml": "SMT", "lora.yaml": "PEFT"}[f] for f in files
        ]


BAD = {
    "unknown key": (["--config", "smt.yaml", "--model.blocksize=4"], "blocksize"),
    "wrong type": (["--config", "smt.yaml", "--model.lr=fast"], "model.lr"),
    "no such config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "no such model": (["--config", "smt.yaml", "--model.base=nowhere/"], "could be loaded from 'nowhere/'"),
    "large block": (["--config", "smt.yaml", "--model.updates.block_size=512"], "a block of 512 x 512 is larger than"),
    "many blocks": (["--config", "smt.yaml", "--model.updates.num_blocks=100000"], "100000 blocks were asked for"),
    "two claims": (["--config", "smt.yaml", "--config", "lora.yaml"], "SMT and PEFT cannot be combined"),
    "nothing to resume": (
        ["--config", "smt.yaml", "--ckpt_path=last"],
        "no run smt-<n> under runs/ has checkpoints/last.ckpt",
    ),
    "nothing to train": (
        ["--config", "smt.yaml", "--trainer.max_epochs=0"],
        "trainer.max_epochs is 0, so that a new run",
    ),
    "a URL for runs": (["--config", "smt.yaml", "--trainer.default_root_dir=s3://a/runs"], "which names no folder"),
    "a URL to go on from": (
        ["--config", "smt.yaml", "--ckpt_path=s3://a/last.ckpt"],
        "is a URL, and a fit goes on from",
    ),
    "a long seed": (["--config", "smt.yaml", f"--model.updates.seed={2**64}"], "it must fit into 64 bits"),
    "trainer's precision": (["--config", "smt.yaml", "--trainer.precision=bf16-mixed"], "leave it at 32-true"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(home, capsys, monkeypatch, words, message):
    data = ["--data", "Instructions", "--data.train", "rows.jsonl", "--data.heldout", "4", "--data.max_length", "16"]
    base = [] if any(word.startswith("--model.base") for word in words) else ["--model.base", "tiny"]
    assert message in refused(capsys, monkeypatch, "fit", *words, *base, *data, *SMALL, "--trainer.max_steps=1")
    assert not list(Path().glob("runs/*"))


BAD_PARTS = {
    "data": (["--data", "Synthetic", "--data.vocab_size=96", "--data.max_length=0"], "`max_length` is 0"),
    "callback": (
        [*DATA, "--trainer.callbacks+=lit_sparse.callbacks.DensityMonitor", "--trainer.callbacks.error=2"],
        "DensityMonitor: error is 2.0; it must be between 0 and 1",
    ),
}


@pytest.mark.parametrize(("words", "message"), BAD_PARTS.values(), ids=BAD_PARTS)
def test_a_constructors_refusal_is_printed_as_it_stands(home, capsys, monkeypatch, words, message):
    told = refused(capsys, monkeypatch, "fit", "--config", "smt.yaml", "--model.base", "tiny", *words, *SMALL)
    assert told.startswith(f"lit-sparse: {message}")
    assert "Union" not in told
    assert not list(Path().glob("runs/*"))


def test_sigterm_outside_of_training_is_no_success(monkeypatch, capsys):
    def ended(*_: object) -> int:
        raise SIGTERMException

    monkeypatch.setattr(cli, "run", ended)
    assert cli.status_of(["validate"], cli.Phases()) == 128 + signal.SIGTERM
    assert "SIGTERM ended it" in capsys.readouterr().err


def test_our_own_mistake_keeps_its_traceback(monkeypatch):
    def mistaken(argv, phases):
        try:
            raise BadInput("told elsewhere")
        except BadInput:
            int("x")  # while that is handled, and not because of it

    monkeypatch.setattr(cli, "run", mistaken)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main()


def test_a_model_without_a_tokenizer_is_named(home, capsys, monkeypatch):
    tiny_llm("llama").save_pretrained("bare")
    data = ["--data", "Instructions", "--data.train", "rows.jsonl", "--data.heldout", "4"]
    message = refused(capsys, monkeypatch, "fit", "--config", "smt.yaml", "--model.base", "bare", *data, *SMALL)
    assert re.search(r"bare.*tokenizer", message)
    assert not list(Path().glob("runs/*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.jsonl"),
        ('{"prompt": "1", "completion": "2"}\n{"prompt"\n', "rows.jsonl line 2"),
        ('{"a": 1}\n{"a": 2}\n', "rows.jsonl line 1"),
    ],
)
def test_a_bad_data_file_is_named_with_its_line(home, capsys, monkeypatch, content, message):
    Path("rows.jsonl").write_text(content)
    data = ["--data", "Instructions", "--data.train", "rows.jsonl", "--data.heldout", "1"]
    assert message in refused(capsys, monkeypatch, "fit", "--config", "smt.yaml", "--model.base", "tiny", *data, *SMALL)
    assert not list(Path().glob("runs/*"))


def test_a_killed_or_failed_run_says_so_in_its_record(home, monkeypatch):
    def broken(self, batch, batch_idx):
        raise RuntimeError("the card fell out")

    monkeypatch.setattr(CausalLM, "training_step", broken)
    with pytest.raises(RuntimeError, match="the card fell out"):
        fit("--config", "smt.yaml", "--trainer.max_steps=2")
    record = RunRecord.read("runs/smt-1/record.json")
    assert (record.status, record.reason) == ("failed", "RuntimeError: the card fell out")
    assert record.ledger.frozen > 0


def helped(capsys, monkeypatch, *words: str) -> str:
    """Return what the command prints for `words`, with status 0."""
    monkeypatch.setattr(sys, "argv", ["lit-sparse", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    return capsys.readouterr().out


def test_help_documents_every_field(home, capsys, monkeypatch):
    assert "How blocks are selected" in helped(capsys, monkeypatch, "fit", "--model.updates.help", "SMT")
    text = helped(capsys, monkeypatch, "fit", "--help")
    for phrase in ("Peak learning rate", "Type of the frozen weights", "Name of the run", "Recompute activations"):
        assert phrase in text, phrase


def test_only_help_reads_the_source_of_classes(home, capsys, monkeypatch):
    """For docstrings of attributes, which takes a fifth of a short fit."""
    plain, seen = docstring_parser.parse_from_object, []

    def noting(component, *args, **options):
        seen.append(component)
        return plain(component, *args, **options)

    monkeypatch.setattr(docstring_parser, "parse_from_object", noting)
    assert "SMT" in helped(capsys, monkeypatch, "fit", "--config", "smt.yaml", "--print_config")
    assert not seen
    assert "Peak learning rate" in helped(capsys, monkeypatch, "fit", "--help")
    assert CausalLM in seen


@pytest.mark.parametrize(
    ("words", "found", "missing"),
    [
        (["fit"], "--data.train --data.batch_size --trainer.max_steps --model.lr --help_all", "--trainer.plugins SMT"),
        (
            ["fit", "--config", "smt.yaml", "--data", "text.txt"],
            "--model.updates.block_size data: Text",
            "Instructions",
        ),
        (["fit", "--config", "lora.yaml", "--config", "data/labelled.yaml"], "data: Labelled PEFT", "--data.packing"),
        (["test"], "--ckpt_path --data.heldout", "trainers/demo.yaml"),
    ],
)
def test_help_is_short_and_has_the_keys_of_the_data_and_methods(home, capsys, monkeypatch, words, found, missing):
    text = helped(capsys, monkeypatch, *words, "--help")
    assert len(text.splitlines()) < 160
    assert [word for word in found.split() if word not in text] == []
    assert [word for word in missing.split() if word in text] == []


def test_the_long_help_has_every_key(home, capsys, monkeypatch):
    text = helped(capsys, monkeypatch, "fit", "--help_all")
    options = usage.fit_words(cli.start(cli.Parsers, ["fit"]).verb_parser())
    shown = {"--data.tokenizer", "--help_all"}  # follows model.base; is this help
    assert [word for word in options if not word.endswith(".help") and word not in shown and word not in text] == []
    assert {"--trainer.plugins", "--data.packing", "--model.updates.block_size"} <= {*options}


def test_list_tells_what_each_method_trains_costs_and_claims(home, capsys):
    cli.run(["list"])
    text = capsys.readouterr().out
    kinds = {kind.__name__: kind for kind in subclasses(UpdateStrategy)}
    for path in methods():
        named = yaml.safe_load(path.read_text())["model"].get("updates+", [])
        updates = [kinds[one["class_path"]] for one in named]
        block = text.partition(f"\n{path.name}\n")[2].partition("\n\n")[0]
        said = dict(re.findall(r"^    (\w+): +(\S.*)$", block, re.MULTILINE))
        assert said["classes"] == (", ".join(one.__name__ for one in updates) or "none"), path
        claims = [one().claims if isinstance(one.claims, property) else one.claims for one in updates]
        assert said["claims"] == (", ".join(sorted({*()}.union(*claims))) or "none"), path
        page = Path(__file__).parents[1] / said["page"]
        assert path.name in page.read_text() or "../choose-a-method.md" in page.read_text(), path
        assert said["trains"]
        assert said["costs"]
    for path in configs_folder().rglob("*/*.yaml"):
        assert f"{path.parent.name}/{path.name}" in text


def test_a_printed_configuration_has_no_nulls_and_is_the_same_fit(home, capsys, monkeypatch):
    words = [
        "--config",
        "lora.yaml",
        "--config",
        "deft.yaml",
        "--model.base",
        "tiny",
        *DATA,
        *SMALL,
        "--trainer.max_steps=2",
        "--trainer.default_root_dir",
        "null",
    ]
    text = helped(capsys, monkeypatch, "fit", *words, "--print_config")
    nulls = [line for line in text.splitlines() if line.endswith(": null")]
    assert nulls == ["  default_root_dir: null"]  # which would be runs/ if it was left out
    words[-1] = "runs"
    Path("printed.yaml").write_text(helped(capsys, monkeypatch, "fit", *words, "--print_config"))
    assert "null" not in Path("printed.yaml").read_text()
    cli.run(["fit", *words, "--run", "given"])
    cli.run(["fit", "--config", "printed.yaml", "--run", "printed"])
    given, printed = (Path(f"runs/{name}-1") for name in ("given", "printed"))
    told = [{**yaml.safe_load((run / "config.yaml").read_text()), "run": None} for run in (given, printed)]
    assert told[0] == told[1]
    rows = [list(csv.DictReader((run / "metrics.csv").read_text().splitlines())) for run in (given, printed)]
    losses = [[row["train_loss"] for row in one] for one in rows]
    assert any(losses[0])
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def completing(tmp_path_factory):
    """The script for bash, in a file."""
    path = tmp_path_factory.mktemp("shell") / "lit-sparse"
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        cli.run(["completion", "bash"])
    path.write_text(told.getvalue())
    return path


@pytest.mark.parametrize(
    ("line", "offered", "kept"),
    [
        ("lit-sparse ge", ["generate"], True),
        ("lit-sparse ", ["fit", "plan", "completion"], False),
        ("lit-sparse fit --config sm", ["smt.yaml"], True),
        ("lit-sparse fit --config = trainers/f", ["trainers/fsdp2.yaml"], True),
        ("lit-sparse fit --model.ba", ["--model.base"], True),
        ("lit-sparse fit --config smt.yaml --data.ba", ["--data.batch_size"], True),
        ("lit-sparse fit --model.updates.num_b", ["--model.updates.num_blocks"], True),
        ("lit-sparse plan smt.yaml lor", ["lora.yaml"], True),
        ("lit-sparse export runs/smt-1 --ov", ["--overwrite"], True),
        ("lit-sparse report --mark", ["--markdown"], True),
        ("lit-sparse report ru", [], True),  # paths are the shell's
    ],
)
def test_a_shell_completes(completing, line, offered, kept):
    words = line.split(" ")
    script = (
        f"source {completing}; COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}; "
        '_lit_sparse; printf "%s\n" "${COMPREPLY[@]}"'
    )
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert (told == offered) if kept else set(offered) < set(told)


def test_every_shipped_yaml_has_a_comment_for_each_key():
    for path in configs_folder().rglob("*.yaml"):
        yaml.safe_load(path.read_text())
        assert path.read_text().startswith("#"), path
        for line in path.read_text().splitlines():
            value = line.partition(":")[2].split("#")[0].strip().strip("-")
            assert not value or line.lstrip().startswith(("#", "- class_path", "class_path")) or "#" in line, (
                f"{path}: {line}"
            )


@pytest.mark.parametrize("asked", [Union[float, int, None], float | int | None])  # noqa: UP007
def test_a_whole_number_is_no_share(asked):
    """`--trainer.limit_val_batches=1` is a batch, in whichever order the types were written down first."""

    class Limited:
        def __init__(self, limit=None, share: float = 1.0) -> None:
            self.limit = limit

    Limited.__init__.__annotations__["limit"] = asked

    configs.read_whole_numbers_first(Limited)
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(Limited)
    for word, kind in (("1", int), ("1.0", float), ("0.25", float)):
        assert type(parser.parse_args([f"--limit={word}"]).limit) is kind
    assert type(parser.parse_args(["--share=1"]).share) is float
