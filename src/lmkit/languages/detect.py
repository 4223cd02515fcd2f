"""Which of a checkpoint's languages a text is written in, by an optional offline detector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmkit.errors import LanguageError, MissingExtraError

if TYPE_CHECKING:
    from lmkit.languages.names import Resolver

DETECT = "detect"
"""The word for a source language that is to be found."""


class Detector:
    """`py3langid`, limited to the languages of a checkpoint. Threads may share it.

    Attributes:
        languages: Those that it can find, as the checkpoint writes them.
    """

    def __init__(self, resolver: Resolver) -> None:
        """Load the detector's model.

        Raises:
            MissingExtraError: The detector is not installed.
            LanguageError: It knows none of the checkpoint's languages.
        """
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError as error:
            raise MissingExtraError(
                f"source='detect' needs a package that is not installed: pip install \"lmkit[detect]\" ({error})"
            ) from error
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        self._resolver = resolver
        known = [label for label in self._identifier.labels if label != "zxx" and resolver.find(label)]
        if not known:
            raise LanguageError(
                "source='detect': the detector knows none of this checkpoint's languages. Pass the source instead."
            )
        self._identifier.set_languages(known)
        self.languages = tuple(dict.fromkeys(code for label in known if (code := resolver.find(label))))

    def __call__(self, text: str) -> str | None:
        """Return the code of the text's language, None where nothing speaks for any."""
        if not any(map(str.isalpha, text)):
            return None
        ranks = self._identifier.rank(text)
        if len(ranks) > 1 and ranks[0][1] == ranks[-1][1]:  # no feature of the model was seen
            return None
        label = ranks[0][0]
        if label == "zh" and (traditional := self._resolver.find("zh-Hant")) and _is_traditional(text):
            return traditional
        return self._resolver.find(label)


def _is_traditional(text: str) -> bool:
    """Say whether more of a text's characters are in Big5 alone than in GB 2312 alone."""
    big5, gb2312 = ({char for char in text if char.encode(name, "ignore")} for name in ("big5", "gb2312"))
    return len(big5 - gb2312) > len(gb2312 - big5)
