"""Push an export to the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import validate_repo_id

from lit_sparse.errors import BadInput

ANSWERS = {
    401: "the token is not valid; log in with hf auth login, or set HF_TOKEN to a valid one",
    403: "the token may not write there; give a token with write access, or a name of your own",
    409: "there is one of that name already; give another name, or --overwrite to add a commit to it",
}
"""Meanings of the Hub's statuses for a push."""


def check_pushable(name: str, overwrite: bool) -> None:
    """Check, before anything is computed, that an export can be pushed to the repository `name`.

    Raises:
        BadInput: if it is no `user/name`, there is no valid token or no network, or it exists and `overwrite` is false.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(f"--push {name!r} names no repository of the Hub ({error}); give user/name.") from error
    if "/" not in name:
        raise BadInput(f"--push {name!r} names no repository of the Hub; give user/name.")
    if get_token() is None:
        raise BadInput(f"--push {name} needs a token of the Hub; log in with hf auth login, or set HF_TOKEN.")
    with readable_failures(name):
        HfApi().whoami()
        if HfApi().repo_exists(name) and not overwrite:
            raise BadInput(
                f"--push {name}: there is a repository of that name already; give another name, or --overwrite to add "
                "a commit to it."
            )


def create(name: str, private: bool) -> None:
    """Make the repository `name`, unless it exists.

    Raises:
        BadInput: if the Hub refuses, or cannot be reached.
    """
    with readable_failures(name):
        HfApi().create_repo(name, private=private or None, exist_ok=True)


def upload(name: str, files: dict[str, Path], message: str) -> None:
    """Add one commit with `files`, by their paths in the repository `name`; print where they are then.

    Raises:
        BadInput: if the Hub refuses, or cannot be reached.
    """
    operations = [CommitOperationAdd(path, file) for path, file in files.items()]
    with readable_failures(name):
        commit = HfApi().create_commit(name, operations, commit_message=message)
    print(f"Pushed to {commit.repo_url}.")


@contextmanager
def readable_failures(name: str) -> Iterator[None]:
    """Convert errors of the Hub and the network into one sentence.

    Raises:
        BadInput: saying what failed, and what to do.
    """
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = ANSWERS.get(status, f"the Hub answered {status} ({first_line(error)}); try again later")
        raise BadInput(f"--push {name} was refused: {said}.") from error
    except RuntimeError as error:  # of an upload: its cause says why
        raise BadInput(
            f"--push {name} failed: {first_line(error)} ({first_line(error.__cause__ or error)})."
        ) from error
    except (HTTPError, OSError) as error:
        raise BadInput(
            f"--push {name}: the Hub cannot be reached ({first_line(error)}); check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE."
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
