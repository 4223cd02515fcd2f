from typing import Any

import pytest

import chat_templates
import lmkit
from lmkit.text.chats import Chats
from lmkit.text.codec import Codec
from lmkit.text.templates import RESERVED, parsed

CHAT = [{"role": "user", "content": "hi"}]
NAMED = {
    "rag": "{% for d in documents %}{{ d.text }}{% endfor %}{{ messages[0].content }}",
    "tool_use": "{{ tools[0].name }}!",
}


def chats(template: Any) -> Chats:
    """Return what writes chats with a template, or several by name."""
    tokenizer = chat_templates.byte_level()
    tokenizer.chat_template = template
    return Chats(Codec(tokenizer))


@pytest.mark.parametrize(
    "given, told",
    [
        (
            {"enable_thinkng": False},
            r"does not read 'enable_thinkng'.*Did you mean 'enable_thinking'\? .*reads: .*'enable_thinking',.*'tools'",
        ),
        ({"documents": [{"text": "a"}]}, "does not read 'documents'.*reads: .*'enable_thinking', .*'tools'"),
        ({5: 5}, "does not read 5"),
        ({"self": 1}, "does not read 'self'"),
    ],
)
def test_what_a_template_does_not_read_is_an_error(given: Any, told: str) -> None:
    """A name that the template does not know is told, with those that it does."""
    with pytest.raises(lmkit.OptionError, match=told):
        chats(chat_templates.TEMPLATES["thinking"]).encode(CHAT, given)


def test_tools_for_a_template_without_are_an_error() -> None:
    """Tools, and calls of them in messages, do not vanish."""
    here = chats(chat_templates.TEMPLATES["chatml"])
    with pytest.raises(lmkit.OptionError, match=r"does not read 'tools'.*made for tools.*it reads: nothing"):
        here.encode(CHAT, {"tools": [{"name": "f"}]})
    with pytest.raises(lmkit.OptionError, match=r"message 1 has 'tool_calls'.*does not read them"):
        here.encode([*CHAT, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}], {})


def test_functions_are_tools() -> None:
    """A function is described to the template as transformers describes it."""

    def add(a: int) -> int:
        """Add one.

        Args:
            a: A number.
        """
        return a + 1

    here = chats(chat_templates.TEMPLATES["thinking"])
    expected = here._codec.tokenizer.apply_chat_template(CHAT, tools=[add], add_generation_prompt=True)["input_ids"]
    assert here.encode(CHAT, {"tools": [add]})[1] == expected


@pytest.mark.parametrize(
    "content", [[{"type": "text", "text": "hi"}], {"text": "hi"}, [{"type": "text", "text": "a'b"}]]
)
@pytest.mark.parametrize("name", ["chatml", "documents"])
def test_parts_that_would_be_printed_as_a_list_are_an_error(name: str, content: Any) -> None:
    """A template that knows no parts of a content does not print them as Python does."""
    with pytest.raises(
        lmkit.OptionError, match="message 0: this checkpoint's chat template reads a content of one text"
    ):
        chats(chat_templates.TEMPLATES[name]).encode([{"role": "user", "content": content}], {})


def test_parts_that_a_template_reads_are_fine() -> None:
    """Parts of a content are taken where the template takes them apart, or writes them as JSON."""
    message = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    assert (
        chats(chat_templates.TEMPLATES["parts"]).encode([message], {})[0].startswith("<|im_start|>user\nhi<|im_end|>")
    )
    assert '[{"type": "text", "text": "hi"}]' in chats(chat_templates.TEMPLATES["headers"]).encode([message], {})[0]


@pytest.mark.parametrize("name", RESERVED)
def test_what_lmkit_sets_is_told_by_name(name: str) -> None:
    """Arguments of `apply_chat_template` that are not the template's are an error that says why."""
    with pytest.raises(lmkit.OptionError, match=f"template= cannot set '{name}': {RESERVED[name]}"):
        chats(chat_templates.TEMPLATES["chatml"]).encode(CHAT, {name: True})


def test_named_templates_are_chosen_by_name() -> None:
    """One of several templates is named; without a default, none is taken silently, and no name is a template."""
    here = chats(NAMED)
    assert here.encode(CHAT, {"chat_template": "rag", "documents": [{"text": "x "}]})[0] == "x hi"
    assert here.encode(CHAT, {"tools": [{"name": "f"}]})[0] == "f!"
    with pytest.raises(
        lmkit.OptionError, match=r"several chat templates and no default: choose one of 'rag', 'tool_use'"
    ):
        here.encode(CHAT, {})
    with pytest.raises(lmkit.OptionError, match=r"'ragg'} is no template of this checkpoint. Did you mean 'rag'\?"):
        here.encode(CHAT, {"chat_template": "ragg"})
    assert chats(NAMED | {"default": "{{ messages[0].role }}"}).encode(CHAT, {})[0] == "user"


def test_a_template_may_be_given() -> None:
    """A template of the caller's own is used in place of the checkpoint's, or where it has none."""
    for own in (chat_templates.TEMPLATES["chatml"], None):
        assert chats(own).encode(CHAT, {"chat_template": "[{{ messages[0].content }}]"})[0] == "[hi]"
    with pytest.raises(
        lmkit.OptionError, match=r"'rag'} is no template of this checkpoint. It has one, without a name"
    ):
        chats(chat_templates.TEMPLATES["chatml"]).encode(CHAT, {"chat_template": "rag"})


@pytest.mark.parametrize(
    "source", ["{{ 1 / 0 }}", "{{ messages[0].content", "{{ messages[0].x.y }}", "{{ 'a' + 1 }}", "{% nonsense %}"]
)
def test_whatever_a_template_raises_is_an_option_error(source: str) -> None:
    """A template is a program: its own errors, of whatever kind, are told as one."""
    with pytest.raises(lmkit.OptionError, match="chat template refuses these messages"):
        chats(source).encode(CHAT, {})


def test_a_template_with_marks_for_training_is_read() -> None:
    """Blocks that mark the assistant's tokens, and loop controls, are no obstacle."""
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}{{ x }}"
    assert parsed(source).variables == {"x"}
    assert chats(source).encode(CHAT, {"x": "!"})[0] == "hi!"
