import dataclasses
import json
import math
from typing import Any

import pytest

import lmkit
from checkpoints import wrapper
from lmkit import results
from lmkit.results.base import Result

TIMING = results.Timing(2.0, 0.5, 1.5)
LOGPROB = results.TokenLogprob("a", 1, -0.5, (results.TokenLogprob("b", 2, -1.5),))
CALL = results.ToolCall("f", {"a": [1, None]}, "f()", "cut")
COMPLETION = results.Completion(
    "a", (1, 2), None, "stop", "x", (LOGPROB,), 3, content="b", reasoning="c", tool_calls=(CALL,)
)
GENERATION = results.Generation("p", (COMPLETION, COMPLETION), 4, 7, True, TIMING)  # noqa: FBT003
TRANSLATION = results.Translation(
    *(getattr(GENERATION, field.name) for field in dataclasses.fields(GENERATION)),
    source="s", source_language="en", target_language=None, segments=(results.Segment(0, 3, 0, 5, ("split",)),),
)  # fmt: skip
CANDIDATE = results.Candidate("a", ("a",), ("a",), (1,), (-1.5,), (0,), "pair")
SCORE = results.Score("a b", ("a", " b"), (1, 2), (-1.0, -2.0), None, (1,))
CHOICE = results.Choice("b", 1, -3.0, 1.0, SCORE)
ALL: list[Result] = [
    *(TIMING, LOGPROB, CALL, COMPLETION, GENERATION, TRANSLATION, CANDIDATE, SCORE, CHOICE, TRANSLATION.segments[0]),
    results.MaskSlot(0, 6, (CANDIDATE,), 0, 10, in_pair=True),
    results.Unmasking("m", (results.MaskSlot(0, 6, (CANDIDATE,), 0, 10),), (CANDIDATE,), 3),
    results.Ranking((CHOICE,), "none"),
    results.EngineStats(*range(8)),
    results.JobReport("out.jsonl", *range(7)),
    results.TextChunk("t", 1),
    results.TextChunk("t", 1, "stop", GENERATION),
    results.TextChunk("t", 1, "stop", TRANSLATION),
]


def test_every_class_of_results_is_tried() -> None:
    """The round trips below cover each dataclass that `lmkit.results` has."""
    public = {kind for kind in vars(results).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    assert {type(one) for one in ALL} == public


@pytest.mark.parametrize("result", ALL, ids=lambda one: type(one).__name__)
def test_from_dict_undoes_to_dict(result: Result) -> None:
    """What `to_dict` returned becomes an equal result of the same class, after JSON too, with tuples for lists."""
    plain = result.to_dict()
    for data in (plain, json.loads(json.dumps(plain, allow_nan=False))):
        made = type(result).from_dict(data)
        assert made == result
        assert repr(made) == repr(result)


@pytest.mark.parametrize(
    "name, text, options",
    [
        ("llama", "She", {"logprobs": 2, "temperature": 1.0, "seed": 1, "max_new_tokens": 4}),
        ("gpt2", "She", {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4}),
        ("t5", "Birds fly.", {"source": "en", "target": "de", "max_new_tokens": 4}),
        ("bert", "Birds [MASK] [MASK].", {}),
    ],
)
def test_results_of_real_calls_come_back(name: str, text: str, options: Any) -> None:
    """Results, scores and rankings of tiny models are made again of their JSON."""
    model = wrapper(name)
    told = {"source": "en", "target": "de"} if name == "t5" else {}
    ranked = model.rank(["a b", "c"]) if name == "bert" else model.rank(text, ["a b", "c"], **told)
    for result in (model(text, **options), ranked, ranked.choices[0].score, model.stats):
        assert type(result).from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_a_base_class_makes_the_class_whose_fields_are_there() -> None:
    """`Generation.from_dict` makes a translation of what a translation wrote."""
    assert lmkit.Generation.from_dict(TRANSLATION.to_dict()) == TRANSLATION


def test_a_float_that_json_cannot_write_comes_back_as_nan() -> None:
    """Infinities are None in `to_dict`; where the field is a float, None is read as NaN."""
    plain = dataclasses.replace(LOGPROB, logprob=-math.inf, top=()).to_dict()
    assert plain["logprob"] is None
    assert math.isnan(lmkit.TokenLogprob.from_dict(plain).logprob)
    assert lmkit.Completion.from_dict(COMPLETION.to_dict()).score is None


def test_what_is_missing_has_its_default() -> None:
    """Older JSON without later fields is read; what can be computed need not be there."""
    assert lmkit.TextChunk.from_dict({"text": "t", "index": 2}) == lmkit.TextChunk("t", 2)
    assert lmkit.Score.from_dict({"text": "", "tokens": [], "token_ids": [], "token_logprobs": []}).unknown == ()


def test_wrong_keys_are_errors_that_name_them() -> None:
    """Keys that are no fields, and fields that are missing, are named, inner ones with their class."""
    timing = TIMING.to_dict()
    with pytest.raises(lmkit.OptionError) as caught:
        lmkit.Timing.from_dict(timing | {"minutes": 1, "hours": 2})
    fields = "Its fields are: 'seconds', 'seconds_to_first_token', 'tokens_per_second'."
    assert str(caught.value) == f"Timing.from_dict does not know 'hours', 'minutes'. {fields}"
    del timing["seconds"]
    with pytest.raises(lmkit.OptionError) as caught:
        lmkit.Generation.from_dict(GENERATION.to_dict() | {"timing": timing})
    assert str(caught.value) == f"Timing.from_dict also needs 'seconds'. {fields}"
    with pytest.raises(lmkit.OptionError, match=r"Timing.from_dict takes what to_dict returned, not \[\]"):
        lmkit.Timing.from_dict([])  # type: ignore[arg-type]
