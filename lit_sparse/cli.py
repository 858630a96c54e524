"""The verbs of `lit-sparse`: LightningCLI's own, and plain functions beside them."""

import argparse
import dataclasses
import inspect
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import lightning as L
import yaml
from jsonargparse import auto_cli, set_parsing_settings
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

import lit_sparse.data
import lit_sparse.strategies
from lit_sparse.bench import bench
from lit_sparse.callbacks.checkpointing import CHECKPOINT_STEPS
from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.configs import STACKED, find_configs, methods
from lit_sparse.errors import BadInput
from lit_sparse.export.folder import export
from lit_sparse.export.generate import generate
from lit_sparse.runs import TASKS, last_checkpoint, task_class
from lit_sparse_profiling.profiler import Plan
from lit_sparse_profiling.report import report
from lit_sparse_profiling.run_folders import next_folder

RUNS = "runs"
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
"""Warnings with which our dependencies address one another: there is nothing in them that a user could act on."""


class CLI(LightningCLI):
    """LightningCLI with a folder for each run, a record, small checkpoints, and resuming by name."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(parser_mode="omegaconf", exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--task",
            type=Literal[*TASKS],  # pyright: ignore[reportInvalidTypeForm]
            default=self._model_class.__name__,
            help="What is learned: to predict the next token, or to classify texts; decides the keys of `model`.",
        )
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Name of the run; its folder gets a number too. Default: the names of the method YAMLs.",
        )
        parser.add_argument("--profile", type=Plan, default=Plan(), help="Which training steps are measured, and how.")
        parser.add_argument("--samples", type=int, default=2, help="Held-out questions answered before and after.")
        parser.add_argument(
            "--checkpoint_steps",
            type=int,
            default=CHECKPOINT_STEPS,
            help="Optimizer steps from one last checkpoint to the next; 0 keeps none.",
        )
        parser.set_defaults({"data": {"class_path": "lit_sparse.data.Embedded"}})
        parser.link_arguments("model.base", "data.init_args.tokenizer")

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        self.folder: Path | None = None
        self.new_folder = False
        if self.subcommand != "fit":
            return
        self.turns = config.profile.turns  # of this process: no part of the configuration that the run keeps
        config.profile.turns = None
        root, name = Path(config.trainer.default_root_dir), config.run or self._run_name(config)
        if config.ckpt_path == "last":
            config.ckpt_path = str(last_checkpoint(root, name))
        if config.ckpt_path is None:
            self.folder, self.new_folder = next_folder(root, name), True
        else:
            self.folder = Path(config.ckpt_path).parents[1]
            self._tell_differences(self.folder / "config.yaml")

    def _run_name(self, config: Any) -> str:
        paths = [Path(str(path)) for path in config.config or []]
        methods = [path.stem for path in paths if path.parent.name not in STACKED]
        return "+".join(methods) or "run"

    def _tell_differences(self, before: Path) -> None:
        """Print what this configuration changes of the one that the run started with: the YAML given now wins."""
        if not before.is_file():
            return
        then, now = flat(yaml.safe_load(before.read_text())), flat(self._dumped())
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key) and key.partition(".")[0] in ("task", "model", "data", "trainer"):
                rank_zero_info(f"Resuming with {key} = {now.get(key)!r}; the run had {then.get(key)!r}.")

    def _dumped(self) -> dict[str, Any]:
        """The configuration as it is saved with the run."""
        subcommand = str(self.subcommand)
        return yaml.safe_load(self._parser(subcommand).dump(self.config[subcommand], skip_none=False))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        if self.folder is None:
            self.save_config_callback = None  # it would write into the runs' root
            return super().instantiate_trainer(logger=config.logger or False)
        plan, samples, steps = (self._get(self.config_init, key) for key in ("profile", "samples", "checkpoint_steps"))
        plan = dataclasses.replace(plan, turns=self.turns)
        recorder = Recorder(self.folder, plan, self._dumped(), samples, steps)
        callbacks = [*(config.callbacks or []), recorder]
        more = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)  # beside the recorder's last one
        loggers = self._loggers(config.logger)
        return super().instantiate_trainer(logger=loggers, callbacks=callbacks, enable_checkpointing=more)

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        """CSV and TensorBoard files in the run's folder, and the loggers of the configuration beside them."""
        assert self.folder is not None
        if configured is False:
            return False
        own: list[Logger] = [
            CSVLogger(self.folder.parent, name="", version=self.folder.name),
            TensorBoardLogger(self.folder, name="", version="tensorboard"),
        ]
        more = configured if isinstance(configured, list) else [configured] if isinstance(configured, Logger) else []
        return own + more

    def fit(self, **arguments: Any) -> None:
        """Train; a run that is refused before its first checkpoint leaves no folder behind."""
        assert self.folder is not None
        self.model.resume_from = arguments["ckpt_path"]
        if not self.new_folder:
            keep_metrics(self.folder, self.trainer.loggers)
        try:
            self.trainer.fit(**arguments)
        except BadInput:
            if self.new_folder and not any(self.folder.glob("checkpoints/*")):
                remove_run(self.folder)
            raise


@rank_zero_only
def remove_run(folder: Path) -> None:
    """Remove a run's folder; only the first process knows which it is, the others count on from it."""
    shutil.rmtree(folder, ignore_errors=True)


