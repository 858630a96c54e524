"""Export a run as a plain Hugging Face folder, a small delta, or an adapter of PEFT."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_sparse import demo
from lit_sparse.data.encoding import load_named
from lit_sparse.errors import BadInput
from lit_sparse.export import delta, hub, seedlog
from lit_sparse.export.adapter import write_adapter
from lit_sparse.export.card import TAG, card, read_record
from lit_sparse.export.compatibility import add_old_keys, copy_sentencepiece, make_loadable
from lit_sparse.export.drafts import remove_leftovers, written
from lit_sparse.export.generate import encoder_of
from lit_sparse.export.merge import CastError, Merge, cast_error
from lit_sparse.export.seedlog import SeedLog
from lit_sparse.modules import CausalLM, LitSparse
from lit_sparse.modules.ends import own_ends, set_ends
from lit_sparse.modules.hollow import release
from lit_sparse.runs import import_modules, load_run
from lit_sparse.storage.weight_files import CARD, MARK, hashes_of

MOST = 100
"""Largest scale: what lies beyond the run is an extrapolation, of which nothing is known."""
OUTPUTS = {"hf": "hf", "delta": "delta.safetensors", "adapter": "adapter", "seedlog": "seedlog.safetensors"}
"""Default names of exports in the run's folder."""

