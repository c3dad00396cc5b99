"""The fixtures of the layers serve the mixers too."""

from tests.model.conftest import (  # noqa: F401
    plain_context,
    registry,
    scramble,
    seed,
    small,
    spy,
)
