"""lmkit as a user's code sees it: checked by mypy and basedpyright, never run."""

from typing import assert_type

import lmkit

assert_type(lmkit.load("causal", "any/name"), lmkit.Generator)
assert_type(lmkit.load("seq2seq", "any/name"), lmkit.Translator)
assert_type(lmkit.load("masked", "any/name"), lmkit.Unmasker)
