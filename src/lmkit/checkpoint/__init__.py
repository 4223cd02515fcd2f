"""From a name to a checkpoint's files, and what they say of themselves: config, task, headers, tokenizer.

Nothing here reads a weight, and nothing decides how one is held: that is `planning`. What a file says is checked before
it is believed, since anybody may have written it.
"""
