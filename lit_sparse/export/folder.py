"""Export a run as a plain Hugging Face folder, a small delta, or an adapter of PEFT."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError

from lit_sparse import demo
from lit_sparse.data.encoding import load_named
from lit_sparse.errors import BadInput
from lit_sparse.export.adapter import write_adapter
from lit_sparse.export.compatibility import add_old_keys, copy_sentencepiece, make_loadable
from lit_sparse.export.generate import encoder_of
from lit_sparse.export.merge import Merge, cast_error
from lit_sparse.modules import CausalLM, LitSparse
from lit_sparse.modules.ends import own_ends, set_ends
from lit_sparse.runs import load_run

MARK = "lit_sparse.json"
"""A file that marks a folder as an export, with its origin and the error of its cast."""

OUTPUTS = {"hf": "hf", "delta": "delta.safetensors", "adapter": "adapter"}
"""Default names of exports in the run's folder."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---- export


def export(
    run: Path,
    to: Literal["hf", "delta", "adapter"] = "hf",
    output: Path | None = None,
    dtype: Literal["base", "float32", "bfloat16"] = "base",
    overwrite: bool = False,
) -> Path:
    """Export a run: as a Hugging Face folder that the task's Auto class loads, as a delta to its base, or for PEFT.

    Args:
        run: The run's folder, such as runs/smt-1.
        to: `hf` is the whole model with the tokenizer; `delta` one file with the difference from the base; `adapter` a
            folder for peft.PeftModel.from_pretrained(base, folder).
        output: Where to; `hf`, `delta.safetensors` or `adapter` in the run's folder when not given.
        dtype: Dtype of the weights of `hf`; `base` is that of the base's files. Deltas and adapters are float32.
        overwrite: Replace an earlier export.

    Returns:
        The folder or file written. It is complete, or not there at all.

    Raises:
        BadInput: if the run cannot be loaded or exported so, or there is something at `output` already.
    """
    if to not in OUTPUTS:
        raise BadInput(f"export to {to!r} was asked for; there is {', '.join(OUTPUTS)}.")
    if to != "hf" and dtype != "base":
        raise BadInput(f"{to} in {dtype} was asked for, but it keeps the trained float32 values; leave dtype out.")
    target = output or run / OUTPUTS[to]
    check_output(target, to, overwrite)
    if to == "adapter":
        export_adapter(run, target)
    else:
        merge = Merge.of(run)
        rank_zero_info(f"Writing {target}, and reading it again.")
        with written(target) as draft:
            if to == "hf":
                write_folder(merge, draft, DTYPES.get(dtype, merge.base.dtype))
            else:
                merge.delta().save(draft)
                tell_end(merge.module, merge.config)
    print(f"Wrote {target}.")
    return target


def export_adapter(run: Path, target: Path) -> None:
    """Write the adapter of the run in the folder `run`, and the mark, to the folder `target`."""
    module, config = load_run(run)
    with written(target) as draft:
        write_adapter(module, run.resolve().name, draft)
        write_mark(draft, origin(run.resolve().name, module))
    tell_end(module, config)


def tell_end(module: LitSparse, config: Mapping[str, Any]) -> None:
    """Say so if answers of the run end with a token at which generation with its base does not end."""
    kind = str((config.get("data") or {}).get("class_path")).rpartition(".")[2]
    if not isinstance(module, CausalLM) or kind not in ("Embedded", "Instructions"):
        return
    encoder = encoder_of(module, config)
    if encoder.end not in own_ends(module.build()):
        print(f"Answers end with {encoder.end_text}, and the base's do not: give generate eos_token_id={encoder.end}.")


# ---- a Hugging Face folder


def write_folder(merge: Merge, folder: Path, dtype: torch.dtype) -> None:
    """Write the merged model in `dtype`, the base's tokenizer and the mark; print the error of the cast.

    Raises:
        BadInput: if the folder does not load as it was written.
    """
    cost = cast_error(((before, after) for _, before, after in merge.changes()), dtype)
    write_tokenizer(merge, folder)  # before the model, whose generation it may end at other tokens
    merge.model.to(dtype)  # pyright: ignore[reportArgumentType]
    merge.model.save_pretrained(folder)  # pyright: ignore
    add_old_keys(folder, merge.model.config)
    check_loads(merge, folder)
    write_mark(folder, {**origin(merge.run, merge.module), "cast": asdict(cost)})
    print(cost.sentence())


