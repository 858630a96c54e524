"""Make the model card of an export (README.md, with the Hub's metadata) from the record of its run alone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import ModelCardData, metadata_load
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from lit_sparse.data.sources import READERS
from lit_sparse.demo import DEMO, MINILM
from lit_sparse.errors import BadInput
from lit_sparse.export.compatibility import OLDEST, READ_BY_OLDEST
from lit_sparse.modules import CausalLM, LitSparse
from lit_sparse.strategies import UpdateStrategy
from lit_sparse_profiling.documents import plain_markdown, printable
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import RECORD

HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
"""A name on the Hub: `owner/name`, or `name` for the oldest models."""

TAG = "lit-sparse"
"""The Hub's tag of all exports."""

LIBRARIES = {"hf": "transformers", "adapter": "peft", "delta": "lit-sparse", "seedlog": "lit-sparse"}

OURS = "lit_sparse.strategies"
"""Where the methods of this project are imported from."""


def read_record(run: Path) -> RunRecord | None:
    """Return the record of the run in the folder `run`; None if it has none, as runs of another trainer may not.

    Raises:
        BadInput: if it cannot be read.
    """
    if not (run / RECORD).is_file():
        return None
    try:
        return RunRecord.read(run / RECORD)
    except ValueError as error:
        raise BadInput(str(error)) from error


def card(run: str, module: LitSparse, to: str, record: RunRecord | None, note: str = "") -> str:
    """Return the text of README.md for an export.

    Args:
        run: Name of the run.
        module: The run's module.
        to: `hf`, `delta`, `adapter` or `seedlog`.
        record: The run's record. What it lacks is left out.
        note: A sentence on the weights, such as the error of a cast.
    """
    sections = [
        f"---\n{metadata(module, to, record)}\n---",
        f"# {plain_markdown(run)}",
        about(module, to) + (f"\n\n{note}" if note else ""),
        "## How to load\n\n" + loading(module, to),
    ]
    if record is not None:
        sections += [text for text in (results(record), training(record)) if text]
    return "\n\n".join(sections) + "\n"


# ---- the Hub's metadata


def metadata(module: LitSparse, to: str, record: RunRecord | None) -> str:
    """Return the YAML that the Hub reads, without its frame."""
    base = module.base if on_hub(module.base) else None
    relation = {"hf": "finetune", "adapter": "adapter"}.get(to)
    fields: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": relation if base else None,
        "library_name": "lit-sparse" if to == "adapter" and own_loader(module) is not None else LIBRARIES[to],
        "pipeline_tag": "text-generation" if isinstance(module, CausalLM) else "text-classification",
        "tags": [TAG, *dict.fromkeys(type(update).__name__.lower() for update in module.updates)],
        "datasets": [data] if record is not None and (data := dataset(record)) is not None else None,
        **license_of(module.base),
    }
    return ModelCardData(**{key: value for key, value in fields.items() if value is not None}).to_yaml()


def on_hub(name: str) -> bool:
    """Return true if `name` is a name on the Hub and not a file, a folder or an embedded model."""
    elsewhere = name in (DEMO, MINILM) or name.endswith(".json") or Path(name).exists()
    return not elsewhere and bool(HUB_NAME.fullmatch(name))


def license_of(base: str) -> dict[str, str]:
    """Return the license that the model card of `base` names; one that the Hub does not list has a name and a link."""
    if Path(base).is_dir():
        found: str | Path | None = Path(base) / "README.md" if (Path(base) / "README.md").is_file() else None
    elif on_hub(base):
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = cached_file(base, "README.md", **quiet)  # pyright: ignore[reportArgumentType]
    else:
        found = None
    if found is None:
        return {}
    try:
        named = metadata_load(found) or {}
    except (ValueError, yaml.YAMLError):  # a README that is no model card names no license
        return {}
    return {key: str(named[key]) for key in ("license", "license_name", "license_link") if named.get(key)}


def dataset(record: RunRecord) -> str | None:
    """Return the name on the Hub of the training data, without its split; None if they come from elsewhere."""
    name = data_arguments(record).get("train")
    if not isinstance(name, str) or Path(name).suffix in READERS or Path(name).exists():
        return None
    name = name.partition(":")[0]
    return name if "/" in name and HUB_NAME.fullmatch(name) else None


def data_arguments(record: RunRecord) -> dict[str, Any]:
    """Return the arguments of the data module in the record's configuration; {} if it has none."""
    data = record.settings.get("data")
    return (data.get("init_args") or {}) if isinstance(data, dict) else {}


# ---- what it is, and how to load it


def about(module: LitSparse, to: str) -> str:
    """Return the paragraph that says what was made of which base."""
    methods = " and ".join(type(update).__name__ for update in module.updates)
    what = {
        "hf": "The whole model",
        "adapter": "An adapter",
        "delta": "The difference from its base",
        "seedlog": "The steps of a training, to be taken again on its base",
    }[to]
    if module.is_drawn:
        start, by = (
            f"`{module.base}` with random weights (seed {module.init_seed})",
            f" by {methods}" if methods else "",
        )
        return f"{what}: {start}, trained from scratch{by}, with lit-sparse."
    named = f"[{module.base}](https://huggingface.co/{module.base})" if on_hub(module.base) else f"`{module.base}`"
    return f"{what}: {named}, fine-tuned by {methods or 'full fine-tuning'}, with lit-sparse."


