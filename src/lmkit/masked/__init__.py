"""Texts with masks: what stands in their place, searched jointly or drawn, and how likely the tokens of a text are.

Asks the passes of `engine` in rounds and knows nothing of batches. The verbs of an `Unmasker` are in `wrappers`.
"""
