"""Moved to `lmkit.options.generation`."""

from lmkit.options.generation import Beam, Greedy, Sample
