"""Your own data: chats, instructions, questions, text or tokens, from files or Hugging Face."""

from typing import Any

from lit_sparse.data.module import HELDOUT, TRAIN, TokenData, at_least
from lit_sparse.data.sources import Row, read, split


class Instructions(TokenData):
    """Rows of your own, in any of the usual formats, detected from their keys; the loss is on the answers only.

    Formats: `messages` (role, content), sharegpt's `conversations` (from, value), alpaca's `instruction`, `input`,
    `output`; `prompt`, `completion`; `question`, `choices`, `label` (trained on the right choice, scored as multiple
    choice); `question`, `answer`; `text`; and `input_ids` with `labels` or without. Answers that end in "#### number"
    are also scored by that number.

    Args:
        train: A json, jsonl, csv or parquet file, or a Hugging Face data set with its split, such as
            "openai/gsm8k:train".
        validation: The same for validation; absent: some training rows are held out.
        heldout: How many rows those are, chosen by a hash of the row.
        config: Which configuration of the Hugging Face data set, where it has several.
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
        at_least(0, heldout=heldout)
        self.train, self.validation, self.heldout, self.config = train, validation, heldout, config
        self.val_names = [HELDOUT] if heldout or validation else []

    def read_rows(self) -> dict[str, list[Row]]:
        """Training rows, and those that are scored."""
        rows = read(self.train, self.config)
        if self.validation is not None:
            return {TRAIN: rows, HELDOUT: read(self.validation, self.config)}
        train, heldout = split(rows, self.heldout, self.train)
        return {TRAIN: train, HELDOUT: heldout} if heldout else {TRAIN: train}
