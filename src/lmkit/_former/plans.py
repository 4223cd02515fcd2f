"""Moved to `lmkit.planning.plan`."""

from lmkit.planning.plan import LoadPlan
