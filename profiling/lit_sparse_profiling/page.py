"""One page of several runs: figures, a table, comparisons. It is one file, opens offline and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from lit_sparse_profiling import utilization
from lit_sparse_profiling.documents import printable, spell_nonfinite
from lit_sparse_profiling.drafts import begins, check_replaceable, replace_text
from lit_sparse_profiling.drawing import device_name, one_line
from lit_sparse_profiling.figures import ACROSS
from lit_sparse_profiling.figures_of_one import OF_ONE
from lit_sparse_profiling.gate import IRRELEVANT, flat
from lit_sparse_profiling.measures import GIB, MEASURES, context_gib, loss_name
from lit_sparse_profiling.memory_figures import Cards
from lit_sparse_profiling.reconcile import findings, format_bytes, reconcile
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import Row, Runs, check_readable, grouped, run_name, without

TEMPLATE = "page.html"
TITLE = "<title>lit-sparse report: "
"""Begins the title of every page, by which an earlier one is known."""
NO_MODEL = "unknown model"
WIDEST = 300
"""Characters of a setting that the page shows."""


def write_page(runs: Runs, path: Path, cards: Mapping[int, int], own: int | None = None, command: str = "") -> None:
    """Write the page of these runs to `path`, whole or not at all.

    Args:
        runs: Records with their files.
        path: File to write.
        cards: MiB by the GB under which a card is sold, for lines in the figure of memory.
        own: GB of the user's own card, one of `cards`; by default, the device of the records.
        command: Command line that makes the page, for its head.

    Raises:
        ValueError: if no record can be read, the file cannot be written, or another kind of file is there.
    """
    check_readable(runs, "page")
    check_replaceable(path, "page", lambda file: begins(file, TITLE))
    document = render(runs, cards, own, command)
    try:
        replace_text(path, document)
    except OSError as error:
        raise ValueError(
            f"The page could not be written to {path} ({error.strerror or error}); name a file in a folder that exists "
            "and can be written to."
        ) from error


def render(runs: Runs, cards: Mapping[int, int], own: int | None = None, command: str = "") -> str:
    """Return the page's HTML."""
    # Imported here, since they take a second that no other verb should.
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    rows = [row for row in grouped(runs) if row.records]
    sizes = Cards(cards, (f"card of {own} GB", cards[own] * 2**20) if own is not None else Cards.of(rows))
    models = {
        model: [row for row in rows if model_name(row) == model] for model in dict.fromkeys(map(model_name, rows))
    }
    readable = [(file, record) for file, record in runs if isinstance(record, RunRecord)]
    text = files("lit_sparse_profiling").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["json"] = in_script
    plotly, code = get_plotlyjs(), script_of(text)
    return environment.from_string(text).render(
        plotly=plotly,
        policy=" ".join(map(digest, (plotly, code))),
        command=printable(command),
        created=datetime.now(UTC).isoformat(sep=" ", timespec="minutes").replace("+00:00", " UTC"),
        unreadable=[(printable(run_name(*one)), printable(str(one[1]))) for one in runs if isinstance(one[1], str)],
        table=cleaned(table_of(readable, rows, sizes)),
        models=[(model, cleaned(across(found, sizes))) for model, found in models.items()],
        runs=[cleaned(details_of(record)) for _, record in readable],
    )


# ---- what the page holds


def table_of(runs: Sequence[tuple[Path, RunRecord]], rows: Sequence[Row], cards: Cards) -> dict[str, Any]:
    """Return what the table, the choice and the comparison of two are made of."""
    places = {id(record): number for number, (_, record) in enumerate(runs)}
    settings = [flat(without(row.records[0].settings, IRRELEVANT)) for row in rows]
    keys = [
        key
        for key in dict.fromkeys(k for one in settings for k in one)
        if len({repr(s.get(key)) for s in settings}) > 1
    ]
    return {
        "measures": [{"key": m.key, "title": m.title, "better": m.better, "digits": m.digits} for m in MEASURES],
        "runs": [run_of(file, record) for file, record in runs],
        "rows": [
            {
                "label": one_line(row.label),
                "status": row.status,
                "model": model_name(row),
                "device": device_name(row),
                "loss": loss_name(row.records[0]),
                "context": max(context_gib(record) for record in row.records),
                "runs": [places[id(record)] for record in row.records],
                "values": {m.key: [m.median(row.records), *extremes(m.of(row.records))] for m in MEASURES},
                "settings": {key: short(one.get(key)) for key in keys},
                "pair": pair_of(row),
            }
            for row, one in zip(rows, settings, strict=True)
        ],
        "cards": [[gb, mib / 1024] for gb, mib in sorted(cards.sold.items())],
        "own": None if cards.own is None else [cards.own[0], cards.own[1] / GIB],
    }


