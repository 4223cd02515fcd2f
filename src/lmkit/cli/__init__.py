"""The command line, thin over `load()` and `plan()`: what is typed, what is shown, and exit codes.

Anything that a program would want as well belongs in the rooms below; here are only words and streams.
"""
