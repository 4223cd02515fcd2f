"""Forward passes that need no loop: given tokens scored, masks read, by one runner that batches, retries, takes turns.

What is asked comes from `wrappers.scoring` and `masked`; tokens that are written one by one are `engine.decoders`'.
"""
