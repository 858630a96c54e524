"""A tokenizer trained on the text that a model is pre-trained on, for models without one."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import uuid4

from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_sparse.demo import cache_folder
from lit_sparse.errors import BadInput
from lit_sparse.storage.sealed import damaged_file, seal

END = "<|endoftext|>"
"""The only special token, 0: it ends a text, and pads."""

CHARACTERS = 20_000_000
"""Characters that a vocabulary is learnt from at most: the first of the text."""

BYTES = 256
"""Tokens that every vocabulary has, one for each byte, beside the end token."""


def trained_vocabulary(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `size` tokens, trained on `texts`, or the one that was before.

    It has fewer tokens if the text does not have so many pairs that occur twice. No text is unknown to it, and decoding
    gives back what was encoded.

    Raises:
        BadInput: if `size` has no room for all bytes, or the cache cannot be written.
    """
    if size < BYTES + 1:
        raise BadInput(f"`vocabulary` is {size}; a byte-level one has {BYTES + 1} tokens at least, such as 4096.")
    used = list(first_characters(texts, CHARACTERS))
    digest = hashlib.sha256(json.dumps([size, [hashlib.sha256(text.encode()).hexdigest() for text in used]]).encode())
    folder = cache_folder() / "vocabularies" / digest.hexdigest()[:32]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # ranks and runs beside this one take what the first has made
            if not folder.is_dir() or damaged_file(folder) is not None:
                rank_zero_info(f"Training a vocabulary of {size:,} tokens on the text, once, into {folder.parent}.")
                write(train(used, size), folder)
    except OSError as error:
        raise BadInput(
            f"The vocabulary cannot be written to {folder.parent} ({error.strerror}); point LIT_SPARSE_CACHE elsewhere."
        ) from error
    return PreTrainedTokenizerFast.from_pretrained(folder)


def first_characters(texts: Iterable[str], count: int) -> Iterator[str]:
    """Yield texts up to `count` characters, the last one cut there."""
    for text in texts:
        if count <= 0:
            return
        yield text[:count]
        count -= len(text)


def train(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `size` tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END],  # pyright: ignore
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    special = {"eos_token": END, "pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **special)


def write(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer to `folder`, which is complete or not there, in place of a damaged one."""
    draft = folder.with_name(f".{uuid4().hex}")
    try:
        tokenizer.save_pretrained(draft)
        seal(draft)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
