"""Errors of Lightning, of loggers and of the operating system that are the user's, told in a sentence."""

import errno
import linecache
import re

from huggingface_hub.errors import StrictDataclassError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_sparse.errors import BadInput

LIBRARIES = {"lightning": "Lightning", "wandb": "wandb", "mlflow": "MLflow", "comet_ml": "Comet"}
"""Packages whose own refusals are the user's to heed, with their names."""
OF_THE_SYSTEM = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EISDIR", "ENOTDIR", "ENAMETOOLONG", "EMFILE")
"""Errors of the operating system that the user can do something about."""


def understood(error: BaseException) -> BadInput | None:
    """Return `error`, or one that it was raised from, as an error of the user's; None if it is ours.

    Those are `BadInput`, what Lightning raises itself (and not what it runs into), values that the profiler refuses,
    and the operating system's refusals, with the notes of `error`, which say how to go on.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BadInput):
            return cause
        if isinstance(cause, OSError) and errno.errorcode.get(cause.errno or 0) in OF_THE_SYSTEM:
            place = f"{cause.filename}: " if cause.filename is not None else ""
            then = " ".join(getattr(error, "__notes__", ["Then run the command again."]))
            return BadInput(f"{place}{cause.strerror}; make room or give another path. {then}")
        library = "lightning" if isinstance(cause, MisconfigurationException) else raised_by(cause)
        if library in LIBRARIES:
            return BadInput(in_a_sentence(LIBRARIES[library], cause))
        if library == "lit_sparse_profiling" and isinstance(cause, ValueError):  # which knows no BadInput
            return BadInput(str(cause))
        cause = cause.__cause__
    return None


MALFORMED = (TypeError, AttributeError, KeyError, IndexError, RecursionError)
"""Errors that Python raises where a file of a model has a list, say, in place of an object, or is nested too deeply."""


def refusal_of(error: Exception) -> str:
    """Return why transformers refuses a model: the first line of its error, or all of one on a value in a config."""
    text = str(error).strip()
    return " ".join(text.split()) if isinstance(error, StrictDataclassError) else text.splitlines()[0]


def met_in_transformers(error: BaseException) -> bool:
    """Return whether transformers' own code, or its reading of JSON, ran into `error`, as on a malformed file."""
    traceback, name = error.__traceback__, ""
    while traceback is not None:
        name, traceback = str(traceback.tb_frame.f_globals.get("__name__")), traceback.tb_next
    return name.partition(".")[0] in ("transformers", "tokenizers", "json")


def raised_by(error: BaseException) -> str | None:
    """Return the name of the package whose statement `raise` raised `error`; None if no such statement did."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return None
    code = traceback.tb_frame.f_code
    line = linecache.getline(code.co_filename, traceback.tb_lineno).strip()
    return str(traceback.tb_frame.f_globals.get("__name__")).partition(".")[0] if line.startswith("raise ") else None


def in_a_sentence(library: str, error: BaseException) -> str:
    """Return what a library refuses, and the command that installs a package which it lacks."""
    text = " ".join(str(error).split())
    if found := re.search(r"pip install (?:-U )?'?([\w.\[\]-]+)", text):
        return f"the package {found[1]} is needed and not installed; run pip install {found[1]}."
    return f"{library} refuses this: {text}"