FILES = {"delta": "delta", "seedlog": "seed log"}
"""Exports that are one file, as they are called."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---- export


def export(
    run: Path,
    to: Literal["hf", "delta", "adapter", "seedlog"] = "hf",
    output: Path | None = None,
    dtype: Literal["base", "float32", "bfloat16"] = "base",
    overwrite: bool = False,
    push: str | None = None,
    private: bool = False,
    modules: list[str] | str | None = None,
    scale: float = 1.0,
) -> Path:
    """Export a run: as a Hugging Face folder that the task's Auto class loads, as a delta to its base, or for PEFT.

    Args:
        run: The run's folder, such as runs/smt-1.
        to: `hf` is the whole model with the tokenizer; `delta` one file with the difference from the base; `adapter` a
            folder for peft.PeftModel.from_pretrained(base, folder); `seedlog` one file of kilobytes, from which a run
            without a backward pass (MeZO, HELENE) is made again.
        output: Where to; `hf`, `delta.safetensors`, `adapter` or `seedlog.safetensors` in the run's folder when not
            given.
        dtype: Dtype of the weights of `hf`; `base` is that of the base's files. Deltas and adapters are float32.
        overwrite: Replace an earlier export.
        push: Name of a repository on the Hugging Face Hub (user/name) to put the export into as well.
        private: Make that repository private.
        modules: Modules of your own with classes that the run was trained with; no others are imported.
        scale: Rewinding, for `hf` and `delta`: each weight becomes the base's plus so many times what training changed
            of it. Below 1 a model forgets less than at the end of its training; 1 is the run, 0 the base.

    Returns:
        The folder or file written. It is complete, or not there at all. A folder has a model card, README.md; that of
        a delta stands beside it, as <its name>.md.

    Raises:
        BadInput: if the run cannot be loaded, exported so or pushed, or there is something at `output` already.
    """
    if to not in OUTPUTS:
        raise BadInput(f"export to {to!r} was asked for; there is {', '.join(OUTPUTS)}.")
    if to != "hf" and dtype != "base":
        raise BadInput(f"{to} in {dtype} was asked for, but it keeps the trained float32 values; leave dtype out.")
    if not 0 <= scale <= MOST:
        raise BadInput(
            f"a scale of {scale} was asked for; give a number from 0, the base, to 1, the run, or above, up to {MOST}."
        )
    if to in ("adapter", "seedlog") and scale != 1:
        raise BadInput(
            f"{to} at a scale of {scale} was asked for, but it keeps what was trained as it is; give --to hf or --to "
            "delta."
        )
    if private and push is None:
        raise BadInput("a private repository was asked for, but none to push to; give --push user/name.")
    import_modules([modules] if isinstance(modules, str) else modules or [])
    target = output or run / OUTPUTS[to]
    check_output(target, to, overwrite)
    for path in (target, card_of(target)):
        remove_leftovers(path)
    check_output(target, to, overwrite)  # again: an earlier export may have been put back
    if push is not None:
        hub.check_pushable(push, overwrite)
    write = {
        "hf": partial(export_folder, scale=scale),
        "delta": partial(export_delta, scale=scale),
        "adapter": export_adapter,
        "seedlog": export_seedlog,
    }[to]
    with written(target) as draft:
        text = write(run, draft, dtype)
        if push is not None:
            hub.create(push, private)
        if to in FILES:
            with written(card_of(target)) as beside:
                beside.write_text(text, encoding="utf-8")
        else:
            (draft / CARD).write_text(text, encoding="utf-8")
    print(f"Wrote {target}.")
    if push is not None:
        push_export(push, target, run.resolve().name)
    return target


def export_folder(run: Path, folder: Path, dtype: str, scale: float) -> str:
    """Write the merged model of the run in the folder `run`, rewound to `scale`, to `folder`; return its card."""
    merge = Merge.of(run, scale)
    rank_zero_info(f"Writing a folder of {merge.run}, and reading it again.")
    cost = write_folder(merge, folder, DTYPES.get(dtype, merge.base.dtype))
    return card(merge.run, merge.module, "hf", read_record(run), f"{cost.sentence()} {rewound(scale)}".strip())


def rewound(scale: float) -> str:
    """Return a sentence for the card on what training changed being scaled; none at 1."""
    if scale == 1:
        return ""
    return f"Rewound: each weight is the base's plus {scale:g} times what training changed of it, so results differ."


def export_delta(run: Path, file: Path, dtype: str, scale: float) -> str:
    """Write the delta of the run in the folder `run`, rewound to `scale`, to `file`; return its card."""
    merge = Merge.of(run, scale)
    merge.delta().save(file)
    tell_end(merge.module, merge.config)
    return card(merge.run, merge.module, "delta", read_record(run), rewound(scale))


def export_adapter(run: Path, folder: Path, dtype: str) -> str:
    """Write the adapter of the run in the folder `run`, and the mark, to `folder`; return its card."""
    module, config = load_run(run)
    name = run.resolve().name
    tell_end(module, config)
    write_adapter(module, name, folder)
    write_mark(folder, origin(name, module))
    return card(name, module, "adapter", read_record(run))


def export_seedlog(run: Path, file: Path, dtype: str) -> str:
    """Write the seed log of the run in the folder `run` to `file`; return its card."""
    module, config = load_run(run)
    SeedLog.of(module, config).save(file)
    tell_end(module, config)
    return card(run.resolve().name, module, "seedlog", read_record(run))


def push_export(name: str, target: Path, run: str) -> None:
    """Put the export at `target` into the repository `name` of the Hub.

    Raises:
        BadInput: if that fails. The export on the disk is complete and stays.
    """
    if target.is_file():
        files = {target.name: target, CARD: card_of(target)}
    else:
        files = {path.relative_to(target).as_posix(): path for path in sorted(target.rglob("*")) if path.is_file()}
    try:
        hub.upload(name, files, f"Export of {run} by lit-sparse")
    except BadInput as error:
        raise BadInput(f"{error} The export at {target} is complete; hf upload {name} {target} . pushes it.") from error


def card_of(target: Path) -> Path:
    """Return where the model card of a delta stands."""
    return target.with_name(f"{target.name}.md")


def tell_end(module: LitSparse, config: Mapping[str, Any]) -> None:
    """Say so if answers of the run end with a token at which generation with its base does not end."""
    if not isinstance(module, CausalLM) or not learns_answers(config):
        return
    encoder = encoder_of(module, config)
    if encoder.end not in own_ends(module.build()):
        print(f"Answers end with {encoder.end_text}, and the base's do not: give generate eos_token_id={encoder.end}.")


def learns_answers(config: Mapping[str, Any]) -> bool:
    """Return whether the data of a run are answers, which end with a token of their own, and not plain text."""
    kind = str((config.get("data") or {}).get("class_path")).rpartition(".")[2]
    return kind in ("Embedded", "Instructions")


# ---- a Hugging Face folder


def write_folder(merge: Merge, folder: Path, dtype: torch.dtype) -> CastError:
    """Write the merged model in `dtype`, the base's tokenizer and the mark; print and return the error of the cast.

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
    return cost


