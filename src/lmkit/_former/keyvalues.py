"""Moved to `lmkit.planning.keyvalues`."""

from lmkit.planning.keyvalues import KeyValueBytes
