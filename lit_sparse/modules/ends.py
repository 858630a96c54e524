"""The tokens at which a model's generation ends: those that end answers in training, with its own."""

from transformers import PreTrainedModel

from lit_sparse.anatomy import embedded_tokens
from lit_sparse.data.encoding import Encoder
from lit_sparse.errors import BadInput


def set_ends(model: PreTrainedModel, encoder: Encoder) -> None:
    """Let generation with `model` end at the tokens that `encoder` ends answers and texts with, and at its own ones.

    A token that the model's generation config names as its end, but that is ordinary text to the tokenizer, is left
    out: it belongs to another tokenizer (often it is the default of a configuration class), and would cut answers.

    Raises:
        BadInput: if the model has no embedding of the token that ends an answer.
    """
    size = embedded_tokens(model)
    if encoder.end >= size:
        raise BadInput(
            f"answers end with {encoder.end_text}, the tokenizer's token {encoder.end}, but the model has embeddings "
            f"for {size} tokens only; give the tokenizer that belongs to the model, or set `template` to plain."
        )
    ends = dict.fromkeys((*encoder.ends, *(token for token in own_ends(model) if token in encoder.added)))
    within = [token for token in ends if token < size]
    model.generation_config.eos_token_id = within if len(within) > 1 else within[0]


def own_ends(model: PreTrainedModel) -> list[int]:
    """Return the tokens at which generation with `model` ends."""
    found = model.generation_config.eos_token_id
    return [] if found is None else found if isinstance(found, list) else [found]
