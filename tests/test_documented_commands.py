"""Run the commands of README.md and docs/ on tiny models: those of the first pages always, the others as `slow`.

A name on the Hub is a local folder of that name, and the demo model and data are tiny ones. What is appended makes a
run short, and keeps it on one CPU process. `make docs-run` runs all of them.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from lit_sparse import cli, demo
from lit_sparse.testing import tiny_encoder, tiny_llm
from tests.conftest import make_home

ROOT = Path(__file__).parents[1]
FIRST = ["README.md", "docs/start.md"]
PAGES = [*FIRST, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
CANNOT_RUN = {
    "torchrun ": "needs two machines with eight GPUs each",
    "srun ": "needs Slurm",
    "#SBATCH": "is a header for Slurm",
    "source ": "is the shell's",
    "make ": "builds the environment, or is the whole suite; test_readme.py sees that the target exists",
    "--push": "needs an account on the Hub; tests/export/test_hub.py pushes to a stand-in",
    "allenai/c4": "needs the Hub; tests/data/test_stream.py streams a stand-in",
    "trainers/fsdp2.yaml": "needs several GPUs; tests/modules/test_sharding.py trains on two CPU processes",
}
"""Words of commands that cannot be run here, with the reason."""
ON_CPUS = "--trainer.accelerator cpu --trainer.devices 2"
"""FSDP2 that can be run, in processes of its own."""
SHORT = [
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.max_steps=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"),
    *("--trainer.accumulate_grad_batches=1", "--samples=0", "--profile.examine=false", "--profile.profiled=0"),
]
NAMES = ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "NAME")
"""Bases that commands name."""
EARLIER = {
    "mine": "--config lora.yaml --data rows.jsonl",
    "lora": "--config lora.yaml --data rows.jsonl",
    "mezo": "--config mezo.yaml --data rows.jsonl",
    "meft": "--config meft.yaml --data rows.jsonl",
    "low_rank": "--config low_rank.yaml --config models/llama-3m.yaml",
    "general": "--config record_importance.yaml --config data/text.yaml --data.train general.txt",
    "fisher": "--config phases/record_fisher.yaml --config data/text.yaml --data.train general.txt --data.batch_size 1",
}
"""Runs that commands go on from, with how they were made."""


def commands() -> list[tuple[str, str]]:
    """Each fenced command line with the first page that has it, without its comment."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in FENCE.findall((ROOT / page).read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"(^|\s+)# .*$", "", line).strip()
                if command:
                    found.setdefault(" ".join(command.split()), page)
    return list(found.items())


def reason(command: str) -> str | None:
    """Why a command cannot be run here; None if it can."""
    if ON_CPUS in command:
        return None
    return next((why for mark, why in CANNOT_RUN.items() if mark in command), None)


def cases(kept: bool) -> list[str]:
    """The commands that are run, those of the first pages without long ones, or the others."""
    return [
        command
        for command, page in commands()
        if reason(command) is None and (page in FIRST and command.split()[1] not in ("bench", "plan")) == kept
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tiny models under the names that commands give, and data under their file names."""
    folder = tmp_path_factory.mktemp("documented")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LIT_SPARSE_CACHE", str(folder / "cache"))
        for name in ("tiny", *NAMES):
            make_home(name, tiny_llm("llama"))
        make_home("experts", MixtralForCausalLM(tiny_mixtral()))
        make_home("encoder", tiny_encoder())
        rows = Path("rows.jsonl").read_text()
        Path("domain.jsonl").write_text(rows)
        passages = [" ".join(str((n * k) % 40) for k in range(30)) for n in range(60)]
        Path("passages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
        Path("books").mkdir()
        for name in ("general.txt", "novels.txt", "books/one.txt"):
            Path(name).write_text("\n".join(passages))
        Path("prompts.txt").write_text("1 and 2\n3 and 4\n")
        choices = [{"question": f"{n} and 1", "choices": ["1", "2"], "label": n % 2} for n in range(20)]
        Path("choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
        Path("labelled.csv").write_text("text,label\n" + "".join(f"{n} and {n % 7},{n % 3}\n" for n in range(60)))
        patch.setattr(demo, "model_folder", lambda: folder / "tiny")
        patch.setattr(demo, "encoder_folder", lambda: folder / "encoder")
        files = {"gsm8k": "rows.jsonl", "text": "passages.jsonl"}
        patch.setattr(demo, "dataset_file", lambda name: folder / files.get(name, "choices.jsonl"))
        patch.setattr(demo, "labelled_file", lambda: folder / "labelled.csv")
        yield folder


def tiny_mixtral() -> MixtralConfig:
    """A mixture of four experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=4, **sizes)