@rank_zero_only
def keep_metrics(folder: Path, loggers: Sequence[Logger]) -> None:
    """Set the metrics of a run that is to be resumed aside, since the CSV logger starts its file anew."""
    metrics = folder / "metrics.csv"
    if metrics.is_file():
        metrics.rename(folder / f"metrics-{len(list(folder.glob('metrics*.csv')))}.csv")
    with warnings.catch_warnings():  # it announces that it will delete what was just set aside
        warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
        for logger in loggers:
            _ = logger.experiment  # pyright: ignore[reportAttributeAccessIssue]


def named_task(argv: Sequence[str]) -> str | None:
    """The task that `argv` or its YAMLs name, the last one if several do: it decides which keys there are."""
    name = None
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        option, given, value = word.partition("=")
        value = value if given else after
        if option == "--task":
            name = value
        elif option in ("-c", "--config") and Path(value).is_file():
            name = task_in(Path(value)) or name
    return name


def task_in(path: Path) -> str | None:
    """The key `task` of a YAML; what else is wrong with the file, the parser says."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        return None
    return document.get("task") if isinstance(document, dict) else None


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as one of dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value for name, child in tree.items() for key, value in flat(child, f"{prefix}.{name}".lstrip(".")).items()
    }


def list_strategies() -> None:
    """List the update strategies with their claims and a line each, and the YAMLs that come with them."""
    from rich.console import Console
    from rich.table import Table

    table = Table("class", "claims", "what it does")
    for name in lit_sparse.strategies.__all__:
        kind = getattr(lit_sparse.strategies, name)
        if (
            isinstance(kind, type)
            and issubclass(kind, lit_sparse.strategies.UpdateStrategy)
            and kind is not lit_sparse.strategies.UpdateStrategy
        ):
            table.add_row(name, ", ".join(sorted(kind.claims)) or "-", (kind.__doc__ or "").strip().splitlines()[0])
    console = Console()
    console.print(table)
    console.print("YAMLs: " + ", ".join(path.name for path in methods()))


def switched_on(verb: Callable[..., Any], argv: Sequence[str]) -> list[str]:
    """`argv` with `--name` written out as `--name=true` where the verb's parameter is a bool and no value follows."""
    switches = {
        f"--{name}" for name, parameter in inspect.signature(verb).parameters.items() if parameter.annotation is bool
    }
    following = [*argv, ""][1:]
    bare = [word in switches and after not in ("true", "false") for word, after in zip(argv, following, strict=True)]
    return [f"{word}=true" if alone else word for word, alone in zip(argv, bare, strict=True)]


def report_parser() -> argparse.ArgumentParser:
    """The command line of `report`."""
    parser = argparse.ArgumentParser(prog="lit-sparse report", description="Compare runs by their records.")
    parser.add_argument("runs", nargs="+", help="run folders, folders of run folders, or files of records")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--check", metavar="FILE", help="a baseline: no run may have become worse than in there")
    parser.add_argument("--tolerance", default="5%", help="by how much memory and speed may be worse (default 5%%)")
    parser.add_argument("--save_baseline", metavar="FILE", help="keep these runs' figures as a baseline")
    return parser


def compare(argv: Sequence[str]) -> int:
    """The verb `report`: its exit status, 1 if a baseline's gate failed.

    Raises:
        BadInput: if a path has no record, or a baseline cannot be read.
    """
    try:
        return report(**vars(report_parser().parse_args(argv)))
    except ValueError as error:
        raise BadInput(str(error)) from error


VERBS: dict[str, Callable[..., Any]] = {"export": export, "generate": generate, "list": list_strategies}
"""Verbs whose parameters are their options."""
RUN_VERBS: dict[str, Callable[[Sequence[str]], int]] = {"bench": bench, "report": compare}
"""Verbs that take any number of names, and have an exit status."""


def run(argv: Sequence[str]) -> int:
    """Do what `argv` (without the program's name) says; the exit status."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    if argv and argv[0] in RUN_VERBS:
        return RUN_VERBS[argv[0]](argv[1:])
    if argv and argv[0] in VERBS:
        verb = VERBS[argv[0]]
        auto_cli(verb, args=switched_on(verb, argv[1:]), exit_on_error=False)
        return 0
    sys.argv[1:] = find_configs(argv)
    CLI(
        task_class(named_task(sys.argv[1:])),
        L.LightningDataModule,
        subclass_mode_data=True,
        trainer_defaults={
            "max_epochs": 1,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": -1,
            "log_every_n_steps": 10,
            "default_root_dir": RUNS,
        },
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )
    return 0


def main() -> None:
    """The command `lit-sparse`: one sentence and status 2 for what the user must act on."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    try:
        sys.exit(run(sys.argv[1:]))
    except (ValueError, jsonargparse.ArgumentError) as error:
        told = bad_input(error) or error
        if not isinstance(told, BadInput | jsonargparse.ArgumentError):
            raise
        sentence = " ".join(str(told).split())
        print(f"lit-sparse: {sentence}", file=sys.stderr)
        sys.exit(2)


def bad_input(error: BaseException) -> BadInput | None:
    """The `BadInput` that `error` is or was raised from: jsonargparse wraps what the classes that it makes raise."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, BadInput):
        cause = cause.__cause__
    return cause


if __name__ == "__main__":
    main()
