"""How the package speaks to its user when something stops."""

import re

STOPPED = 75
"""Exit code of a process that a signal stopped in good order, so that the same command goes on: the
system's EX_TEMPFAIL, a failure that another attempt may not meet."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, by the shells' convention; of a training run, in good order too."""


class PHAError(ValueError):
    """Something the user can put right: the message says what is wrong and what to do.

    The command line prints it as one line and exits with code 2, without a traceback.
    """


class StoppedError(KeyboardInterrupt):
    """A signal other than that of Ctrl-C asked this process to leave."""


class TrainingInterruptedError(Exception):
    """A run was asked to stop and has written a checkpoint: early, but nothing is wrong.

    Attributes:
        code: the exit code of the process, `STOPPED` or `INTERRUPTED`.
    """

    def __init__(self, message: str, code: int = STOPPED) -> None:
        super().__init__(message)
        self.code = code


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the machine's or a GPU's, has run out."""
    # By name, as this must not import torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = (
        r"DefaultCPUAllocator|not enough memory|[Cc]an(not|'t) allocate memory|bad_alloc"
        r"|can't start new thread"
    )
    return isinstance(error, RuntimeError | OSError) and bool(re.search(said, str(error)))
