"""A tokenizer of words, as small as the tiny models' vocabulary."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<end>")
TEXT = ("red", "green", "blue", "Question", "Answer", ":")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Knows `w0` to `w19`, a few words more, and what it does not know as one token."""
    words = [*SPECIAL, *TEXT, *(f"w{n}" for n in range(20))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", eos_token="<end>"
    )
