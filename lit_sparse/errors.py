"""The one exception that is the user's to act on."""


class BadInput(ValueError):
    """Something asked for cannot be had: the message says what was asked, what holds and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
