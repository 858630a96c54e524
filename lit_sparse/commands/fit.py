"""The verbs `fit`, `validate` and `test`: LightningCLI with a folder and a record for each run."""

import dataclasses
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import jsonargparse
import lightning as L
import yaml
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.constants import default_pg_timeout

from lit_sparse.callbacks.checkpointing import CHECKPOINT_STEPS
from lit_sparse.callbacks.logs import RunCSV, RunTensorBoard
from lit_sparse.callbacks.rank_watch import RankWatch
from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.commands.configs import (
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
from lit_sparse.commands.screen import shown
from lit_sparse.commands.words import find_data, named_task, unmeasured
from lit_sparse.data import TokenData
from lit_sparse.errors import BadInput
from lit_sparse.export.replay import go_on_from
from lit_sparse.export.seedlog import SeedLog
from lit_sparse.modules.sharding import TIMEOUT
from lit_sparse.refusals import check_trainer_words, explain
from lit_sparse.runs import (
    TASKS,
    check_name,
    check_root,
    folder_of,
    last_checkpoint,
    make_folder,
    name_of,
    own_checkpoint,
    read_config,
    remove_unused,
    task_class,
)
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.run_folders import next_folder
from lit_sparse_profiling.step_plan import Plan

RUNS = "runs"
COMMAND_LINE = "command line"
"""Phase of parsing, and of making the module, the data and the trainer that are asked for."""


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

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint: who forges one would choose classes, and replace what was asked for."""

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
            default=Plan(examine=None, profiled=None, predict=None),
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
        config.trainer.plugins, config.model.updates = map(
            without_twins, (config.trainer.plugins, config.model.updates)
        )
        self.folder: Path | None = None
        check_root(config.trainer.default_root_dir)
        self.root = Path(config.trainer.default_root_dir)
        if config.trainer.max_epochs is None:
            config.trainer.max_epochs = 1 if config.trainer.max_steps == -1 else -1
        config.run = config.run or self._run_name(config)
        check_name(config.run)
        self.seed_log = self._seed_log(config.ckpt_path)
        if self.seed_log is not None:
            config.ckpt_path = None
        if config.ckpt_path is not None:
            config.ckpt_path = str(self._checkpoint(config))
        if self.subcommand != "fit":
            if config.ckpt_path is None:
                rank_zero_info("No --ckpt_path was given, so that the base itself is scored.")
            return
        if config.samples is None and config.profile.examine is False and config.profile.profiled == 0:
            config.samples = 0
        self.turns = config.profile.turns  # belongs to this process, not to the configuration saved with the run
        config.profile.turns = None
        if config.ckpt_path is not None:
            self.folder = folder_of(Path(config.ckpt_path), self.root)
            if self.folder is not None:
                config.run = name_of(self.folder, self.root)  # whatever this command would call a new one
                self._tell_differences(self.folder / "config.yaml")

    def _run_name(self, config: Any) -> str:
        paths = [Path(str(path)) for path in config.config or [] if path is not None]  # None: given as text
        methods = [path.stem for path in paths if path.parent.name not in STACKED]
        return "+".join(methods) or "run"

    def _seed_log(self, path: str | None) -> SeedLog | None:
        """Return the seed log at `path`, from which a fit goes on as from a checkpoint; None for other files.

        Raises:
            BadInput: for other exports, and for other verbs.
        """
        if path is None or Path(path).suffix != ".safetensors":
            return None
        if self.subcommand != "fit":
            raise BadInput(
                f"--ckpt_path is {path}, an export and no checkpoint; fit goes on from a seed log, and "
                f"{self.subcommand} takes checkpoints/last.ckpt of a run."
            )
        return SeedLog.load(path)

    def _checkpoint(self, config: Any) -> Path:
        """Return the file that --ckpt_path names.

        Raises:
            BadInput: if there is none.
        """
        if config.ckpt_path == "last":
            return own_checkpoint(config.config or [], self.root) or last_checkpoint(self.root, config.run)
        if self.subcommand == "fit" and "://" in config.ckpt_path:
            raise BadInput(
                f"--ckpt_path {config.ckpt_path} is a URL, and a fit goes on from a file; copy it here first."
            )
        if not Path(config.ckpt_path).is_file() and "://" not in config.ckpt_path:
            raise BadInput(
                f"--ckpt_path {config.ckpt_path} was asked for, but there is no such file; give a checkpoint's path, "
                f"or last for the last one of the runs called {config.run}."
            )
        return config.ckpt_path

    def _tell_differences(self, before: Path) -> None:
        """Print the keys that differ from the configuration that the run started with: those given now win."""
        then, now = flat(read_config(before)), flat(yaml.safe_load(self._dumped()))
        keys = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
        for key in keys:
            if key.partition(".")[0] in ("task", "model", "data", "trainer"):
                kept = " What it has chosen stays." if key.startswith("model.updates") else ""
                rank_zero_info(f"Resuming with {key} = {now.get(key)!r}; the run had {then.get(key)!r}.{kept}")
        if any(key.startswith("data.") for key in keys):
            rank_zero_info(f"--config {before} instead of the other --config and --data resumes on the run's own data.")

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
            check_trains(config)
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
        if samples is not None and isinstance(self.datamodule, TokenData):
            self.datamodule.num_samples = max(self.datamodule.num_samples, samples)
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
        in_order: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        in_order.sort(key=lambda one: not isinstance(one, Timer))  # the recorder must see that time is up
        recorder.listen(trainer)
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and strategy._timeout == default_pg_timeout:  # torch's is half an hour
            strategy._timeout = TIMEOUT
        return trainer

    def fit(self, **arguments: Any) -> None:
        """Train; a run that is refused before training has moved leaves nothing."""
        self.model.resume_from = arguments["ckpt_path"]
        self.model.take_earlier_steps = None if self.seed_log is None else partial(go_on_from, self.seed_log)
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


def scores(evaluate: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    """Evaluate; return whether there was anything to score."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Total length of `.*` across ranks is zero")
        return any(evaluate(**{**arguments, "weights_only": True}))  # a checkpoint is data, and runs no code


def check_trains(trainer: Any) -> None:
    """Refuse a new run whose limits leave it nothing to train.

    Raises:
        BadInput: naming the limit.
    """
    for key in ("max_steps", "max_epochs"):
        if trainer[key] == 0:
            raise BadInput(
                f"trainer.{key} is 0, so that a new run has nothing to train; give a number from 1 on, or -1."
            )


def start_fresh(trainer: L.Trainer, checkpoint: str | None) -> None:
    """Let no checkpoint mean none: Lightning looks for those of SLURM jobs and failed fits, which are of other runs."""
    if checkpoint is None:
        trainer._checkpoint_connector._user_managed = True


def tell_end(trainer: L.Trainer) -> None:
    """Say why a fit ended before it was to, or that there was nothing to do."""
    step, asked = trainer.global_step, trainer.max_steps
    recorder = next((callback for callback in listed_callbacks(trainer) if isinstance(callback, Recorder)), None)
    timer = next((callback for callback in listed_callbacks(trainer) if isinstance(callback, Timer)), None)
    if recorder is not None and not recorder.moved and timer is not None and timer.time_remaining() == 0:
        rank_zero_info(
            f"Nothing was done: the time limit is spent by the {timer.time_elapsed():.0f} s up to the checkpoint at "
            f"step {step}; set --trainer.max_time higher to train on. {recorder.folder} is as it was."
        )
    elif recorder is not None and not recorder.moved:
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