def write_tokenizer(merge: Merge, folder: Path) -> None:
    """Write the run's or its base's tokenizer, and let it and the model's generation end where answers ended.

    The tokenizer's own end token stays if the chat template writes it in other places than behind answers.
    """
    try:
        tokenizer = load_named(merge.module.tokenizer_name or merge.module.base)
    except BadInput as missing:
        print(f"{missing} The export has no tokenizer.")
        return
    if isinstance(merge.module, CausalLM) and tokenizer.is_fast and tokenizer.eos_token is not None:
        encoder = encoder_of(merge.module, merge.config)
        set_ends(merge.model, encoder)
        other = learns_answers(merge.config) and encoder.end != encoder.text_end
        if other and encoder.chats and not encoder.chats.writes(encoder.eos):
            tokenizer.eos_token = encoder.end_text
            print(f"Answers end with {encoder.end_text}: it is the export's eos_token; the base has {encoder.eos}.")
    tokenizer.save_pretrained(folder)
    make_loadable(folder, tokenizer)
    copy_sentencepiece(demo.resolve(merge.module.tokenizer_name or merge.module.base), folder)


def origin(run: str, module: LitSparse) -> dict[str, Any]:
    """Return the origin of an export, for its mark."""
    return {
        "run": run,
        "base": module.base,
        "base_fingerprint": module.base_fingerprint,
        "updates": [type(update).__name__ for update in module.updates],
    }


def write_mark(folder: Path, entries: dict[str, Any]) -> None:
    """Write the file that marks `folder` as an export, with the hashes of its files."""
    (folder / MARK).write_text(json.dumps({**entries, "files": hashes_of(folder)}, indent=2) + "\n")


def check_loads(merge: Merge, folder: Path) -> None:
    """Load the folder as users will, and compare every parameter; the merged model is given up for the memory.

    save_pretrained does not notice weights that it ties or drops.
    """
    wanted = {name: digest(p) for name, p in merge.model.named_parameters(remove_duplicate=False)}
    release(merge.model)
    try:
        again = merge.module.auto_class.from_pretrained(folder, dtype="auto")
    except ValueError as error:  # Mllama's text model has a configuration that no Auto class knows
        raise BadInput(
            f"{merge.run} cannot be exported as a Hugging Face folder, which would not load again "
            f"({str(error).strip().splitlines()[0].rstrip('.')[:150]}); export it with --to delta."
        ) from error
    found = dict(again.named_parameters(remove_duplicate=False))
    for name, expected in wanted.items():
        if name not in found or digest(found[name]) != expected:
            raise BadInput(
                f"{merge.run} cannot be exported as a Hugging Face folder: {name} would not load again as it was saved."
            )


def digest(parameter: Tensor) -> bytes:
    """Return a hash of a parameter's shape and values, whatever its dtype."""
    found = hashlib.sha256(repr(tuple(parameter.shape)).encode())
    found.update(parameter.detach().float().contiguous().numpy().data)
    return found.digest()


# ---- files


def check_output(output: Path, to: str, overwrite: bool) -> None:
    """Refuse to overwrite anything but an earlier export.

    Raises:
        BadInput: if `output` names no file or folder, if something is there that is not an earlier export, or is one
            and `overwrite` is false.
    """
    if output.name in ("", ".."):
        raise BadInput(f"--output {output} has no name for the export; give one, such as exports/{OUTPUTS[to]}.")
    if to in FILES and output.is_dir():
        raise BadInput(f"{output} is a folder, but a {FILES[to]} is one file; give --output a file's name.")
    if to not in FILES and output.is_file():
        raise BadInput(f"{output} is a file, but --to {to} writes a folder; give --output another name.")
    if output.exists() and not output.is_file() and not output.is_dir():
        raise BadInput(f"{output} is a device, a pipe or a socket, not a file; give --output another name.")
    if to in FILES:
        check_card(card_of(output), overwrite)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise BadInput(f"{output} is there already; give --output another name, or --overwrite true to replace it.")
    if not is_export(output):
        raise BadInput(
            f"{output} holds something else than an export of lit-sparse, which is not overwritten; remove it."
        )


def is_export(output: Path) -> bool:
    """Return whether the folder or file at `output` is an earlier export."""
    if output.is_dir():
        return (output / MARK).is_file()
    try:
        with safe_open(output, framework="pt") as file:
            return bool({delta.FORMAT, seedlog.FORMAT} & (file.metadata() or {}).keys())
    except (SafetensorError, OSError):  # no safetensors file, or an empty one
        return False


def check_card(path: Path, overwrite: bool) -> None:
    """Refuse to overwrite anything but the card of an earlier delta.

    Raises:
        BadInput: if something else is there, or the card is and `overwrite` is false.
    """
    if path.exists() and not (overwrite and path.is_file() and f"- {TAG}\n".encode() in path.read_bytes()):
        raise BadInput(
            f"{path}, where the file's model card is to stand, is there already; give --output another name, or "
            "remove it."
        )
