"""How the package speaks to its user when something stops."""


class PHAError(ValueError):
    """Something the user can put right: the message says what is wrong and what to do.

    The command line prints it as one line and exits with code 2, without a traceback.
    """


class TrainingInterruptedError(Exception):
    """A run was asked to stop and has written a checkpoint: early, but nothing is wrong."""
