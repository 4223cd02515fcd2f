"""What a chat model has written, as data: its reasoning, its calls of tools, and what is left for the reader.

Nothing here runs a model. How a checkpoint writes is found in its chat template, `scanner` reads it as it comes, and
`tools` describes, checks and, where it is asked to, runs functions.
"""
