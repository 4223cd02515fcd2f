"""What reads calls, on texts that are none and go on for long."""

import pytest

from lmkit.replies import readers
from lmkit.replies.readers import Reader


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "reader, text",
    [
        (readers.behind_name, "f" * 1_000_000),
        (readers.behind_name, "f " * 500_000 + "}"),
        (readers.as_xml, f"<function=f>{'<parameter=' * 100_000}</function>"),
        (readers.as_pairs, "f" + "<arg_key>k" * 100_000),
        (readers.as_pairs, "f<arg_key>k" + "</arg_key>" * 100_000),
        (readers.unquoted, "f{" + "a" * 1_000_000),
        (readers.as_python, "f(" * 1_000_000),
        (readers.as_json, "[" * 1_000_000),
    ],
)
def test_a_long_text_that_is_no_call_is_refused_soon(reader: Reader, text: str) -> None:
    """What a model may write takes time that grows with its length, not with its square."""
    with pytest.raises((ValueError, RecursionError)):
        reader(text, {})


def test_a_name_is_read_whole() -> None:
    """What stands between it and the arguments is no part of it."""
    for text in ('functions.get_it:0<|message|>{"a": {}}', 'get_it:0[ARGS]{"a": {}}', ' get_it:0 {"a": {}}`'):
        assert readers.behind_name(text, {}) == [("get_it:0", {"a": {}})]
    found = readers.as_xml("<function=f>\n<parameter=a>\n<b>\n</parameter>\n</function>", {})
    assert found == [("f", {"a": "<b>"})]
