"""The one exception that users are meant to see."""


class PHAError(ValueError):
    """Something the user can put right: the message says what is wrong and what to do.

    The command line prints it as one line and exits with code 2, without a traceback.
    """
