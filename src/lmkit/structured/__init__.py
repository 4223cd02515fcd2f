"""Answers that are data: what they must be, which tokens that leaves at each step, and the object in the end.

`outputs` says what callers may ask for and reads values from texts, `vocabulary` spells a tokenizer's tokens,
`grammars` has llguidance say which may come next. The masks are laid on the scores in the engine.
"""
