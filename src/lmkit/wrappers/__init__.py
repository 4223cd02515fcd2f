"""What a user holds: `Generator`, `Translator` and `Unmasker`, with their verbs.

A wrapper turns what it is given into rows with options, hands them to `engine` or `masked`, and makes results of what
comes back, in order, from threads and for asyncio. How a model is loaded is `loading`'s.
"""
