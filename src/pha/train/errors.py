"""How a run can end early without anything being wrong."""


class TrainingInterruptedError(Exception):
    """The run was asked to stop and has written a checkpoint."""
