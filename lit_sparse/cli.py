"""The command `lit-sparse`: LightningCLI's subcommands, and plain functions as further ones."""

import argparse
import dataclasses
import inspect
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import jsonargparse
import lightning as L
import torch
import yaml
from jsonargparse import auto_cli, set_parsing_settings
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.constants import default_pg_timeout

from lit_sparse import usage
from lit_sparse.bench import bench, take
from lit_sparse.bench import parser as bench_parser
from lit_sparse.callbacks.checkpointing import CHECKPOINT_STEPS, Stopped
from lit_sparse.callbacks.logs import RunCSV, RunTensorBoard
from lit_sparse.callbacks.out_of_memory import asked_for, is_oom
from lit_sparse.callbacks.rank_watch import RankWatch, rank_of_this, tell_once
from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.configs import (
    STACKED,
    STACKING,
    Parser,
    as_plain,
    find_configs,
    flat,
    listed,
    read_documents,
    read_whole_numbers_first,
    without_twins,
)
from lit_sparse.errors import BadInput
from lit_sparse.export import generate
from lit_sparse.export.folder import export
from lit_sparse.modules.sharding import TIMEOUT
from lit_sparse.plan import CARDS, Planned, card_of, plan
from lit_sparse.plan import parser as plan_parser
from lit_sparse.refusals import check_trainer_words, explain, understood
from lit_sparse.runs import (
    TASKS,
    check_name,
    folder_of,
    last_checkpoint,
    make_folder,
    read_config,
    remove_unused,
    task_class,
)
from lit_sparse.screen import shown, tidy
from lit_sparse.shipped import listing
from lit_sparse.whole import replace_text
from lit_sparse.words import find_data, named_task, switched_on, unmeasured
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.profiler import Plan
from lit_sparse_profiling.report import report
from lit_sparse_profiling.run_folders import next_folder

RUNS = "runs"
COMMAND_LINE = "command line"
"""Phase of parsing, and of making the module, the data and the trainer that are asked for."""
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


