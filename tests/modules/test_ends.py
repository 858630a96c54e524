"""A tuned base stops where its answers ended: in samples and tests of the fit, in generate, and in its export."""

from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lit_sparse import cli
from lit_sparse.data.encoding import Encoder
from lit_sparse.errors import BadInput
from lit_sparse.export.folder import export
from lit_sparse.export.generate import generate
from lit_sparse.modules.ends import set_ends
from lit_sparse.testing import tiny_llm

CHATML = (
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|>' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
WORDS = ("<pad>", "<eos>", "say", "<|im_start|>", "<|im_end|>", "user", "assistant", "<unk>", "cat", "now", "\n")


def tokenizer(eos: str, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # pyright: ignore[reportAttributeAccessIssue]
    special = ["<eos>", "<|im_start|>", "<|im_end|>"]
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token="<pad>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": special})  # pyright: ignore[reportArgumentType]
    made.chat_template = template
    return made


@pytest.fixture
def fitted(home: Path, request: pytest.FixtureRequest) -> Path:
    """Fine-tune all weights of a tiny base until it says cat; its tokenizer's end token is the parameter."""
    model = tiny_llm("llama")
    model.save_pretrained("base")
    tokenizer(request.param).save_pretrained("base")
    Path("rows.jsonl").write_text(
        '{"instruction": "say", "output": "cat"}\n{"instruction": "now", "output": "cat"}\n' * 8
    )
    quiet = [
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--profile.profiled=0",
        "--trainer.log_every_n_steps=1",
    ]
    cli.run(["fit", "--config", "full.yaml", "--model.base", "base", "--model.lr=1e-2", "--trainer.accelerator=cpu",
             "--data", "Instructions", "--data.train=rows.jsonl", "--data.heldout=1", "--trainer.max_steps=30",
             "--profile.examine=false", "--samples=2", *quiet])  # fmt: skip
    return Path("runs/full-1")


@pytest.mark.parametrize("fitted", ["<eos>", "<|im_end|>"], indirect=True, ids=["base", "chat"])
def test_a_tuned_base_stops(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    generate(fitted, "say", max_new_tokens=20)
    assert capsys.readouterr().out == "cat\n"
    samples = yaml.safe_load((fitted / "record.json").read_text())["samples"]
    assert {sample["after"] for sample in samples} == {"cat"}
    folder = export(fitted)
    model, again = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = again.apply_chat_template([{"role": "user", "content": "say"}], add_generation_prompt=True, return_dict=True)
    out = model.generate(torch.tensor([ids["input_ids"]]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert again.decode(out[0, len(ids["input_ids"]) :]).split() == ["cat", "<|im_end|>"]
    assert again.eos_token == "<|im_end|>"
    ends = model.generation_config.eos_token_id
    assert WORDS.index("<|im_end|>") in (ends if isinstance(ends, list) else [ends])
    assert 2 not in (ends if isinstance(ends, list) else [ends])  # the class's default, here an ordinary word
    capsys.readouterr()
    export(fitted, to="delta")  # leaves the base's generation config
    assert (
        "Answers end with <|im_end|>, and the base's do not: give generate eos_token_id=4." in capsys.readouterr().out
    )


def test_ends_are_the_encoders_and_the_models_own() -> None:
    model = tiny_llm("llama")
    model.generation_config.eos_token_id = [3, 2]  # 2 is an ordinary word of the tokenizer
    set_ends(model, Encoder(tokenizer("<eos>")))
    assert model.generation_config.eos_token_id == [4, 1, 3]
    set_ends(model, Encoder(tokenizer("<eos>"), "plain"))
    assert model.generation_config.eos_token_id == [1, 4, 3]
    model.generation_config.eos_token_id = None
    set_ends(model, Encoder(tokenizer("<|im_end|>")))
    assert model.generation_config.eos_token_id == 4
    model.resize_token_embeddings(4)
    with pytest.raises(BadInput, match=r"answers end with <\|im_end\|>, .* embeddings for 4 tokens only"):
        set_ends(model, Encoder(tokenizer("<eos>")))


def test_an_end_token_that_the_template_also_writes_elsewhere_stays(home: Path) -> None:
    """Phi-3.5 writes the tokenizer's end token once, behind the whole chat."""
    template = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    encoder = Encoder(tokenizer("<eos>", template))
    assert encoder.end_text == "<|im_end|>"
    assert encoder.chats is not None
    assert encoder.chats.writes("<eos>")
