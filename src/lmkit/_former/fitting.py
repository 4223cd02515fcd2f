"""Moved to `lmkit.planning.layout`."""

from lmkit.planning.layout import Layout, ModulePlan
