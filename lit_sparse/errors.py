"""The exception for errors that the user can fix."""


class BadInput(ValueError):
    """An error the user can fix: the message says what was asked, what holds and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
