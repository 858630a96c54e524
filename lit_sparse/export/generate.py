"""Generate text with a run, beside its base model: answers to prompts, or a chat on the terminal."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TextStreamer

from lit_sparse.data.encoding import Encoder, load_tokenizer
from lit_sparse.data.rows import BadRow, Chat, Choice, Message, parse
from lit_sparse.data.sources import READERS, Row, locate_errors, read
from lit_sparse.errors import BadInput
from lit_sparse.export.merge import check_converged
from lit_sparse.modules import CausalLM, LitSparse
from lit_sparse.modules.checks import positions
from lit_sparse.modules.ends import set_ends
from lit_sparse.runs import build_module, import_modules, load_run
from lit_sparse.storage.whole import replace_text
from lit_sparse_profiling.documents import printable

Device = Literal["auto", "cpu", "cuda"]

UNANSWERED = {"prompt": "completion", "instruction": "output", "question": "answer"}
"""Keys of a row that may have no answer, and the key of the answer. One that stands in for it is in no prompt."""

STAND_IN = {"messages": {"role": "assistant", "content": "-"}, "conversations": {"from": "gpt", "value": "-"}}
"""The same for rows of turns."""

COLDEST = 1e-6
"""Least temperature above 0: logits divided by it are far from the largest number of float32."""


def generate(
    run: Path,
    prompt: str | Sequence[str] = (),
    base: bool = False,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    file: Path | None = None,
    chat: bool = False,
    device: Device = "auto",
    output: Path | None = None,
    modules: Sequence[str] = (),
) -> None:
    """Print a run's answers to prompts, and on request the base model's, or chat with it on the terminal.

    Args:
        run: The run's folder, such as runs/smt-1.
        prompt: The text to answer, or several; they are formatted as in training (by the tokenizer's chat template, if
            any).
        base: Print the base model's answers too.
        max_new_tokens: Most tokens of an answer, which also ends where the model's positions do.
        temperature: 0 decodes greedily; above 0, tokens are sampled at this temperature.
        seed: Seed of the sampling, the same for each answer.
        file: A file of further prompts: one a line, or rows of training data (.jsonl, .json, .csv, .parquet), whose
            last answer may be missing and is not read.
        chat: Chat on the terminal, after answering the prompts given: an empty line begins anew, Ctrl-D ends it.
        device: `auto` is the GPU where there is one.
        output: A file to write prompts and answers to as well, one JSON object a line.
        modules: Modules of your own with classes that the run was trained with; no others are imported.

    Raises:
        BadInput: if the run cannot be loaded or diverged, its base has no tokenizer, a prompt is empty or longer than
            the model's positions, or a number makes no sense.
    """
    if max_new_tokens < 1 or not temperature >= 0:
        raise BadInput(
            f"max_new_tokens is {max_new_tokens} and temperature {temperature}; at least 1 and at least 0 are wanted."
        )
    if 0 < temperature < COLDEST:
        raise BadInput(
            f"temperature is {temperature}, too small to divide logits by; give 0, which takes the likeliest token, or "
            f"{COLDEST} or more."
        )
    if not -(2**63) <= seed < 2**64:  # torch takes no other
        raise BadInput(f"seed is {seed}; it must be a whole number below 2^64.")
    asked = [*typed([prompt] if isinstance(prompt, str) else prompt), *(read_prompts(file) if file else ())]
    check_wishes(asked, base, chat, output)
    place = device_of(device)
    import_modules(modules)
    module, config = load_run(run)
    if not isinstance(module, CausalLM):
        raise BadInput(f"{run} was trained to classify, so it generates no text; export it with --to hf.")
    check_converged(module, run.resolve().name)
    sampling, encoder = Sampling(max_new_tokens, temperature, seed), encoder_of(module, config)
    models: dict[str, LitSparse] = {run.resolve().name: module}
    if base:
        models[f"base: {module.base}"] = before = build_module(config)
        # The run's: they decide which weights a random or quantised base has.
        before.precision, before.init_seed = module.precision, module.init_seed
        before.build().eval()
    encoded = [prompt_ids(encoder, question, module) for question in asked]
    for model in models.values():
        model.to(place)
    rows = []
    for question, ids in zip(asked, encoded, strict=True):
        answers = {name: sampling.answer(model, encoder, ids) for name, model in models.items()}
        show(question.text, answers, many=len(asked) > 1)
        rows.append({"prompt": question.text, "answer": answers[run.resolve().name]})
        if base:
            rows[-1]["base"] = list(answers.values())[1]
    if output is not None:
        write_rows(rows, output)
    if chat:
        converse(module, encoder, sampling)


def show(prompt: str, answers: Mapping[str, str], many: bool) -> None:
    """Print the answers to a prompt by the models' names; the prompt too if there are others."""
    if many:
        print(printable(f">>> {prompt}"))
    if len(answers) == 1:
        print(*map(printable, answers.values()))
    else:
        print(printable("\n".join(f"--- {name}\n{text}" for name, text in answers.items())))


