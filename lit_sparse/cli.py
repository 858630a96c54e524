"""The verbs of the command `lit-sparse`, and what becomes of an error in one."""

import argparse
import inspect
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jsonargparse
from jsonargparse import auto_cli, set_parsing_settings
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_sparse.callbacks.checkpointing import Stopped
from lit_sparse.callbacks.out_of_memory import asked_for
from lit_sparse.callbacks.rank_watch import rank_of_this, tell_once
from lit_sparse.commands import usage
from lit_sparse.commands.bench import bench
from lit_sparse.commands.bench import parser as bench_parser
from lit_sparse.commands.fit import CLI, start
from lit_sparse.commands.parsers import Parsers, help_of
from lit_sparse.commands.plan import parser as plan_parser
from lit_sparse.commands.plan import plan
from lit_sparse.commands.planned import make_planned
from lit_sparse.commands.report import compare, report_parser
from lit_sparse.commands.screen import tidy
from lit_sparse.commands.select import select, select_parser
from lit_sparse.commands.shipped import laid_out, listing
from lit_sparse.commands.streams import outlived
from lit_sparse.commands.words import switched_on
from lit_sparse.errors import BadInput
from lit_sparse.export import generate
from lit_sparse.export.folder import export
from lit_sparse.library_errors import is_oom, understood
from lit_sparse.refusals import explain
from lit_sparse_profiling.phases import Phases

NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "By default only one JsonargparseDeprecationWarning",
    "`is_gradient_checkpointing` is deprecated",
    "`loftq_config` specified but will be ignored",
    "fan_in_fan_out is set to False but the target module is",
    "The '.*' does not have many workers",
    "Sparse invariant checks are implicitly disabled",
    "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion",
)
"""Warnings that our dependencies cause in one another, and that no user can act on."""


def list_methods() -> None:
    """List the methods: what each trains and costs, and where its page is; and the YAMLs that stack on them."""
    print(listing())


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print a script that completes verbs, their options and shipped YAMLs in a shell.

    Args:
        shell: The shell that reads it.
    """
    keys = usage.fit_words(start(Parsers, ["fit"]).verb_parser())
    options: dict[str, Sequence[str]] = {"list": [], "completion": [], **dict.fromkeys(FIT_VERBS, keys)}
    options["export"] = [f"--{name}" for name in inspect.signature(export).parameters if name != "run"]
    options |= {verb: usage.option_words(parser()) for verb, parser in PARSERS.items()}
    options["select"] = [*options["select"], *keys]
    print(usage.completion(shell, options), end="")


FIT_VERBS = ("fit", "validate", "test")
"""Verbs of LightningCLI."""
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "bench": bench_parser,
    "generate": generate.parser,
    "plan": plan_parser,
    "report": report_parser,
    "select": select_parser,
}
"""Verbs that parse their words by themselves."""
VERBS: dict[str, Callable[..., Any]] = {"export": export, "list": list_methods, "completion": completion}
"""Verbs whose options are the parameters of a function."""
RUN_VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "bench": bench,
    "generate": generate.command,
    "plan": lambda argv: plan(argv, make_planned),
    "report": compare,
    "select": select,
}
"""Verbs with any number of positional arguments and an exit status."""


def run(argv: Sequence[str], phases: Phases | None = None) -> int:
    """Run the command in `argv` (without the program's name); return the exit status.

    Args:
        argv: The command line.
        phases: What came before, such as imports; a run's wall time includes it.
    """
    # Help alone shows docstrings of attributes, for which the source of every class is read: a fifth of a short fit.
    set_parsing_settings(
        docstring_parse_attribute_docstrings=any("help" in word for word in argv),
        instantiate_subclass_spec_in_any=False,  # a key that takes anything would make an object of any class
    )
    tidy()
    if argv and argv[0] in RUN_VERBS:
        return RUN_VERBS[argv[0]](argv[1:])
    if argv and argv[0] in VERBS:
        verb = VERBS[argv[0]]
        try:
            auto_cli(verb, args=switched_on(verb, argv[1:]), exit_on_error=False)
        except jsonargparse.ArgumentError as error:
            options = [f"--{name}" for name in inspect.signature(verb).parameters]
            raise BadInput(explain(str(error), options, argv[0])) from error
        return 0
    if asked := {*usage.SHORT, usage.LONG} & set(argv):
        long = usage.LONG in asked
        text = help_of([word for word in argv if word not in asked], long)
        print(text if long else laid_out(text))
        return 0
    start(CLI, argv, phases)
    return 0


def in_full(error: BaseException) -> str:
    """Return what is known of an out-of-memory error: of a fit, what was alive and what would have helped."""
    if notes := getattr(error, "__notes__", None):
        return "\n".join(notes)
    return (
        f"out of memory{asked_for(error)}; give smaller batches (--data.batch_size) or shorter texts, end other "
        "programs on the device, or take another --device."
    )


LEAVING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that end a verb which trains nothing."""


def leave(number: int, frame: Any) -> None:
    """End with the status of a signal, but not at once: what is half written is removed."""
    sys.exit(128 + number)


def main() -> None:
    """Run the command `lit-sparse`; an error that the user can fix is one sentence and status 2."""
    phases = Phases.of_process()
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    before = {number: signal.getsignal(number) for number in LEAVING}
    if sys.argv[1:] and sys.argv[1] not in FIT_VERBS:  # which save first
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # nohup
                signal.signal(number, leave)
    try:
        with outlived():
            sys.exit(status_of(sys.argv[1:], phases))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def status_of(argv: Sequence[str], phases: Phases) -> int:
    """Run a command line; return its exit status, having told in a sentence what the user can mend."""
    try:
        return run(argv, phases)
    except Stopped as stopped:
        tell_once(str(stopped), "stopped")
        # Rank 0 has the run's status: Lightning kills it as soon as a rank that it started ends with another than 0.
        return 128 + stopped.number if rank_of_this() == 0 else 0
    except SIGTERMException:  # Lightning's, outside of training
        tell_once("SIGTERM ended it, and nothing was trained since the last checkpoint.", "stopped")
        return 128 + signal.SIGTERM if rank_of_this() == 0 else 0
    except Exception as error:
        told = understood(error)
        if told is None and not is_oom(error):
            raise
        if told is None:
            tell_once(in_full(error), "out of memory")
        else:
            tell_once(" ".join(str(told).split()))
        return 2


if __name__ == "__main__":
    main()
