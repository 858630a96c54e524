"""The command `lit-sparse`. Help, version and misspelt verbs are answered before torch is imported."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib.metadata import version

VERBS = {
    "fit": "train with update strategies: lit-sparse fit --config smt.yaml",
    "select": "choose what a method trains, in a run of its own, and write it to a file for fit",
    "validate": "score the held-out rows with a run's checkpoint",
    "test": "answer the held-out questions with a run's checkpoint",
    "export": "write a run as a Hugging Face folder, a PEFT adapter or a delta",
    "generate": "answer prompts with a run, beside its base, or chat",
    "bench": "measure memory, speed and energy of YAMLs, each in a fresh process",
    "plan": "predict the memory of several YAMLs on a GPU, in seconds, without the weights",
    "report": "compare runs: a table, or a page to send: lit-sparse report runs -o report.html",
    "list": "list the update strategies and the shipped YAMLs",
}
OTHERS = {
    "predict": "use lit-sparse generate to answer a prompt with a run, or lit-sparse test to answer the held-out rows.",
    "train": "did you mean fit?",
    "evaluate": "did you mean test?",
    "help": "write lit-sparse --help.",
}
"""Verbs that other programs have, with what to do here."""


def help_text() -> str:
    """Return the verbs, with a line on each."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: lit-sparse VERB [options]",
            "",
            "Fine-tune language models while changing few of their weights,",
            "and know what that costs.",
            "",
            *lines,
            "",
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


def main() -> None:
    """Run the command; exit with status 2 if the verb is unknown."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print(help_text())
        sys.exit(0)
    if verb == "--version":
        print(f"lit-sparse {version('lit-sparse')}")
        sys.exit(0)
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        meant = OTHERS.get(verb) or (f"did you mean {near[0]}?" if near else "lit-sparse --help lists them.")
        print(f"lit-sparse: there is no verb {verb!r}; {meant}", file=sys.stderr)
        sys.exit(2)
    wait_passively()
    hush_torch()
    if sys.stderr.isatty():
        print("Loading torch and transformers.", file=sys.stderr, flush=True)
    from lit_sparse.cli import main as run

    run()


if __name__ == "__main__":
    main()
