"""Generate text with a run, beside its base model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_sparse.data.encoding import Encoder, load_tokenizer
from lit_sparse.data.rows import BadRow, Chat, Message
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM, LitSparse
from lit_sparse.modules.ends import set_ends
from lit_sparse.runs import build_module, load_run


def generate(
    run: Path,
    prompt: str,
    base: bool = False,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Print a run's answer to a prompt, and on request the base model's; computed on the CPU.

    Args:
        run: The run's folder, such as runs/smt-1.
        prompt: The text to answer; it is formatted as in training (by the tokenizer's chat template, if any).
        base: Print the base model's answer too.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 decodes greedily; above 0, tokens are sampled at this temperature.
        seed: Seed of the sampling.

    Raises:
        BadInput: if the run cannot be loaded, its base has no tokenizer, or a number makes no sense.
    """
    if max_new_tokens < 1 or not temperature >= 0:
        raise BadInput(
            f"max_new_tokens is {max_new_tokens} and temperature {temperature}; at least 1 and at least 0 are wanted."
        )
    module, config = load_run(run)
    if not isinstance(module, CausalLM):
        raise BadInput(f"{run} was trained to classify, so it generates no text; export it with --to hf.")
    sampling, encoder = Sampling(max_new_tokens, temperature, seed), encoder_of(module, config)
    text = sampling.answer(module, encoder, prompt)
    if not base:
        print(text)
        return
    before = build_module(config)
    before.precision = module.precision  # the run's: it decides which weights a random or quantised base has
    before.build().eval()
    print(f"--- {run.resolve().name}\n{text}\n--- base: {module.base}\n{sampling.answer(before, encoder, prompt)}")


@dataclass(frozen=True)
class Sampling:
    """Settings of generation: most tokens, temperature (0 is greedy) and seed."""

    max_new_tokens: int
    temperature: float
    seed: int

    def answer(self, module: LitSparse, encoder: Encoder, prompt: str) -> str:
        """Return the decoded answer of `module` to `prompt`, which ends where answers of the training data end."""
        set_ends(module.build(), encoder)
        tokenizer, ids = encoder.tokenizer, torch.tensor([prompt_ids(encoder, prompt)])
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        drawn = {"do_sample": True, "temperature": self.temperature}
        with torch.random.fork_rng(), torch.no_grad(), module.autocast():
            torch.manual_seed(self.seed)
            out = module.build().generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **(drawn if self.temperature else greedy),
            )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def encoder_of(module: LitSparse, config: Mapping[str, Any]) -> Encoder:
    """Return the encoder of a run's prompts and answers: its base's tokenizer, and the template of its data.

    Raises:
        BadInput: if the base has no tokenizer, or one that cannot encode answers.
    """
    options = (config.get("data") or {}).get("init_args") or {}
    return Encoder(load_tokenizer(module.base), options.get("template", "auto"))


def prompt_ids(encoder: Encoder, prompt: str) -> list[int]:
    """Return the token ids of `prompt` as they precede the answer in a training row.

    Raises:
        BadInput: if the chat template rejects it.
    """
    try:
        return encoder.encode_prompt(Chat((Message("user", prompt), Message("assistant", ""))))
    except BadRow as error:
        raise BadInput(f"the prompt cannot be asked: {error}.") from error
