"""Moved to `lmkit.planning.placement`."""

from lmkit.planning.placement import Placement
