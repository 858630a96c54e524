"""A run generates the same text as its export, and samples depend on the seed alone."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_sparse.cli import run as run_command
from lit_sparse.errors import BadInput
from lit_sparse.export.folder import export
from lit_sparse.export.generate import Sampling, generate
from tests.export.test_folder import METHODS, Run, load, logits, make_base, make_run


def add_tokenizer(folder: Path, chat: bool) -> None:
    """Save a tokenizer for the tiny models' 96 tokens: words t3 to t95."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, 96)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="t3")
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ {'user': 't9'}[m.role] }} {{ m.content }} {% endfor %}t8"
    tokenizer.save_pretrained(folder)


@pytest.fixture(params=[True, False], ids=["chat", "plain"])
def talking(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    add_tokenizer(make_base(tmp_path / "base", "llama"), chat=request.param)
    return make_run(tmp_path, "llama", METHODS["full"])


def greedy(model: Any, ids: list[int], count: int) -> str:
    """Decode greedily, without a cache."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return " ".join(f"t{token}" for token in ids[-count:] if token > 2)


def test_generates(talking: Run, capsys: pytest.CaptureFixture[str]) -> None:
    exported = export(talking.folder)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(talking.base).get_vocab()
    ids = [9, 5, 6, 8] if tokenizer.chat_template else [5, 6]
    run, base = (greedy(load(folder), ids, 5) for folder in (exported, talking.base))
    assert run != base
    capsys.readouterr()
    generate(talking.folder, "t5 t6", max_new_tokens=5)
    assert capsys.readouterr().out == f"{run}\n"
    generate(talking.folder, "t5 t6", base=True, max_new_tokens=5)
    assert capsys.readouterr().out == f"--- try-1\n{run}\n--- base: {talking.base}\n{base}\n"


def test_draws_from_the_seed_alone(talking: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    answers = []
    for seed in (0, 0, 1):
        generate(talking.folder, "t5 t6", max_new_tokens=20, temperature=2.0, seed=seed)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # transformers finds none for one, makes up one for the other
def test_base_without_a_tokenizer(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, kind, METHODS["smt"])
    output = export(run.folder)
    assert "The export has no tokenizer." in capsys.readouterr().out
    assert not list(output.glob("token*"))
    assert torch.equal(logits(load(output)), run.logits)
    with pytest.raises(BadInput, match="tokenizer"):
        generate(run.folder, "t5")


@pytest.mark.parametrize("wish", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}], ids=str)
def test_refuses_numbers_without_sense(wish: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 1 and at least 0"):
        generate(tmp_path, "t5", **wish)


@pytest.mark.parametrize("wish", [{"temperature": 1e-320}, {"seed": 10**30}, {"seed": -(10**30)}], ids=str)
def test_refuses_numbers_beyond_those_of_torch(wish: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"{next(iter(wish))} is "):
        generate(tmp_path, "t5", **wish)


def test_the_coldest_temperature_takes_the_likeliest_token(talking: Run, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for temperature in (0.0, 1e-6):
        generate(talking.folder, "t5 t6", max_new_tokens=8, temperature=temperature)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_refuses_a_prompt_that_is_not_unicode(talking: Run) -> None:
    with pytest.raises(BadInput, match=r"the prompt is no text in UTF-8: 't5 \\udce9'"):
        generate(talking.folder, "t5 \udce9")


@pytest.fixture(scope="module")
def fluent(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose base has a chat template."""
    root = tmp_path_factory.mktemp("fluent")
    add_tokenizer(make_base(root / "base", "llama"), chat=True)
    return make_run(root, "llama", METHODS["full"])


def told(run: Run, prompt: str, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """Return what the run answers to one prompt."""
    capsys.readouterr()
    generate(run.folder, prompt, max_new_tokens=5, **options)
    return capsys.readouterr().out


def test_several_prompts_are_answered_each(fluent: Run, capsys: pytest.CaptureFixture[str]) -> None:
    alone = [told(fluent, prompt, capsys) for prompt in ("t5 t6", "t7")]
    run_command(["generate", str(fluent.folder), "t5 t6", "t7", "--max_new_tokens", "5"])
    assert capsys.readouterr().out == f">>> t5 t6\n{alone[0]}>>> t7\n{alone[1]}"
    pair = told(fluent, "t7", capsys, base=True)
    run_command(["generate", str(fluent.folder), "--base", "true", "--max_new_tokens", "5", "t5 t6", "t7"])
    assert capsys.readouterr().out.endswith(f">>> t7\n{pair}")


ASKING = [
    {"prompt": "t5 t6"},
    {"prompt": "t5 t6", "completion": "t9"},
    {"instruction": "t5 t6"},
    {"question": "t5 t6"},
    {"messages": [{"role": "user", "content": "t5 t6"}]},
    {"messages": [{"role": "user", "content": "t5 t6"}, {"role": "assistant", "content": "t9"}]},
    {"conversations": [{"from": "human", "value": "t5 t6"}]},
]


def test_a_file_of_prompts(fluent: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, rows, answers = tmp_path / "prompts.txt", tmp_path / "rows.JSONL", tmp_path / "answers.jsonl"
    lines.write_text("t5 t6\n\nt7\n")
    rows.write_text("".join(json.dumps(row) + "\n" for row in ASKING))
    first, second = (told(fluent, prompt, capsys).removesuffix("\n") for prompt in ("t5 t6", "t7"))
    generate(fluent.folder, file=lines, max_new_tokens=5, output=answers)
    assert capsys.readouterr().out == f">>> t5 t6\n{first}\n>>> t7\n{second}\n"
    assert list(map(json.loads, answers.read_text().splitlines())) == [
        {"prompt": "t5 t6", "answer": first},
        {"prompt": "t7", "answer": second},
    ]
    generate(fluent.folder, file=rows, max_new_tokens=5)
    assert capsys.readouterr().out == f">>> t5 t6\n{first}\n" * len(ASKING)


def test_an_output_has_the_answers_of_both(fluent: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(fluent.folder, "t5 t6", base=True, max_new_tokens=5, output=tmp_path / "answers.jsonl")
    row, printed = json.loads((tmp_path / "answers.jsonl").read_text()), capsys.readouterr().out
    assert printed == f"--- try-1\n{row['answer']}\n--- base: {fluent.base}\n{row['base']}\n"
    with pytest.raises(BadInput, match="is there already"):
        generate(fluent.folder, "t5", output=tmp_path / "answers.jsonl")
    with pytest.raises(BadInput, match="there is no folder"):
        generate(fluent.folder, "t5", output=tmp_path / "none" / "answers.jsonl")


def test_a_chat_remembers_its_turns(
    fluent: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, asked, answer = told(fluent, "t5 t6", capsys), [], Sampling.answer

    def noted(sampling: Sampling, module: Any, encoder: Any, prompt: list[int], stream: bool) -> str:
        asked.append(prompt)
        return answer(sampling, module, encoder, prompt, stream)

    monkeypatch.setattr(Sampling, "answer", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO("t5 t6\nt7\n\nt5 t6\n" + "t5 " * 300 + "\nt7\n"))
    run_command(["generate", str(fluent.folder), "--chat", "--max_new_tokens", "5"])
    out = capsys.readouterr().out
    said = [int(word.removeprefix("t")) for word in first.split()]
    again = [9, 5, 6, *said, 9, 7, 8]  # the tiny template writes t9 before a question, and t8 at the end
    assert asked == [[9, 5, 6, 8], again, [9, 5, 6, 8], again]
    assert out.startswith(first)
    assert "the conversation has 310 tokens, but the model has 256 positions" in out


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "no prompt was given"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": ["t5", " "]}, "the prompt is empty"),
        ({"prompt": "t5 " * 300}, "has 302 tokens, but the model has 256 positions"),
        ({"chat": True, "base": True}, "a chat is with one model"),
        ({"prompt": "t5", "device": "tpu"}, "there is auto, cpu, cuda"),
        ({"file": Path("none.txt")}, "none.txt cannot be read: No such file"),
        ({"file": Path("none.jsonl")}, "no data file"),
        ({"chat": True, "output": Path("a.jsonl")}, "of which there is none"),
    ],
    ids=str,
)
def test_what_cannot_be_asked(wish: dict[str, Any], message: str, fluent: Run) -> None:
    with pytest.raises(BadInput, match=message):
        generate(fluent.folder, **wish)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "has no prompts"),
        ("latin.txt", b"caf\xe9", "no text in UTF-8"),
        ("rows.jsonl", b'{"prompt": "t5"}\n{"prompt"\n', "rows.jsonl line 2"),
        ("text.jsonl", b'{"text": "t5"}\n', "text.jsonl line 1: it asks nothing"),
        ("blank.jsonl", b'{"prompt": " "}\n', "blank.jsonl line 1: `prompt` is empty"),
        ("long.txt", b"t5\n" + b"t5 " * 300, "long.txt line 2 has 302 tokens"),
    ],
)
def test_files_that_cannot_be_asked(name: str, content: bytes, message: str, fluent: Run, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        generate(fluent.folder, file=tmp_path / name)


def test_a_long_prompt_leaves_a_short_answer(fluent: Run, capsys: pytest.CaptureFixture[str]) -> None:
    generate(fluent.folder, "t5 " * 251, max_new_tokens=50)  # and two tokens of the template, of 256 positions
    assert len(capsys.readouterr().out.split()) <= 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(fluent: Run) -> None:
    with pytest.raises(BadInput, match="torch finds no GPU here"):
        generate(fluent.folder, "t5", device="cuda")


@pytest.mark.gpu
def test_a_gpu_is_used_where_there_is_one(fluent: Run, capsys: pytest.CaptureFixture[str]) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    generate(fluent.folder, "t5 t6", max_new_tokens=5, base=True)
    assert torch.cuda.max_memory_allocated() > before
    assert capsys.readouterr().out.startswith("--- try-1\n")
