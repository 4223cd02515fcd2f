"""Chat templates run in bounds, and write what plain transformers writes."""

# ruff: noqa: E501 - templates are read whole, and have braces

import threading
import time
from typing import Any

import pytest

import chat_templates
import lmkit
from lmkit.text.chats import Chats
from lmkit.text.codec import Codec, turn_end
from lmkit.text.meter import SECONDS, Meter
from lmkit.text.sandbox import LONGEST_SOURCE, written

CHAT = [
    {"role": "user", "content": "a < b,\nc"},
    {"role": "assistant", "content": " d", "n": 3, "x": [1.5, None, {"k": "v"}]},
]
MANY, END = "{% for i in range(100000) %}", "{% endfor %}"


def grown(first: str, more: str) -> str:
    """Return a template that makes more of a value as often as it can."""
    return (
        "{% set ns = namespace(a="
        + first
        + ") %}"
        + MANY
        + "{% set ns.a = "
        + more
        + " %}"
        + END
        + "{{ ns.a | first }}"
    )


def nested(first: str, more: str) -> str:
    """Return a template that puts a value into another sixty times, and writes it."""
    return grown(first, more).replace("100000", "60").replace(" | first", "")


LARGE = [
    "{{ 'a' * 10**9 }}", "{{ [1] * 10**9 }}", "{{ 10**9 * 'a' }}", "{{ 2 ** 1000000000 }}", "{{ (-7) ** 100000000 }}",
    "{{ 'a' | center(1000000000) }}", "{{ 'a'.ljust(10**9) }}", "{{ '1'.zfill(10**9) }}", "{{ '\t'.expandtabs(10**9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}", "{{ '%*d' % (10**9, 1) }}",
    "{{ '%.1000000000f' | format(1) }}", "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "{{ '%1000000000d'.encode() % 1 }}", "{{ '{:1000000000}'.format(1) }}", "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ ('{0}' * 300000).format('x' * 1000000) }}", "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "{{ ('{:1000000000}' | attr('format'))(1) }}", "{{ ('{:1000000000}' | escape).format(1) }}",
    "{{ range(100000) | join('x' * 100000) }}", "{{ ('x' * 100000).join(range(100000) | map('string')) }}",
    "{{ ('a' * 100000) | replace('a', 'x' * 100000) }}", "{{ ('a' * 100000).replace('', 'x' * 100000) }}",
    "{{ ('a' * 100000) | replace(new='x' * 100000, old='a') }}", "{{ ['a'] * 9999 | join(attribute='x', d='x' * 100000) }}",
    "{{ ('\n' * 100000) | indent(100000, true, true) }}", "{{ ('a' * 100000).translate({97: 'x' * 100000}) }}",
    "{{ ('a' * 1000000) | wordwrap(1) }}", "{{ ('<>' * 500000) | striptags }}", "{{ ('(' * 1000000) | urlize }}",
    "{{ ([1] * 100000) | tojson(indent=100000) }}", "{{ ([1] * 100000) | tojson(separators=('x' * 100000, ':')) }}",
    "{{ [1] | batch(10**9, 0) | list }}", "{{ [1] | slice(10**9) | list }}", "{{ lipsum(10**9) }}",
    "{{ 1 | round(10**9) }}", "{{ 1.5 | round(10**9, 'ceil') }}", "{{ ('f' * 1000000) | int(0, 16) }}",
    "{{ (1).to_bytes(10**9) }}", "{{ ('ü' * 1000000).encode('idna') }}", "{{ ([[1]] * 60000) | sum(start=[]) }}",
    "{{ strftime_now('%c' * 300000) }}", "{{ ['a'] | map('center', 10**9) | list }}",
    "{% filter center(10**9) %}a{% endfilter %}", "{% set a | center(10**9) %}a{% endset %}",
    "{% set a = 'a' * 1000000 %}{{ a" + " ~ a" * 1000 + " }}", MANY + "{{ 'a' * 1000000 }}" + END, MANY * 2 + "a" + END * 2,
    "{% set a %}" + MANY + "{{ 'a' * 1000 }}" + END + "{% endset %}",
    "{% macro f() %}" + MANY * 2 + "a" + END * 2 + "{% endmacro %}{{ f() }}",
    "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}" + MANY * 2 + "a" + END * 2 + "{% endcall %}",
    *(grown(first, more) for first, more in [
        ("'a'", "ns.a + ns.a"), ("'a'", "ns.a ~ ns.a"), ("[1]", "ns.a + ns.a"), ("3", "ns.a * ns.a"), ("[]", "ns.a + ['a' * 9999 ~ i]"),
        ("'a'", "[ns.a] | string"), ("(1,)", "(ns.a,)"), ("[1]", "ns.a | map('string')"), ("[]", "dict.fromkeys(range(100000), i)"),
    ]),
    *(nested(first, more) for first, more in [
        ("[1]", "[ns.a, ns.a]"), ("(1,)", "(ns.a, ns.a)"), ("{}", "{1: ns.a, 2: ns.a}"), ("{}", "dict(a=ns.a, b=ns.a)"),
        ("{}", "{1: ns.a.items(), 2: ns.a.items()}"), ("[1]", "([ns.a] * 2) | list"),
    ]),
    "".join(f"{{% set n{i} = namespace() %}}" for i in range(31))
    + "".join(f"{{% set n{i}.a = [n{i + 1}, n{i + 1}] %}}" for i in range(30)) + "{{ n0 }}",
]  # fmt: skip
LONG = [
    MANY * 3 + END * 3,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ range(100000) | select('in', range(50000) | map('string') | list) | list }}",
]
OWN = [
    "{{ 1 / 0 }}", "{{ 1 // 0 }}", "{{ 2.0 ** 10000 }}", "{{ 10**400 / 1.0 }}", "{{ 'a' + 1 }}", "{{ range(10**9) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% block a %}{{ self.a() }}{% endblock %}", "{{ messages.a.b }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "-" * 50000 + "1 }}", "{{ 1" + "+1" * 30000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{% for i in [1] %}" * 90 + "{% endfor %}" * 90, "{{ " + "9" * 5000 + " }}",
    "{% include 'a' %}", "{% import '/etc/passwd' as a %}", "{{ raise_exception([1]) }}", "{{ a" + ".b" * 40000 + " }}",
]  # fmt: skip
ORDINARY = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.previtem }}{{ m.content | trim }}{% else %}-{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m['content'].split('\n')[-1] }}{% break %}{% endfor %}",
    "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }},{% endfor %}",
    "{% macro f(a, b=2) %}{{ a ~ b ~ varargs }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{% call f(*[3, 4, 5]) %}x{% endcall %}",
    "{% set ns = namespace(a=1, b='x') %}{% set ns.b = ns.b + 'y' + messages[0].role + '!' %}{{ ns.b }}{{ ns }}",
    "{% set a %}{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ a[::-1] }}{{ a[1:3] }}{{ messages[1:] | length }}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages[1] | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list }}",
    "{{ '%s-%5.1f' % ('a', 1.25) }}{{ '%(a)s' % {'a': 1} }}{{ '%s' | format(2) }}{{ '{0:>5}|{x!r}'.format(1, x='é') }}{{ '-' * 20 }}",
    "{{ ('<a>' | escape).format('<b>') }}{{ ('{}' | escape).format('<') }}{% autoescape true %}{{ '<' ~ messages[0].content }}{% endautoescape %}",
    "{{ messages[0].content | replace('a', 'b') | indent(2) | upper | default('z') }}{{ messages[0].content.replace('a', '') }}",
    "{{ messages[1].x }}{{ messages[1].x[2].items() | list }}{{ {'a': [1, (2,)]} }}{{ [1] + [2] }}{{ 7 // 2 ** 2 % 3 }}{{ messages[1].y is defined }}",
    "{{ [3, 1] | sort }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ [[1], [2]] | sum(start=[]) }}{{ 1.25 | round(1) }}{{ 'ab' | center(6) }}{{ undefined }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ 'a' in ['a', 'b'] }}{{ bos_token }}{{ cycler('a', 'b').next() }}",
    "{{ messages | groupby('role') | map('first') | list }}{{ dict(a=1, **{'b': 2}) }}{{ joiner(',')() }}{{ 'a,b'.split(',') }}",
]  # fmt: skip