def write_tokenizer(merge: Merge, folder: Path) -> None:
    """Write the base's tokenizer, and let it and the model's generation end where the run's answers ended.

    The tokenizer's own end token stays if the chat template writes it in other places than behind answers.
    """
    try:
        tokenizer = load_named(merge.module.base)
    except BadInput as missing:
        print(f"{missing} The export has no tokenizer.")
        return
    if isinstance(merge.module, CausalLM) and tokenizer.is_fast and tokenizer.eos_token is not None:
        encoder = encoder_of(merge.module, merge.config)
        set_ends(merge.model, encoder)
        if encoder.chats and encoder.end_text != encoder.eos and not encoder.chats.writes(encoder.eos):
            tokenizer.eos_token = encoder.end_text
            print(f"Answers end with {encoder.end_text}: it is the export's eos_token; the base has {encoder.eos}.")
    tokenizer.save_pretrained(folder)
    make_loadable(folder, tokenizer)
    copy_sentencepiece(demo.resolve(merge.module.base), folder)


def origin(run: str, module: LitSparse) -> dict[str, Any]:
    """Return the origin of an export, for its mark."""
    return {
        "run": run,
        "base": module.base,
        "base_fingerprint": module.base_fingerprint,
        "updates": [type(update).__name__ for update in module.updates],
    }


def write_mark(folder: Path, entries: dict[str, Any]) -> None:
    """Write the file that marks `folder` as an export."""
    (folder / MARK).write_text(json.dumps(entries, indent=2) + "\n")


def check_loads(merge: Merge, folder: Path) -> None:
    """Load the folder as users will, and compare every parameter.

    save_pretrained does not notice weights that it ties or drops.
    """
    try:
        again = merge.module.auto_class.from_pretrained(folder, dtype="auto")
    except ValueError as error:  # Mllama's text model has a configuration that no Auto class knows
        raise BadInput(
            f"{merge.run} cannot be exported as a Hugging Face folder, which would not load again "
            f"({str(error).strip().splitlines()[0].rstrip('.')[:150]}); export it with --to delta."
        ) from error
    found = dict(again.named_parameters(remove_duplicate=False))
    for name, parameter in merge.model.named_parameters(remove_duplicate=False):
        if name not in found or not torch.equal(found[name].float(), parameter.float()):
            raise BadInput(
                f"{merge.run} cannot be exported as a Hugging Face folder: {name} would not load again as it was saved."
            )


# ---- files


def check_output(output: Path, to: str, overwrite: bool) -> None:
    """Refuse to overwrite anything but an earlier export.

    Raises:
        BadInput: if something is there that is not an earlier export, or is one and `overwrite` is false.
    """
    if to == "delta" and output.is_dir():
        raise BadInput(f"{output} is a folder, but a delta is one file; give --output a file's name.")
    if to != "delta" and output.is_file():
        raise BadInput(f"{output} is a file, but --to {to} writes a folder; give --output another name.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise BadInput(f"{output} is there already; give --output another name, or --overwrite true to replace it.")
    if output.is_dir() and not (output / MARK).is_file():
        raise BadInput(
            f"{output} holds something else than an export of lit-sparse, which is not overwritten; remove it."
        )


@contextmanager
def written(output: Path) -> Iterator[Path]:
    """Give a path to write at; it replaces `output` at the end, or is removed on an error.

    Raises:
        BadInput: if it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
            yield Path(folder) / "new"
            unveil(Path(folder))
            replace(Path(folder) / "new", output, Path(folder) / "old")
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{output} could not be written ({error}); nothing was left there.") from error


def unveil(folder: Path) -> None:
    """Give all files in `folder` the mode of a new file here: safetensors writes such that only their owner reads."""
    (folder / "plain").touch()
    mode = (folder / "plain").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def replace(new: Path, output: Path, old: Path) -> None:
    """Move `output` to `old` and `new` to `output`; on an error, move `old` back."""
    if output.exists():  # a folder cannot be moved onto one that holds something
        output.rename(old)
    try:
        new.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
