"""zuko, imported when a flow is first asked for, and without what its import switches off."""

from __future__ import annotations

__all__ = ["zuko"]

from typing import Any

from torch.distributions import Distribution


def zuko() -> Any:
    """Return zuko, with the validation of torch's distributions as it was before.

    Its import switches that off for the whole process.
    """
    before = Distribution._validate_args
    import zuko as package

    Distribution.set_default_validate_args(before)
    return package
