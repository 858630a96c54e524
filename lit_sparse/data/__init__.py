"""Lightning data modules: the embedded demo data, your own instructions or text, labelled texts, and random tokens."""

from lit_sparse.data.embedded import Embedded
from lit_sparse.data.instructions import Instructions
from lit_sparse.data.labelled import Labelled
from lit_sparse.data.module import TokenData
from lit_sparse.data.rows import final_number
from lit_sparse.data.synthetic import Synthetic
from lit_sparse.data.text import Text

__all__ = ["Embedded", "Instructions", "Labelled", "Synthetic", "Text", "TokenData", "final_number"]