def shortened(words: list[str]) -> list[str]:
    """The words of a command with what makes its run short."""
    if words[0] == "test":
        return words
    if words[0] == "bench":
        return [*words, "--steps", "1", "--data.max_length=16", "--data.batch_size=1", *tiny(words)]
    if words[0] != "fit" or "--help" in words:
        return words
    text = " ".join(words)
    short = [
        *SHORT,
        *(["--data.max_length=16", "--data.heldout=4"] if "data/text.yaml" in words or "models/" in text else []),
    ]
    short += [] if "classif" in text else ["--data.num_workers=0"]
    short += ["--model.base=experts"] if "gate_up" in text else []
    short += ["--model.updates.samples=2"] if "record_fisher" in text else []
    return [*words, *short]


def tiny(words: list[str]) -> list[str]:
    """The tiny base for a process of its own, which would take the demo's."""
    return [] if "--model.base" in words else ["--model.base=tiny"]


def run(words: list[str]) -> None:
    """Run the command line; it must end with status 0."""
    before = sys.argv
    sys.argv = ["lit-sparse", *words]
    try:
        status = cli.run(words)
    except SystemExit as left:  # --help
        status = left.code
    finally:
        sys.argv = before
    assert not status


def prepare(command: str) -> None:
    """Make the runs that a command goes on from."""
    named = {name for name in EARLIER if f"runs/{name}-1" in command}
    named |= {"general"} if "adaptive_regularization" in command else {"fisher"} if "ewc" in command else set()
    named |= {"mine"} if "report runs" in command else set()
    for name in named:
        if not Path(f"runs/{name}-1").exists():
            run(shortened(["fit", *shlex.split(EARLIER[name]), "--run", name]))
    if (
        results := "peft/method_comparison/MetaMathQA/results"
    ) in command:  # in its form, as PEFT's repository has them
        run(["report", "runs", "--peft_results", results])
    if "--ckpt_path last" in command and not named:  # a run of that name, by the same method
        run(shortened(shlex.split(command.replace("--ckpt_path last", ""))[1:]))
    if "baseline.json" in command:  # which keeps one run of each name
        shutil.rmtree("runs")
        run(shortened(["fit", *shlex.split(EARLIER["mine"]), "--run", "mine"]))
        run(["report", "runs", "--save_baseline", "baseline.json"])
    if "report runs/bench" in command and not Path("runs/bench").exists():
        run(shortened(["bench", "smt.yaml"]))


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a documented command, and what it needs before."""
    if "--model.quantize" in command:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra quant)")
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 and 1\n"))  # of --chat
    prepare(command)
    words = shlex.split(command.partition(" > ")[0])[1:]
    if "--overwrite" not in words and words[0] == "export":
        words.append("--overwrite")  # pages export the same run
    if ON_CPUS in command:
        paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "profiling"))
        few = [*SHORT[3:], *tiny(words), "--data=rows.jsonl", "--data.num_workers=0"]
        environment = {**os.environ, "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-m", "lit_sparse", *words, *few], check=True, env=environment)
        return
    words = shortened(words)
    run([*words, "--trainer.max_steps=2"] if "last" in words else words)


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("command", cases(kept=True))
def test_a_command_of_the_first_pages_runs(command, place, monkeypatch):
    check(command, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # plan of kl_to_base.yaml
@pytest.mark.parametrize("command", cases(kept=False))
def test_a_command_of_the_other_pages_runs(command, place, monkeypatch):
    check(command, monkeypatch)


def test_commands_that_cannot_be_run_are_few():
    left = [command for command, _ in commands() if reason(command)]
    assert all(any(mark in command for command in left) for mark in CANNOT_RUN)
    assert len(left) < len(commands()) / 4
