"""The error of a model folder that is not whole."""

from __future__ import annotations

from kolotune.foundation.errors import ArtifactError


class MissingWeightsError(ArtifactError):
    """A model folder lacks weights that its config requires."""
