"""What each translation family calls a language, what a person calls it, and how both reach the model.

Families and words alone: which text is translated, and in what pieces, is `wrappers`' and `documents`'.
"""

from lmkit.languages.families import Languages, Prepared, languages_of
from lmkit.languages.names import Names, script

__all__ = ["Languages", "Names", "Prepared", "languages_of", "script"]
