"""Moved to `lmkit.planning.precision`."""

from lmkit.planning.precision import Precision