class CLI(LightningCLI):
    """LightningCLI with a folder and a record for each run, small checkpoints, and resuming by name.

    Attributes:
        command: The command line as it was given, for the record.
        phases: What it does before the fit.
    """

    command: str | None = None
    phases: Phases

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        read_whole_numbers_first(L.Trainer)
        return super().init_parser(parser_mode=STACKING, exit_on_error=False, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the verb of this command alone: the parser of each takes a second."""
        return {verb: skipped for verb, skipped in LightningCLI.subcommands().items() if verb == sys.argv[1]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except jsonargparse.ArgumentError as error:
            verb = self._parser(sys.argv[1])
            raise BadInput(explain(str(error), verb._option_string_actions, sys.argv[1])) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--task",
            type=Literal[*TASKS],  # pyright: ignore[reportInvalidTypeForm]
            default=self._model_class.__name__,
            help="Predict the next token, or classify texts; decides the keys of `model`.",
        )
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Name of the run; its folder is <name>-<n>. Default: the names of the method YAMLs.",
        )
        parser.add_argument(
            "--profile",
            type=Plan,
            default=Plan(examine=None, profiled=None),
            help="The training steps that are measured, and how; false: none, nor samples unless a number is given.",
        )
        parser.add_argument(
            "--samples",
            type=int | None,
            default=None,
            help="Number of held-out questions answered before and after training; 0: none. Null: two, if they and "
            "`profile` take at most a tenth of the fit.",
        )
        parser.add_argument(
            "--checkpoint_steps",
            type=int,
            default=CHECKPOINT_STEPS,
            help="Optimizer steps between saves of the last checkpoint; 0 keeps none.",
        )
        parser.set_defaults({"data": {"class_path": "lit_sparse.data.Embedded"}})
        parser.link_arguments("model.base", "data.init_args.tokenizer")

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        check_trainer_words(config.trainer)
        for key in ("samples", "checkpoint_steps"):
            if (config[key] or 0) < 0:
                raise BadInput(f"{key} is {config[key]}; it must be 0 or more.")
        for key in ("callbacks", "logger"):
            config.trainer[key] = without_twins(as_plain(config.trainer[key]))
        self.folder: Path | None = None
        self.root = Path(config.trainer.default_root_dir)
        if config.trainer.max_epochs is None:
            config.trainer.max_epochs = 1 if config.trainer.max_steps == -1 else -1
        config.run = config.run or self._run_name(config)
        check_name(config.run)
        if config.ckpt_path is not None:
            config.ckpt_path = str(self._checkpoint(config))
        if self.subcommand != "fit":
            return
        if config.samples is None and config.profile.examine is False and config.profile.profiled == 0:
            config.samples = 0
        self.turns = config.profile.turns  # belongs to this process, not to the configuration saved with the run
        config.profile.turns = None
        if config.ckpt_path is not None:
            self.folder = folder_of(Path(config.ckpt_path), self.root)
            if self.folder is not None:
                self._tell_differences(self.folder / "config.yaml")

    def _run_name(self, config: Any) -> str:
        paths = [Path(str(path)) for path in config.config or [] if path is not None]  # None: given as text
        methods = [path.stem for path in paths if path.parent.name not in STACKED]
        return "+".join(methods) or "run"

    def _checkpoint(self, config: Any) -> Path:
        """Return the file that --ckpt_path names.

        Raises:
            BadInput: if there is none.
        """
        if config.ckpt_path == "last":
            return last_checkpoint(self.root, config.run)
        if not Path(config.ckpt_path).is_file() and "://" not in config.ckpt_path:
            raise BadInput(
                f"--ckpt_path {config.ckpt_path} was asked for, but there is no such file; give a checkpoint's path, "
                f"or last for the last one of the runs called {config.run}."
            )
        return config.ckpt_path

    def _tell_differences(self, before: Path) -> None:
        """Print the keys that differ from the configuration that the run started with: those given now win."""
        then, now = flat(read_config(before)), flat(yaml.safe_load(self._dumped()))
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key) and key.partition(".")[0] in ("task", "model", "data", "trainer"):
                rank_zero_info(f"Resuming with {key} = {now.get(key)!r}; the run had {then.get(key)!r}.")

    def _dumped(self) -> str:
        """Return the configuration as it is saved with the run: without a checkpoint, which a new run does not have."""
        config = self.config[str(self.subcommand)].clone()
        config.ckpt_path = None
        return self._parser(str(self.subcommand)).dump(config, skip_unset=False)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        if self.subcommand != "fit" or config.fast_dev_run:  # which leave no run
            return super().instantiate_trainer(logger=config.logger or False, **shown(config, config.callbacks or []))
        if self.folder is None:
            name = self.config[str(self.subcommand)].run
            self.folder = make_folder(self.root, name) or next_folder(self.root, name)
        try:
            return self._recording_trainer(config, self.folder)
        except BaseException:
            remove_unused(self.folder)
            raise

    def _recording_trainer(self, config: Any, folder: Path) -> L.Trainer:
        """Return a trainer that leaves a run in `folder`, and nothing elsewhere."""
        plan, samples, steps = (self._get(self.config_init, key) for key in ("profile", "samples", "checkpoint_steps"))
        plan, text = dataclasses.replace(plan, turns=self.turns), self._dumped()
        if config.profiler == "pytorch" or isinstance(config.profiler, PyTorchProfiler):
            rank_zero_info(
                "trainer.profiler is torch's, of which one can run: no steps are examined or profiled beside."
            )
            plan = dataclasses.replace(plan, examine=False, profiled=0)
        recorder = Recorder(folder, plan, yaml.safe_load(text), samples, steps, text, self.command, self.phases)
        callbacks = [*listed(config.callbacks), recorder, RankWatch()]
        more = any(isinstance(callback, Checkpoint) for callback in callbacks)  # the recorder keeps last.ckpt itself
        own = [RunCSV(folder), RunTensorBoard(folder)]
        trainer = super().instantiate_trainer(
            logger=False if config.logger is False else own + listed(config.logger),
            **shown(config, callbacks),
            enable_checkpointing=more,
            default_root_dir=str(folder),
        )
        recorder.listen(trainer)
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and strategy._timeout == default_pg_timeout:  # torch's is half an hour
            strategy._timeout = TIMEOUT
        return trainer

    def fit(self, **arguments: Any) -> None:
        """Train; a run that is refused before training has moved leaves nothing."""
        self.model.resume_from = arguments["ckpt_path"]
        start_fresh(self.trainer, arguments["ckpt_path"])
        self.phases.end(COMMAND_LINE)
        try:
            self.trainer.fit(**{**arguments, "weights_only": True})  # a checkpoint is data, and runs no code
        finally:
            if self.folder is not None:
                remove_unused(self.folder)
        tell_end(self.trainer)

    def validate(self, **arguments: Any) -> None:
        """Score the held-out rows.

        Raises:
            BadInput: if there are none.
        """
        start_fresh(self.trainer, arguments["ckpt_path"])
        if not scores(self.trainer.validate, arguments):
            raise BadInput("there is nothing to validate: no row is held out; set data.heldout.")

    def test(self, **arguments: Any) -> None:
        """Answer the held-out questions, or score the held-out rows where they are no questions with known answers.

        Raises:
            BadInput: if there are none.
        """
        start_fresh(self.trainer, arguments["ckpt_path"])
        if not scores(self.trainer.test, arguments):
            rank_zero_info(
                "No held-out row is a choice, or has an answer that ends in #### and a number: rows are scored instead."
            )
            self.validate(**arguments)


CLIKind = TypeVar("CLIKind", bound=CLI)


class Planning(CLI):
    """The command `fit` as far as its module: nothing is loaded, and no trainer made."""

    def before_instantiate_classes(self) -> None:
        """Leave out what belongs to a run: its folder, its name, its checkpoint."""

    def instantiate_trainer(self, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def planned(self) -> Planned:
        """Return the module, and what else decides its memory."""
        config, data = self.config["fit"], self.datamodule
        trainer = config.trainer
        devices = int(trainer.devices) if str(trainer.devices).isdigit() else 1
        return Planned(
            module=self.model,  # pyright: ignore[reportArgumentType]
            batch_size=getattr(data, "batch_size", 1),
            length=getattr(data, "max_length", 512),
            accumulate=trainer.accumulate_grad_batches,
            clip=trainer.gradient_clip_val,
            ranks=max(1, devices) * trainer.num_nodes,
            sharded="fsdp" in str(trainer.strategy).lower(),
        )


def select_parser() -> argparse.ArgumentParser:
    """Return the command line of `select`; options that it does not know are keys of `fit`."""
    parser = argparse.ArgumentParser(
        prog="lit-sparse select",
        description="Choose what a method trains (SMT's blocks) as fit does, but train nothing: write it to a file.",
        epilog="Any option of `lit-sparse fit` describes the run, as in --config smt.yaml --trainer.devices 2.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", default="selection.json", help="the file to write (default selection.json)")
    return parser


def select(argv: Sequence[str]) -> int:
    """Run the verb `select`; return its exit status.

    Raises:
        BadInput: if no method of the run selects, or the file is there already.
    """
    own, passed = take(argv, ("--output", "-h", "--help"))
    Selecting.output, Selecting.argv = Path(select_parser().parse_args(own).output), ["select", *argv]
    start(Selecting, ["fit", *passed])
    return 0


class Selecting(CLI):
    """The command `fit` up to its first step: what a method has selected by then goes to a file.

    Attributes:
        output: The file.
        argv: The words of the command, with which Lightning starts other ranks.
    """

    output: Path
    argv: Sequence[str]

    def before_instantiate_classes(self) -> None:
        config = self.config["fit"]
        if config.ckpt_path is not None:
            raise BadInput("select chooses anew, but --ckpt_path was given; leave it out.")
        if self.output.exists():
            raise BadInput(f"{self.output} is there already; give --output another name, or remove it.")
        config.trainer.max_steps, config.trainer.num_sanity_val_steps = 0, 0
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        sys.argv[1:] = self.argv
        self.folder = None
        return LightningCLI.instantiate_trainer(self, logger=False, callbacks=[RankWatch()], enable_checkpointing=False)

    def fit(self, **arguments: Any) -> None:
        selecting = [update for update in self.model.updates if update.selects]
        if len(selecting) != 1:
            raise BadInput(
                f"select writes what one method selects before training, and {self.model.updates.names} has "
                f"{len(selecting)} that do; give smt.yaml."
            )
        self.trainer.fit(**{**arguments, "weights_only": True})
        state = selecting[0].state_dict()
        if self.trainer.is_global_zero:
            write_selection(state, self.output)
            key = "--model.updates.blocks" if len(self.model.updates) == 1 else "blocks"
            print(f"Wrote {self.output}: fit with {key} {self.output} trains what it names.")


def write_selection(state: Mapping[str, Any], path: Path) -> None:
    """Write the state of a method that selects as JSON, in one rename.

    Raises:
        BadInput: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(json.dumps(state, default=torch.Tensor.tolist) + "\n", path)
    except OSError as error:
        raise BadInput(
            f"{path} could not be written ({error.strerror or error}); give --output another name."
        ) from error


class Parsers(CLI):
    """The command line as far as its parsers: nothing is parsed, and nothing made."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = {"subcommand": None}

    def verb_parser(self) -> LightningArgumentParser:
        """Return the parser of the verb that was given."""
        return next(iter(self._subcommand_parsers.values()))

    def _parse_ckpt_path(self) -> None:
        """Look for no checkpoint."""

    def _set_seed(self) -> None:
        """Draw nothing."""

    def before_instantiate_classes(self) -> None:
        """Make no run."""

    def instantiate_classes(self) -> None:
        """Make nothing."""


def scores(evaluate: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    """Evaluate; return whether there was anything to score."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Total length of `.*` across ranks is zero")
        return any(evaluate(**{**arguments, "weights_only": True}))  # a checkpoint is data, and runs no code


