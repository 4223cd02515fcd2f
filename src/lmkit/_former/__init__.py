"""Modules that 0.1 had beside `errors`: where pickles made by it look for classes that are in a room since.

`lmkit`'s `__path__` has this folder as well, so that the old names can be imported. Nothing else imports from here, and
nothing is added.
"""
