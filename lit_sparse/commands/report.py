"""The verb `report`: runs beside each other, by their records."""

import argparse
import shlex
from collections.abc import Sequence

from lit_sparse.commands.plan import CARDS, card_of
from lit_sparse.errors import BadInput
from lit_sparse_profiling.report import report


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
        BadInput: if a path has no record, none can be read, the card is not known, a baseline cannot be read, or a file
            cannot be written.
    """
    asked = report_parser().parse_args(argv)
    asked.card = card_of(asked.card)
    try:
        return report(**vars(asked), cards=CARDS, command=shlex.join(["lit-sparse", "report", *argv]))
    except ValueError as error:
        raise BadInput(str(error)) from error
