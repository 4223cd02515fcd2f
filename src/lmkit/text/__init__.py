"""Text to token ids and back, and which part of a long text a model is given.

The tokenizer is shared by threads and never changed. How the text of an answer grows is `engine.stream_text`'s; what a
family writes around a text, such as a language, is `languages`'.
"""