def said(template: str, **given: Any) -> str:
    """Write the chat with a template."""
    tokenizer = chat_templates.byte_level()
    tokenizer.chat_template = template
    return Chats(Codec(tokenizer)).encode(CHAT, given)[0]


@pytest.mark.parametrize("template", ORDINARY)
def test_a_template_writes_what_plain_transformers_writes(template: str) -> None:
    """The bounds change nothing of what a template within them writes, nor what it calls an error."""
    tokenizer = chat_templates.byte_level()
    expected = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert written(tokenizer, CHAT, Meter(), chat_template=template) == expected


@pytest.mark.parametrize("template", LARGE, ids=lambda text: text[:60])
def test_what_a_template_makes_is_bounded(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text, a list or a number beyond all reason is an error before it is made, in whatever way it is made."""
    monkeypatch.setattr("lmkit.text.meter.SECONDS", 100 * SECONDS)  # on a slow machine the time would end some sooner
    start = time.thread_time()
    with pytest.raises(lmkit.OptionError, match="makes texts, lists or numbers that are too large"):
        said(template)
    assert time.thread_time() - start < 5 * SECONDS


@pytest.mark.parametrize("template", LONG, ids=lambda text: text[:60])
def test_the_time_of_a_template_is_bounded(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that runs on is stopped, and a chat has no more time for being written several times."""
    monkeypatch.setattr("lmkit.text.meter.SECONDS", 0.2)
    with pytest.raises(lmkit.OptionError, match="chat template computed for more than 0 seconds"):
        said(template)


@pytest.mark.parametrize("template", OWN, ids=lambda text: text[:60])
def test_a_templates_own_errors_are_option_errors(template: str) -> None:
    """What Jinja, and Python in it, raise of a template is told as one kind of error."""
    with pytest.raises(lmkit.OptionError, match="chat template refuses these messages"):
        said(template)


def test_a_template_of_any_length_is_not_compiled() -> None:
    """A text that would take minutes to compile is refused unread."""
    with pytest.raises(lmkit.OptionError, match=f"has {7 * LONGEST_SOURCE} characters, lmkit reads {LONGEST_SOURCE}"):
        said("{{ a }}" * LONGEST_SOURCE)


def test_the_end_of_a_turn_is_looked_for_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan asks the template for the end of a turn, and goes on without where it does not answer."""
    monkeypatch.setattr("lmkit.text.meter.SECONDS", 0.2)
    tokenizer = chat_templates.byte_level()
    tokenizer.chat_template = LONG[0]
    assert turn_end(tokenizer) is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    assert turn_end(tokenizer) == tokenizer.eos_token_id


def test_nobody_waits_for_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one chat's template runs, other texts and chats are encoded."""
    monkeypatch.setattr("lmkit.text.meter.SECONDS", 1.0)
    codec = Codec(chat_templates.byte_level())

    def run() -> None:
        with pytest.raises(lmkit.OptionError):
            codec.written(CHAT, Meter(), chat_template=LONG[0])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert codec.decode(codec.encode("a")) == "a"
        assert codec.written(CHAT, Meter(), chat_template="{{ messages[0].role }}") == "user"
        assert thread.is_alive()
    finally:
        thread.join()


def test_a_long_chat_may_be_long() -> None:
    """The bounds grow with what the caller gives."""
    content = "word " * 400_000
    tokenizer = chat_templates.byte_level()
    template = "{% for m in messages %}{{ m.content + m.content.replace('o', 'oo') }}{% endfor %}"
    text = written(tokenizer, [{"role": "user", "content": content}], Meter(len(content)), chat_template=template)
    assert text == content + content.replace("o", "oo")
    ordinary = (
        "{{ content | truncate(90000) | title | length }} {{ [content, content] | join('-' * 500) | length }} "
        "{{ content | indent(8) | length }} {{ ('%s' * 3) | format(content, 1, 2) | length }} {{ content | tojson(indent=4) }}"
    )
    expected = tokenizer.apply_chat_template([{}], chat_template=ordinary, tokenize=False, content=content)
    assert written(tokenizer, [{}], Meter(len(content)), chat_template=ordinary, content=content) == expected