def start_fresh(trainer: L.Trainer, checkpoint: str | None) -> None:
    """Let no checkpoint mean none: Lightning looks for those of SLURM jobs and failed fits, which are of other runs."""
    if checkpoint is None:
        trainer._checkpoint_connector._user_managed = True


def tell_end(trainer: L.Trainer) -> None:
    """Say why a fit ended before it was to, or that there was nothing to do."""
    step, asked = trainer.global_step, trainer.max_steps
    recorder = next((callback for callback in listed_callbacks(trainer) if isinstance(callback, Recorder)), None)
    if recorder is not None and not recorder.moved:
        rank_zero_info(
            f"Nothing was left to do: the checkpoint is at step {step}, with max_steps {asked} and max_epochs "
            f"{trainer.max_epochs}; set one higher to train on. {recorder.folder} is as it was."
        )
    elif 0 < step < asked and trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs:
        rank_zero_info(
            f"The fit ended after step {step} of max_steps {asked}, since max_epochs is {trainer.max_epochs}; set "
            "--trainer.max_epochs=-1 for more."
        )


def listed_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """Return the callbacks of a trainer."""
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] - Lightning sets them in a function


def report_parser() -> argparse.ArgumentParser:
    """Return the command line of `report`."""
    parser = argparse.ArgumentParser(prog="lit-sparse report", description="Compare runs by their records.")
    parser.add_argument(
        "runs", nargs="+", help="run folders, folders of run folders, files of records, or results of PEFT's comparison"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write a page with figures, one HTML file, for offline use"
    )
    parser.add_argument("--card", metavar="GB", help="your card, for the page (default: the device of the runs)")
    parser.add_argument(
        "--peft_results", metavar="FOLDER", help="write the runs as results of PEFT's method comparison"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--check", metavar="FILE", help="a baseline: no run may have become worse than in there")
    parser.add_argument("--tolerance", default="5%", help="by how much memory and speed may be worse (default 5%%)")
    parser.add_argument("--save_baseline", metavar="FILE", help="keep these runs' figures as a baseline")
    return parser


def compare(argv: Sequence[str]) -> int:
    """Run the verb `report`; return its exit status, 1 if a baseline's gate failed.

    Raises:
        BadInput: if a path has no record, the card is not known, a baseline cannot be read, or a file cannot be
            written.
    """
    asked = report_parser().parse_args(argv)
    asked.card = card_of(asked.card)
    try:
        return report(**vars(asked), cards=CARDS, command=shlex.join(["lit-sparse", "report", *argv]))
    except ValueError as error:
        raise BadInput(str(error)) from error


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
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
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
        print(help_of([word for word in argv if word not in asked], usage.LONG in asked))
        return 0
    start(CLI, argv, phases)
    return 0


def help_of(argv: Sequence[str], long: bool) -> str:
    """Return the keys of a verb of LightningCLI: those that people set, or all."""
    parser = start(Parsers, argv).verb_parser()
    if long:
        return usage.long_help(parser)
    named = [word.removeprefix("--data=") for word in sys.argv if word.startswith("--data=")]
    documents = read_documents(find_configs(argv)).values()
    return usage.short_help(parser, argv[0], documents, named[-1] if named else "")


def make_planned(argv: Sequence[str]) -> Planned:
    """Return what `fit` with the options `argv` would train."""
    with quiet():
        return start(Planning, ["fit", *argv]).planned()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's line on the seed from the screen."""
    log = logging.getLogger("lightning.fabric.utilities.seed")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def start(cli: type[CLIKind], argv: Sequence[str], phases: Phases | None = None) -> CLIKind:
    """Run a command line of LightningCLI's subcommands, and return it. `phases` are those before it."""
    CLI.command, CLI.phases = shlex.join(["lit-sparse", *argv]), phases or Phases()
    CLI.phases.begin(COMMAND_LINE)
    words = unmeasured(find_configs(argv))
    task = named_task(words, read_documents(words))
    sys.argv[1:] = find_data(words, task)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where users have classes of their own
    return cli(
        task_class(task),
        L.LightningDataModule,
        subclass_mode_data=True,
        trainer_defaults={
            "use_distributed_sampler": False,
            "num_sanity_val_steps": -1,
            "log_every_n_steps": 10,
            "default_root_dir": RUNS,
            "enable_model_summary": False,  # a line says how much is trained
        },
        auto_configure_optimizers=False,
        seed_everything_default=0,
        parser_class=Parser,
        save_config_callback=None,  # the recorder writes config.yaml, once training has moved
    )


def in_full(error: BaseException) -> str:
    """Return what is known of an out-of-memory error: of a fit, what was alive and what would have helped."""
    if notes := getattr(error, "__notes__", None):
        return "\n".join(notes)
    return (
        f"out of memory{asked_for(error)}; give smaller batches (--data.batch_size) or shorter texts, end other "
        "programs on the device, or take another --device."
    )


def main() -> None:
    """Run the command `lit-sparse`; an error that the user can fix is one sentence and status 2."""
    phases = Phases.of_process()
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    try:
        sys.exit(run(sys.argv[1:], phases))
    except Stopped as stopped:
        tell_once(str(stopped), "stopped")
        # Rank 0 has the run's status: Lightning kills it as soon as a rank that it started ends with another than 0.
        sys.exit(128 + stopped.number if rank_of_this() == 0 else 0)
    except Exception as error:
        told = understood(error)
        if told is None and not is_oom(error):
            raise
        if told is None:
            tell_once(in_full(error), "out of memory")
        else:
            tell_once(" ".join(str(told).split()))
        sys.exit(2)


if __name__ == "__main__":
    main()