def run_of(file: Path, record: RunRecord) -> dict[str, Any]:
    """Return a run's line of the table."""
    return {
        "run": record.name,
        "status": record.status,
        "model": NO_MODEL if record.model is None else record.model.base,
        "device": "" if record.device is None else record.device.name,
        **{measure.key: measure.value(record) for measure in MEASURES},
        "loss_name": loss_name(record) or "",
        "created": record.created,
        "command": record.command or "",
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "file": str(file),
        "reason": record.reason or "",
    }


def across(rows: Sequence[Row], cards: Cards) -> dict[str, Any]:
    """Return the figures that compare the rows of one model, and a line for each that has no data."""
    made = [(title, make(rows, cards), gives) for title, make, gives in ACROSS]
    return {
        "figures": [f.plotly() for _, f, _ in made if f],
        "missing": [[t, gives] for t, f, gives in made if f is None],
    }


def details_of(record: RunRecord) -> dict[str, Any]:
    """Return what is shown of a run alone."""
    made = [(title, make(record), gives) for title, make, gives in OF_ONE]
    told = [*findings(record), *utilization.findings(record), *record.notes]
    largest = [] if record.memory is None else record.memory.largest
    return {
        "lines": [[line.name, format_bytes(line.bytes), line.note, line.total] for line in reconcile(record)],
        "told": told,
        "largest": [
            [
                format_bytes(one.bytes),
                one.category,
                f"{one.dtype} {' x '.join(map(str, one.shape))}",
                one.module,
                one.line,
            ]
            for one in largest
        ],
        "settings": {key: short(value) for key, value in flat(record.settings).items() if value is not None},
        "figures": [figure.plotly() for _, figure, _ in made if figure],
        "missing": [[title, gives] for title, figure, gives in made if figure is None],
    }


def model_name(row: Row) -> str:
    """Return the model of a row's runs."""
    model = row.records[0].model
    return NO_MODEL if model is None else printable(model.base)


def extremes(values: Sequence[float]) -> list[float | None]:
    """Return the lowest and the highest value; None twice if there is none."""
    return [min(values, default=None), max(values, default=None)]


def pair_of(row: Row) -> dict[str, Any] | None:
    """Return the ratio of step times to another run's, measured with interleaved steps; of repetitions, the last."""
    pair = next((record.pair for record in reversed(row.records) if record.pair is not None), None)
    return (
        None if pair is None else {"against": pair.against, "median": pair.median, "low": pair.low, "high": pair.high}
    )


def short(value: Any) -> str:
    """Return a setting as text, cut."""
    text = value if isinstance(value, str) else json.dumps(spell_nonfinite(value), default=repr)
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


# ---- texts that records bring along


def cleaned(value: Any) -> Any:
    """Return nested values with printable texts."""
    if isinstance(value, dict):
        return {printable(str(key)): cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def in_script(value: Any) -> str:
    """Return JSON that ends no script element, whatever texts are in it; NaN and infinities are null."""
    text = json.dumps(finite(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def finite(value: Any) -> Any:
    """Return nested values with null for NaN and infinities, which no figure can show."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return (
        None if isinstance(value, float) and value - value != 0 else round(value, 9) if type(value) is float else value
    )


def script_of(template: str) -> str:
    """Return the page's own code, which the template holds between its last script tags."""
    return template.rpartition("<script>")[2].partition("</script>")[0]


def digest(script: str) -> str:
    """Return a script's hash, as the page's policy names it: no other script runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
