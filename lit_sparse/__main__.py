"""The command `lit-sparse`. Help, version, list and misspelt verbs are answered before torch is imported."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from typing import NamedTuple, NoReturn

from lit_sparse.commands.shipped import listing, short_help
from lit_sparse.commands.streams import outlived


class Verb(NamedTuple):
    """A verb: its purpose, and a command to begin with."""

    what: str
    example: str


GROUPS = {
    "Choose": {
        "list": Verb("list the methods: what each trains and costs, and where its page is", "lit-sparse list"),
        "plan": Verb(
            "predict the memory of methods on a GPU, in seconds, without the weights",
            "lit-sparse plan smt.yaml lora.yaml --model.base NAME --card 24",
        ),
        "bench": Verb(
            "measure memory, speed and energy of methods, each in a fresh process",
            "lit-sparse bench smt.yaml lora.yaml --model.base NAME",
        ),
    },
    "Train": {
        "fit": Verb("train with one method or several", "lit-sparse fit --config smt.yaml --data rows.jsonl"),
        "select": Verb(
            "choose what a method trains, in a run of its own, and write it to a file for fit",
            "lit-sparse select --config smt.yaml --output blocks.json",
        ),
        "validate": Verb(
            "score the held-out rows with a run's checkpoint",
            "lit-sparse validate --config runs/smt-1/config.yaml --ckpt_path runs/smt-1/checkpoints/last.ckpt",
        ),
        "test": Verb(
            "answer the held-out questions with a run's checkpoint",
            "lit-sparse test --config runs/smt-1/config.yaml --ckpt_path runs/smt-1/checkpoints/last.ckpt",
        ),
    },
    "Use": {
        "generate": Verb(
            "answer prompts with a run, beside its base, or chat",
            'lit-sparse generate runs/smt-1 "What is 12 times 7?" --base',
        ),
        "export": Verb(
            "write a run as a Hugging Face folder, a PEFT adapter or a delta", "lit-sparse export runs/smt-1 --to hf"
        ),
        "report": Verb("compare runs: a table, or a page to send", "lit-sparse report runs -o report.html"),
    },
    "Shell": {
        "completion": Verb(
            "print a script that completes verbs, keys and YAMLs in bash or zsh", 'eval "$(lit-sparse completion bash)"'
        ),
    },
}
VERBS = {verb: one for verbs in GROUPS.values() for verb, one in verbs.items()}
OTHERS = {
    "predict": "use lit-sparse generate to answer a prompt with a run, or lit-sparse test to answer the held-out rows.",
    "train": "did you mean fit?",
    "evaluate": "did you mean test?",
    "help": "write lit-sparse --help.",
}
"""Verbs that other programs have, with what to do here."""


WHOLE_NUMBERS = (
    *("PL_GLOBAL_SEED", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "JSM_NAMESPACE_RANK"),
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
)
"""Environment variables that Lightning reads as whole numbers."""


def help_text() -> str:
    """Return the verbs in groups, with what each does and an example."""
    width = max(map(len, VERBS))
    groups = []
    for title, verbs in GROUPS.items():
        lines = [f"  {verb:<{width}}  {one.what}\n  {'':<{width}}  $ {one.example}" for verb, one in verbs.items()]
        groups.append("\n".join([title, *lines]))
    return "\n\n".join(
        [
            "usage: lit-sparse VERB [options]",
            "Fine-tune language models while changing few of their weights, and know what that costs.",
            *groups,
            "lit-sparse VERB --help tells a verb's options; lit-sparse --version the version.",
        ]
    )


def wait_passively() -> None:
    """Let OpenMP's threads sleep at barriers, unless the user chose otherwise; it is read when torch is loaded.

    They spin by default: beside another busy process each barrier then waits for a thread that has no core, and a fit
    takes many times its share. On a quiet machine sleeping costs nothing (`python -m benchmarks.wait_policy`).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def hush_torch() -> None:
    """Let torch's profiler and allocator not write between the lines of a fit; read when torch is loaded."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def show(text: str) -> NoReturn:
    """Print `text` and exit; a reader that leaves, such as `head`, is no error."""
    with outlived():
        print(text)
    sys.exit(0)


def fault(verb: str, words: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Return a sentence on words, environment or current folder that only `report` can use; None if all is well.

    Each would end in an error deep inside of Lightning, of YAML or of a tokenizer.
    """
    if verb == "report":
        return None
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # by which Python stands in for other bytes
            return f"{word!a} is not UTF-8, which files of runs are written in; give a name or text in UTF-8."
    for name in WHOLE_NUMBERS:
        value = environment.get(name)
        if value is not None and not re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", value):
            return (
                f"the environment variable {name} is {value!a}; it must be a whole number: set it to one, or unset it."
            )
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current folder is not there any more; change to another."
    return None


def main() -> None:
    """Run the command; exit with status 2 if the verb is unknown."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        show(help_text())
    if verb == "--version":
        show(f"lit-sparse {version('lit-sparse')}")
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        meant = OTHERS.get(verb) or (f"did you mean {near[0]}?" if near else "lit-sparse --help lists them.")
        print(f"lit-sparse: there is no verb {verb!r}; {meant}", file=sys.stderr)
        sys.exit(2)
    if sys.argv[1:] == ["list"]:
        show(listing())
    if sys.argv[2:] in (["-h"], ["--help"]) and (text := short_help(verb)):
        show(text)
    if found := fault(verb, sys.argv[2:], os.environ):
        print(f"lit-sparse: {found}", file=sys.stderr)
        sys.exit(2)
    wait_passively()
    hush_torch()
    if sys.stderr is not None and sys.stderr.isatty():
        print("Loading torch and transformers.", file=sys.stderr, flush=True)
    try:
        from lit_sparse.cli import main as run

        run()
    except KeyboardInterrupt:  # before a fit trains: then it saves first
        sys.exit(130)


if __name__ == "__main__":
    main()
