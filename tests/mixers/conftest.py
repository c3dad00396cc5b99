"""The fixtures of the layers serve the mixers too."""

from tests.model.conftest import (  # noqa: F401
    registry,
    seed,
    spy,
)