def loading(module: LitSparse, to: str) -> str:
    """Return the code that loads the export, and the versions that it needs."""
    auto = module.auto_class.__name__
    fetched, base = base_code(module, exact=to in ("delta", "seedlog"))
    importing, putting = "from peft import PeftModel", 'model = PeftModel.from_pretrained(base, "FOLDER")'
    if (own := own_loader(module)) is not None:
        name, home = type(own).__name__, type(own).__module__
        importing = f"from {OURS if home.startswith(OURS) else home} import {name}"
        putting = f'{name}.load("FOLDER", base)'
    code = {
        "hf": [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model = {auto}.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ],
        "adapter": [
            *fetched,
            importing,
            f"from transformers import {auto}",
            "",
            base,
            putting,
        ],
        "delta": [
            *fetched,
            "from lit_sparse.export.delta import Delta",
            f"from transformers import {auto}",
            "",
            base,
            'Delta.load("FILE").apply(base)',
        ],
        "seedlog": [
            *fetched,
            "from lit_sparse.export.seedlog import SeedLog",
            f"from transformers import {auto}",
            "",
            base,
            'SeedLog.load("FILE").apply(base)',
        ],
    }[to]
    file, ours = LIBRARIES[to] == "lit-sparse", own is not None and to == "adapter"
    folder = "`FOLDER` is this folder" + ("" if ours else ", or its name on the Hub")  # which `load` does not read
    where = "`FILE` is the path of the file" if file else folder
    least = "It needs lit-sparse" if file or ours else least_version(module.build().config)  # pyright: ignore
    return "```python\n" + "\n".join(code) + f"\n```\n\n{where}. {least}."


def base_code(module: LitSparse, exact: bool) -> tuple[list[str], str]:
    """Return the imports, beside that of the Auto class, and the line that load the base.

    Args:
        exact: Whether it has to be the run's to the bit: in its dtype where that was trained, and with its head, which
            transformers draws otherwise where a classifier's base has none.
    """
    auto, embedded = module.auto_class.__name__, module.base in (DEMO, MINILM)
    options = dict(module.config_options)
    if getattr(module, "pad_token", None) is not None:  # a decoder classifies at the last token before the padding
        options["pad_token_id"] = module.pad_token
    if module.is_drawn or (exact and options):
        how = [f"config_options={options!r}"] if options else []
        given = [auto, repr(module.base), str(module.frozen_dtype), repr(module.attention), *how]
        imports = ["import torch", "from lit_sparse.modules.loading import load_base"]
        seed = [f"seed={module.init_seed}"] if module.is_drawn else []
        return imports, f"base = load_base({', '.join([*given, *seed])})"
    given = f"resolve({module.base!r})" if embedded else repr(module.base)
    dtype = {} if not exact or module.updates.masters else {"dtype": str(module.frozen_dtype).removeprefix("torch.")}
    arguments = ", ".join([given, *(f"{name}={value!r}" for name, value in (options | dtype).items())])
    return ["from lit_sparse.demo import resolve"] if embedded else [], f"base = {auto}.from_pretrained({arguments})"


def own_loader(module: LitSparse) -> UpdateStrategy | None:
    """Return the strategy that loads an adapter of the run by a format of its own; None where PEFT loads it."""
    loaders = (update for update in module.updates if type(update).load.__func__ is not UpdateStrategy.load.__func__)
    return next(loaders, None)


def least_version(config: PreTrainedConfig) -> str:
    """Return the sentence on the oldest transformers that reads a model of this configuration as it was written."""
    kinds = {config.model_type, config.get_text_config().model_type}
    least = OLDEST if kinds <= READ_BY_OLDEST else transformers.__version__
    return f"It needs transformers >= {least}"


# ---- what the record says


def results(record: RunRecord) -> str:
    """Return the table of scores before and after, and of costs; "" if the record has neither."""
    before, after = (record.outcome.get(moment, {}) for moment in ("before", "after"))
    rows = [
        [plain_markdown(name.replace("_", " ")), *map(number, (before.get(name), after.get(name)))]
        for name in {**after, **before}
    ]
    scores = ["| | before | after |", "| --- | --- | --- |", *("| " + " | ".join(row) + " |" for row in rows)]
    costs = [f"- {name}: {plain_markdown(value)}" for name, value in figures(record)]
    parts = (["\n".join(scores)] if rows else []) + (["\n".join(costs)] if costs else [])
    return "\n\n".join(["## Results", *parts]) if parts else ""


def number(value: float | None) -> str:
    """Return a score as text."""
    return "" if value is None else f"{value:.4f}"


def figures(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield names and values of what the record measured."""
    if record.model is not None:
        trained, total = record.model.trainable, record.model.parameters
        yield "trained", f"{trained:,} of {total:,} weights ({trained / total:.2%})"
    if record.memory is not None and record.memory.peak_resident is not None:
        yield "peak memory of the process", f"{record.memory.peak_resident / 2**30:.2f} GiB"
    if record.driver is not None and record.driver.process:
        yield "peak memory of the GPU", f"{record.driver.process / 2**30:.2f} GiB"
    if record.throughput is not None and record.throughput.tokens_per_second is not None:
        yield "speed", f"{record.throughput.tokens_per_second:,.0f} tokens/s"
    if record.device is not None:
        yield "device", record.device.name
    if record.status != "ok":
        yield "end", f"the run did not end well: {record.status}, {record.reason}"


def training(record: RunRecord) -> str:
    """Return how the run was trained: its command, settings and versions."""
    parts = ["## Training"]
    if record.command is not None:
        parts.append(fenced("sh", record.command))
    settings = {key: record.settings[key] for key in ("model", "data") if record.settings.get(key)}
    if settings:
        parts.append(fenced("yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()))
    if record.versions:
        named = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        parts.append(f"Versions: {plain_markdown(named)}.")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def fenced(language: str, text: str) -> str:
    """Return a block of code, with a fence that the text itself does not end."""
    ticks = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return f"{ticks}{language}\n{printable(text)}\n{ticks}"
