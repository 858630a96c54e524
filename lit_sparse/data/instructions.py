"""Your own data: chats, instructions, questions, text or tokens, from local files or Hugging Face."""

from typing import Any

from lit_sparse.data.module import HELDOUT, TRAIN, TokenData, require_at_least
from lit_sparse.data.sources import Row, read, split


class Instructions(TokenData):
    """Your own rows in any common format, which is detected from their keys. The loss is on the answers only.

    Formats: `messages` (role, content); sharegpt's `conversations` (from, value); alpaca's `instruction`, `input`,
    `output`, `history`; `prompt`, `completion`; `question`, `choices`, `label` (trained on the correct choice, scored
    as multiple choice); `question`, `answer`; `text`; `input_ids`, with or without `labels` and `attention_mask`. Chats
    may also have `system`, `tools`, calls of tools, reasoning, and answers of `weight` 0, which are not learnt. Answers
    that end in "#### number" are also scored by that number.

    Args:
        train: A json, jsonl, csv or parquet file, or a Hugging Face data set with its split, such as
            "openai/gsm8k:train".
        validation: The same for validation. Without it, some training rows are held out.
        heldout: Number of held-out training rows, chosen by a hash of the row; a quarter of fewer rows.
        config: Configuration of the Hugging Face data set, if it has several.
    """

    def __init__(
        self,
        train: str,
        validation: str | None = None,
        heldout: int = 64,
        config: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        require_at_least(0, heldout=heldout)
        self.train, self.validation, self.heldout, self.config = train, validation, heldout, config
        self.val_names = [HELDOUT] if heldout or validation else []

    def read_rows(self) -> dict[str, list[Row]]:
        """Return the training rows and the held-out rows."""
        rows = read(self.train, self.config)
        if self.validation is not None:
            return {TRAIN: rows, HELDOUT: read(self.validation, self.config)}
        train, heldout = split(rows, self.heldout, self.train)
        return {TRAIN: train, HELDOUT: heldout} if heldout else {TRAIN: train}
