"""Errors of Lightning, of loggers and of the operating system that are the user's, told in a sentence."""

import errno
import linecache
import re
from pickle import UnpicklingError
from traceback import walk_tb

import torch
from huggingface_hub.errors import StrictDataclassError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

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


OOM = (
    *("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory"),
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)
"""Messages of out-of-memory errors outside of the CUDA allocator, which torch raises as plain RuntimeErrors."""


def is_oom(exception: BaseException) -> bool:
    """Return true if the device or the host ran out of memory."""
    if isinstance(exception, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(exception, RuntimeError) and any(text in str(exception) for text in OOM)


REFUSED = (OSError, ValueError, SafetensorError, StrictDataclassError)
"""Errors by which transformers refuses the files of a model."""
MALFORMED = (
    *(TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, EOFError),
    *(RecursionError, UnpicklingError),
)
"""Errors that transformers and torch run into where a file of a model has a list, say, or a 0 that it must not have."""


def due_to_files(error: Exception) -> bool:
    """Return whether `error`, raised while a tokenizer or a model is made of its files, is about what they have."""
    # A plain RuntimeError: errors of the device and of other ranks, and a lack of memory, have classes of their own.
    met = isinstance(error, MALFORMED) or (type(error) is RuntimeError and not is_oom(error))
    return isinstance(error, REFUSED) or (met and met_in_transformers(error))


def refusal_of(error: Exception) -> str:
    """Return why the files of a model are refused: the first line of an error, or all of one on a value in a config.

    Of an error that Python or torch raised on the way, it is named what kind of error that is.
    """
    text = str(error).strip()
    if isinstance(error, UnpicklingError):  # torch's text tells how to run the code
        return "it is no file of weights, or it has code in it, which is not run; give weights in safetensors"
    if isinstance(error, StrictDataclassError):
        return " ".join(text.split())
    line = next(iter(text.splitlines()), "")
    return line if isinstance(error, REFUSED) else f"{type(error).__name__}: {line}"


def met_in_transformers(error: BaseException) -> bool:
    """Return whether transformers, or what it called itself, ran into `error`: no code of ours was called since."""
    traceback, met = error.__traceback__, False
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__")).partition(".")[0]
        met = name in ("transformers", "tokenizers") or (met and not name.startswith("lit_sparse"))
        traceback = traceback.tb_next
    return met


def raised_by(error: BaseException) -> str | None:
    """Return the name of the package whose statement `raise` raised `error`; None if no such statement did."""
    module, line = origin(error)
    return module.partition(".")[0] if line.startswith("raise ") else None


def origin(error: BaseException) -> tuple[str, str]:
    """Return the module in which `error` began, and the line of code there; two empty texts if it was never raised."""
    name = line = ""
    for frame, number in walk_tb(error.__traceback__):
        name, line = str(frame.f_globals.get("__name__")), linecache.getline(frame.f_code.co_filename, number).strip()
    return name, line


def in_a_sentence(library: str, error: BaseException) -> str:
    """Return what a library refuses, and the command that installs a package which it lacks."""
    text = " ".join(str(error).split())
    if found := re.search(r"pip install (?:-U )?'?([\w.\[\]-]+)", text):
        return f"the package {found[1]} is needed and not installed; run pip install {found[1]}."
    return f"{library} refuses this: {text}"
