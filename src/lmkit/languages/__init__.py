"""What each translation family calls a language, what a person calls it, and how both reach the model."""

from lmkit.languages.families import Languages, Prepared, languages_of
from lmkit.languages.names import Names

__all__ = ["Languages", "Names", "Prepared", "languages_of"]
