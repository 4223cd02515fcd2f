"""The language that a whole model works in, where a checkpoint has weights for each and its tokens do not say which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmkit.errors import OptionError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_language(config: PreTrainedConfig, wanted: object, name: str) -> str | None:
    """Return the language that a model is to be told: the one that is wanted, or X-MOD's own default.

    Messages call the checkpoint by `name`.

    Raises:
        OptionError: It is none of the checkpoint's, or none is given and the checkpoint has several.
    """
    known = _languages(config)
    told = (getattr(config, "default_language", None) if known else None) if wanted is None else wanted
    if told is not None and told not in known:
        have = f"it has {listed(known)}" if known else "its weights are the same for all: leave language= out"
        raise OptionError(f"language={told!r} is not one that {name!r} is told when it is loaded: {have}.")
    if told is None and known:
        raise OptionError(
            f"{name!r} has weights of their own for {len(known)} languages, and without one it works in none: pass "
            f"language= to load() and plan(), one of {listed(known)}."
        )
    return None if told is None else str(told)


def put_on(model: Any, language: str | None) -> None:
    """Have a model work in a language, whatever reads with it."""
    if language is None:
        return
    if model.config.model_type == "xmod":
        model.set_default_language(language)
        return
    import torch

    number = _languages(model.config).index(language)

    def tell(_body: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        token_ids = given[0] if given else named["input_ids"]
        return given, {**named, "langs": torch.full_like(token_ids, number)}

    model.base_model.register_forward_pre_hook(tell, with_kwargs=True)


def _languages(config: Any) -> list[str]:
    """Name the languages that have weights of their own, in the order of these."""
    if config.model_type == "xmod":
        return list(config.languages)
    count = config.n_langs if getattr(config, "use_lang_emb", False) else 1
    names = {number: name for name, number in (getattr(config, "lang2id", None) or {}).items()}
    return [names.get(number, str(number)) for number in range(count)] if count > 1 else []
