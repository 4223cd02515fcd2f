"""Batches whose rows advance together, a token each: causal models, encoder-decoders, beams, and what `generate` runs.

All answer to the interface in `base`, so that the loop in `engine.batches` does not know which one it steps. Which rows
begin when is `engine.scheduler`'s.
"""