def write_rows(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Write prompts and answers, one JSON object a line.

    Raises:
        BadInput: if the file cannot be written.
    """
    try:
        replace_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)
    except OSError as error:
        raise BadInput(f"the answers could not be written to {path}: {error.strerror or error}.") from error


# ---- what is asked for


def check_wishes(asked: Sequence["Prompt"], base: bool, chat: bool, output: Path | None) -> None:
    """Refuse options that do not go together.

    Raises:
        BadInput: if nothing is asked, a chat is to have two sides, or the output is there already.
    """
    if not asked and not chat:
        raise BadInput("no prompt was given; give one or several, --file FILE, or --chat.")
    if chat and base:
        raise BadInput("a chat is with one model, but --base asks for two; leave one of them out.")
    if output is not None and not asked:
        raise BadInput("--output takes the answers to prompts, of which there is none; give some, or --file FILE.")
    if output is not None and output.exists():
        raise BadInput(f"{output} is there already; give --output another name.")
    if output is not None and not output.parent.is_dir():
        raise BadInput(f"there is no folder {output.parent} for --output; make it, or give another name.")


def device_of(device: Device) -> torch.device:
    """Return the device to compute on.

    Raises:
        BadInput: if there is no GPU and one was asked for, or the name is none of a device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise BadInput(f"--device {device!r} was asked for; there is auto, cpu, cuda.")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise BadInput("--device cuda was asked for, but torch finds no GPU here; leave it out, or give --device cpu.")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


@dataclass(frozen=True)
class Prompt:
    """A prompt: the text that is shown, its place for messages, and the row whose last answer is to be generated."""

    text: str
    where: str
    item: Chat | Choice


def typed(texts: Sequence[str], where: str = "the prompt") -> list[Prompt]:
    """Return prompts for texts.

    Raises:
        BadInput: if one is empty.
    """
    if not all(text.strip() for text in texts):
        raise BadInput(f"{where} is empty; give a text.")
    return [Prompt(text, where, question((Message("user", text),))) for text in texts]


def question(turns: Sequence[Message]) -> Chat:
    """Return a conversation whose next answer, which stands empty at its end, is to be generated."""
    return Chat((*turns, Message("assistant", "")))


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Yield the prompts of a file: its rows if it is a data file, or else its lines, without empty ones.

    Raises:
        BadInput: if it does not exist, cannot be read, or has none.
    """
    if path.suffix.lower() in READERS:
        yield from map(prompt_of, read(str(path)))
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise BadInput(f"the prompts {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"the prompts {path} are no text in UTF-8 ({error.reason}); convert the file.") from error
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BadInput(f"{path} has no prompts; give a file that has one on each line.")
    for number, line in found:
        yield from typed([line], f"{path} line {number}")


def prompt_of(row: Row) -> Prompt:
    """Return the prompt of a row of training data, whose last answer may be missing.

    Raises:
        BadInput: if it is no row that asks something.
    """
    data = dict(row.data)
    for key, answer in UNANSWERED.items():
        if key in data and data.get(answer) is None and "choices" not in data:
            data[answer] = "-" if isinstance(data[key], str) else [STAND_IN["messages"]]
    for key, turn in STAND_IN.items():
        turns = data.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            side = "role" if "role" in turns[-1] else "from"
            if turns[-1].get(side) not in ("assistant", "gpt", "model"):
                data[key] = [*turns, turn]
    with locate_errors(row):
        item = parse(data)
        if isinstance(item, Choice):
            return Prompt(item.question, row.where, item)
        if not isinstance(item, Chat):
            raise BadRow("it asks nothing; give a row with a prompt, or with turns")
        texts = [turn.content for turn in item.messages if turn.role == "user"]
        return Prompt(str(texts[-1]) if texts else "", row.where, item)


# ---- answers


@dataclass(frozen=True)
class Sampling:
    """Settings of generation: most tokens, temperature (0 is greedy) and seed."""

    max_new_tokens: int
    temperature: float
    seed: int

    def answer(self, module: LitSparse, encoder: Encoder, prompt: list[int], stream: bool = False) -> str:
        """Return the answer of `module` to a prompt's token ids; it ends where answers of the training data end.

        With `stream`, it is also printed as it is generated.
        """
        set_ends(module.build(), encoder)
        tokenizer, ids = encoder.tokenizer, torch.tensor([prompt], device=module.device)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        drawn = {"do_sample": True, "temperature": self.temperature}
        room = positions(module.build())
        with torch.random.fork_rng(), torch.no_grad(), module.autocast():
            torch.manual_seed(self.seed)
            out = module.build().generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens if room is None else min(self.max_new_tokens, room - len(prompt)),
                pad_token_id=tokenizer.pad_token_id,
                streamer=Printed(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
                **(drawn if self.temperature else greedy),
            )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


class Printed(TextStreamer):
    """Prints an answer as it is generated, without what a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


def prompt_ids(encoder: Encoder, prompt: Prompt, module: LitSparse) -> list[int]:
    """Return the token ids of `prompt` as they precede the answer in a training row.

    Raises:
        BadInput: if it is not Unicode, the chat template rejects it, or it leaves no position for an answer.
    """
    try:
        prompt.text.encode()
        ids = encoder.encode_prompt(prompt.item)
    except UnicodeEncodeError as error:  # Python reads bytes that are not UTF-8 as halves of surrogate pairs
        raise BadInput(f"{prompt.where} is no text in UTF-8: {prompt.text!a}; write it in UTF-8.") from error
    except BadRow as error:
        raise BadInput(f"{prompt.where} cannot be asked: {error}.") from error
    room = positions(module.build())
    if room is not None and len(ids) >= room:
        raise BadInput(
            f"{prompt.where} has {len(ids)} tokens, but the model has {room} positions (max_position_embeddings), of "
            "which an answer needs some; shorten it."
        )
    return ids


def converse(module: LitSparse, encoder: Encoder, sampling: Sampling) -> None:
    """Answer what is typed, turn after turn, until the input ends; an empty line begins a new conversation."""
    terminal = sys.stdin.isatty()
    if terminal:
        print("An empty line begins a new conversation; Ctrl-D ends it.")
    turns: list[Message] = []
    while True:
        if terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            turns = []
            continue
        asked = [*turns, Message("user", line.rstrip("\n"))]
        try:
            ids = prompt_ids(encoder, Prompt(line, "the conversation", question(asked)), module)
        except BadInput as error:  # the turn is not taken; the conversation can go on with another
            print(error)
            continue
        turns = [*asked, Message("assistant", sampling.answer(module, encoder, ids, stream=True))]


def encoder_of(module: LitSparse, config: Mapping[str, Any]) -> Encoder:
    """Return the encoder of a run's prompts and answers: its own or its base's tokenizer, and the template of its data.

    Raises:
        BadInput: if the base has no tokenizer, or one that cannot encode answers.
    """
    options = (config.get("data") or {}).get("init_args") or {}
    return Encoder(load_tokenizer(module.tokenizer_name or module.base), options.get("template", "auto"))


# ---- the command line


def parser() -> argparse.ArgumentParser:
    """Return the command line of `generate`."""
    out = argparse.ArgumentParser(
        prog="lit-sparse generate",
        description="Answer prompts with a run, beside its base, or chat.",
        allow_abbrev=False,
    )
    switch = {"nargs": "?", "const": True, "default": False, "type": truth, "metavar": "BOOL"}
    out.add_argument("run", type=Path, help="the run's folder, such as runs/smt-1")
    out.add_argument("prompt", nargs="*", help="texts to answer")
    out.add_argument("--file", type=Path, help="a file of prompts: one a line, or rows of data (.jsonl, .csv, ...)")
    out.add_argument("--chat", **switch, help="chat on the terminal; an empty line begins anew, Ctrl-D ends it")
    out.add_argument("--base", **switch, help="print the base model's answers too")
    out.add_argument("--max_new_tokens", type=int, default=200, help="most tokens of an answer (default 200)")
    out.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; above, it samples (default 0)")
    out.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    out.add_argument("--device", default="auto", help="auto, cpu or cuda; auto is the GPU where there is one")
    own = "a module of your own with classes that the run was trained with; no others are imported"
    out.add_argument("--modules", action="append", default=[], metavar="NAME", help=own)
    out.add_argument("--output", type=Path, help="a file to write prompts and answers to as well, as JSON lines")
    return out


def truth(word: str) -> bool:
    """Return the value of a switch: --base, --base true and --base false are understood."""
    if word not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false; put prompts before the options")
    return word == "true"


def command(argv: Sequence[str]) -> int:
    """Run the verb `generate`; return its exit status."""
    generate(**vars(parser().parse_intermixed_args(argv)))
    return 0
