"""The parsers of `fit`, `validate` and `test` without a run: what `--help` and `--help_all` print, and completion."""

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lit_sparse.commands import usage
from lit_sparse.commands.configs import find_configs, read_documents
from lit_sparse.commands.fit import CLI, start


class Parsers(CLI):
    """The command line as far as its parsers: nothing is parsed, and nothing made."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = {"subcommand": None}

    def verb_parser(self) -> LightningArgumentParser:
        """Return the parser of the verb that was given."""
        return next(iter(self._subcommand_parsers.values()))

    def _set_seed(self) -> None:
        """Draw nothing."""

    def before_instantiate_classes(self) -> None:
        """Make no run."""

    def instantiate_classes(self) -> None:
        """Make nothing."""


def help_of(argv: Sequence[str], long: bool) -> str:
    """Return the keys of a verb of LightningCLI: those that people set, each in a line, or all."""
    parser = start(Parsers, argv).verb_parser()
    if long:
        return usage.long_help(parser)
    named = [word.removeprefix("--data=") for word in sys.argv if word.startswith("--data=")]
    documents = read_documents(find_configs(argv)).values()
    return usage.short_help(parser, argv[0], documents, named[-1] if named else "")
