import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import checkpoints
import families
import lmkit
from lmkit.checkpoint.files import Source
from lmkit.cli.answers import spell
from lmkit.cli.commands import app, main
from lmkit.cli.facts import describe
from lmkit.cli.options import Checkpoint
from lmkit.cli.screen import visible, write, write_json
from lmkit.options.generation import GeneratorOptions
from lmkit.options.option import declared
from lmkit.options.tasks import TranslationOptions, UnmaskOptions
from terminals import Screen

FAMILIES = {family.name: family for family in (*families.CAUSAL, *families.SEQ2SEQ, *families.MASKED)}
SAILOR = "The old sailor"
GERMAN = ("--source", "eng_Latn", "--target", "deu_Latn")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny checkpoints by family, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("checkpoints")
    names = ("gpt2", "bloom", "qwen3", "t5", "nllb", "bert")
    return {name: str(families.save(FAMILIES[name], folder / name)) for name in names}


def run(*arguments: str, given: str | bytes = "") -> Result:
    """Run a command in this process, its input and output as pipes."""
    return CliRunner().invoke(app, list(arguments), input=given)


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and counts what is written to it."""

    pieces = 0

    def isatty(self) -> bool:
        """Say yes."""
        return True

    def write(self, text: str) -> int:
        """Count and write."""
        self.pieces += 1
        return super().write(text)


def run_in_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: str, keys: str = "") -> tuple[Any, Terminal, str]:
    """Run a command in this process as in a terminal; return its exit code, its screen and its errors."""
    screen, errors = Terminal(), Terminal()
    monkeypatch.setenv("TERM", "dumb")
    for name, stream in (("stdin", Terminal(keys)), ("stdout", screen), ("stderr", errors)):
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as ended:
        app(list(arguments), prog_name="lmkit")
    monkeypatch.undo()
    return ended.value.code, screen, errors.getvalue()


# Texts in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["argument", "file", "pipe", "dash"])
def test_a_text_comes_from_an_argument_a_file_or_standard_input(
    way: str, saved: dict[str, str], tmp_path: Path
) -> None:
    """Each way of passing the text gives what the library gives for it; the last line feed is not part of it."""
    file = tmp_path / "[bold]prompt.txt"
    file.write_text(SAILOR + "\n", encoding="utf-8")
    ways: dict[str, tuple[tuple[str, ...], str]] = {
        "argument": ((SAILOR,), ""),
        "file": (("--file", str(file)), ""),
        "pipe": ((), SAILOR + "\n"),
        "dash": (("-",), SAILOR + "\n"),
    }
    arguments, given = ways[way]
    done = run("generate", saved["gpt2"], *arguments, "--max-new-tokens", "8", given=given)
    with lmkit.load("causal", saved["gpt2"]) as generator:
        assert done.stdout == generator(SAILOR, max_new_tokens=8).text + "\n"
    assert (done.exit_code, done.stderr) == (0, "")


def test_lines_gives_one_result_per_line_in_order(saved: dict[str, str]) -> None:
    """With --lines every line is a text of its own, more of them than are read ahead."""
    prompts = [f"{word} {number}" for number in range(20) for word in ("She", SAILOR)]
    done = run("generate", saved["gpt2"], "--lines", "--json", "--max-new-tokens", "3", given="\n".join(prompts))
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["prompt"] for result in results] == prompts
    assert {result["generated_tokens"] for result in results} <= {1, 2, 3}


def test_a_line_that_fails_keeps_its_place_and_the_others(saved: dict[str, str]) -> None:
    """With --lines an error takes its line's place, is told on standard error, and the exit code is 1 at the end."""
    given = "Birds [MASK].\nno mask\nShe [MASK].\n"
    done = run("unmask", saved["bert"], "--lines", "--top-k", "1", given=given)
    plain = done.stdout.split("\n")
    assert plain[0].partition("\t")[2].startswith("Birds")
    assert plain[1] == ""
    assert plain[2].partition("\t")[2].startswith("She")
    assert done.stderr.startswith("lmkit: error: line 2: ")
    assert done.exit_code == 1

    done = run("unmask", saved["bert"], "--lines", "--json", given=given)
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error" in found for found in objects] == [False, True, False]
    assert objects[1]["type"] == "OptionError"
    assert done.exit_code == 1


def test_text_that_is_not_utf8_is_an_error_of_one_line(saved: dict[str, str], tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are refused, and the message says where they are."""
    file = tmp_path / "latin.txt"
    file.write_bytes("Grüße".encode("latin-1"))
    done = run("generate", saved["gpt2"], "--file", str(file))
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"lmkit: error: {file} is not UTF-8 text: ")
    done = run("generate", saved["gpt2"], given=b"Gr\xfc\xdfe")
    assert done.stderr.startswith("lmkit: error: standard input is not UTF-8 text: ")


# Results out --------------------------------------------------------------------------------------


def test_json_is_the_result_on_one_line(saved: dict[str, str]) -> None:
    """--json writes all that the result of the library has, in one line."""
    done = run(
        "generate", saved["gpt2"], SAILOR, "--json", "--max-new-tokens", "4", "--temperature", "2", "--seed", "7"
    )
    with lmkit.load("causal", saved["gpt2"]) as generator:
        expected = generator(SAILOR, max_new_tokens=4, temperature=2.0, seed=7).to_dict()
    found = json.loads(done.stdout)
    assert found.pop("timing").keys() == expected.pop("timing").keys()
    assert found == expected
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, options",
    [
        (("--num-beams", "2"), {"num_beams": 2}),
        (("--stop", "t", "--stop", "S"), {"stop": ["t", "S"]}),
        (("--sample", "--top-k", "3", "--seed", "1"), {"sample": True, "top_k": 3, "seed": 1}),
        (("--top-p", "0.9", "--seed", "1"), {"top_p": 0.9, "seed": 1}),
        (("--precision", "bf16", "--device", "cpu"), {}),
        (("--temperature", "0"), {"temperature": 0.0}),
    ],
)  # fmt: skip
def test_options_reach_the_library(arguments: tuple[str, ...], options: dict[str, Any], saved: dict[str, str]) -> None:
    """An option of the command line means what the option of the same name means in Python."""
    precision = "bfloat16" if "bf16" in arguments else "auto"
    done = run("generate", saved["gpt2"], SAILOR, "--max-new-tokens", "8", *arguments)
    with lmkit.load("causal", saved["gpt2"], precision) as generator:
        assert done.stdout == generator(SAILOR, max_new_tokens=8, **options).text + "\n"


@pytest.mark.parametrize(
    "command, options",
    [
        ("generate", GeneratorOptions),
        ("chat", GeneratorOptions),
        ("translate", TranslationOptions),
        ("unmask", UnmaskOptions),
    ],
)
def test_help_says_what_the_library_declares(command: str, options: type) -> None:
    """The help of an option has its meaning, what it is when left out, and the words it takes if they are few."""
    shown = " ".join(run(command, "--help").stdout.split())
    for name, option in declared(options).items():
        flag = f"--{name.removesuffix('s') if option.many else name}".replace("_", "-")
        if f"{flag} " in shown:
            assert option.meaning in shown
            assert f"[default: {option.default}]" in shown or not option.default
    assert ("--order <left_to_right|most_certain|independent>" in shown) == (command == "unmask")
    assert ("--truncate <left|right>" in shown) == (command != "unmask")


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        ("translate", (), "this checkpoint needs --source, one of: "),
        ("translate", ("--source", "en"), "this checkpoint needs --target, one of: "),
        ("translate", ("--source", "en", "--target", "xx"), "--target 'xx' is not a language of this checkpoint."),
        ("translate", ("--keep", "url"), "--keep has 'url'. Did you mean 'urls'?"),
        ("generate", ("--temperature", "-1"), "--temperature -1.0 is not accepted: --temperature takes "),
        ("generate", ("--num-beams", "2", "--temperature", "1"), "--num-beams and --temperature contradict each other"),
        ("generate", ("--no-sample", "--top-p", "0.5"), "--no-sample and --top-p contradict each other"),
        ("generate", ("--max-new-tokens", "0"), "--max-new-tokens 0 is not accepted: --max-new-tokens takes "),
        ("generate", ("--device", "gpu7"), "--device 'gpu7' is not accepted"),
    ],
)
def test_errors_name_options_as_they_are_written_here(
    saved: dict[str, str], command: str, arguments: tuple[str, ...], message: str
) -> None:
    """What the library calls `source=` is `--source` in an error of the command line."""
    done = run(command, saved["nllb" if command == "translate" else "gpt2"], "a text", *arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert not re.search(r"\b[a-z_]+=", done.stderr)


@pytest.mark.parametrize("command", ["generate", "chat", "translate", "unmask", "score"])
def test_a_value_that_no_model_takes_needs_no_model(command: str) -> None:
    """It is refused before the checkpoint is looked for, which is not there."""
    wrong = {"unmask": ("--order", "least_certain"), "score": ("--truncate", "up")}.get(command, ("--top-p", "7"))
    done = run(command, *(("causal",) if command == "score" else ()), "no-such-model", "a text", *wrong)
    assert done.exit_code in (1, 2)
    assert wrong[0] in done.stderr
    assert "no-such-model" not in done.stderr


def test_devices_are_one_or_several(saved: dict[str, str]) -> None:
    """--device takes a number as Python does, and several devices when it is repeated."""
    done = run("generate", saved["gpt2"], SAILOR, "--device", "99")
    assert "the device 99 is not on this machine" in done.stderr
    done = run("generate", saved["gpt2"], SAILOR, "--device", "cpu", "--device", "cuda:99")
    assert "the device 'cuda:99' is not on this machine" in done.stderr


def test_a_limit_that_nobody_gave_is_told(saved: dict[str, str]) -> None:
    """A text that ends at the default limit is remarked on; one that ends at a limit given is not."""
    remark = "lmkit: stopped at the limit of tokens, which --max-new-tokens sets.\n"
    prompt = "She " * 40  # leaves little of the context to be filled
    assert run("generate", saved["gpt2"], prompt).stderr == remark
    assert run("generate", saved["gpt2"], "--lines", given=f"{prompt}\n").stderr == remark
    assert run("generate", saved["gpt2"], prompt, "--max-new-tokens", "2").stderr == ""
    assert run("generate", saved["gpt2"], prompt, "--json").stderr == ""


def test_translate_takes_languages_and_presets(saved: dict[str, str]) -> None:
    """Translate passes source, target and preset on, and a missing language is an error."""
    done = run("translate", saved["nllb"], "Birds fly.", *GERMAN, "--max-new-tokens", "8")
    with lmkit.load("seq2seq", saved["nllb"]) as translator:
        expected = translator("Birds fly.", source="eng_Latn", target="deu_Latn", max_new_tokens=8)
    assert done.stdout == expected.text + "\n"

    done = run("translate", saved["t5"], "Birds fly.", "--preset", "summarization", "--json", "--max-new-tokens", "9")
    assert json.loads(done.stdout)["prompt"] == "summarize: Birds fly."

    done = run("translate", saved["nllb"], "Birds fly.")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "needs --source" in done.stderr


def test_translate_takes_how_to_split_and_what_to_keep(saved: dict[str, str]) -> None:
    """Translate passes split and keep on: pieces of a text as one call gives them, a placeholder in its place."""
    arguments = ("--source", "en", "--target", "de", "--split", "sentence", "--keep", r"\{\w+\}", "--json")
    text = "Birds {fly}. Fish swim."
    done = run("translate", saved["t5"], text, *arguments, "--max-new-tokens", "9")
    segments = json.loads(done.stdout)["segments"]
    assert "{fly}" in json.loads(done.stdout)["text"]
    assert [text[part["source_start"] : part["source_end"]] for part in segments] == ["Birds {fly}.", " ", "Fish swim."]


def test_unmask_shows_ways_best_first(saved: dict[str, str]) -> None:
    """Unmask writes a probability and the filled text per way; --target limits the words."""
    done = run("unmask", saved["bert"], "Birds [MASK].", "--top-k", "3")
    with lmkit.load("masked", saved["bert"]) as unmasker:
        ways = unmasker("Birds [MASK].", top_k=3).candidates
        words = unmasker("Birds [MASK].", targets=["the", "old"]).candidates
    assert done.stdout.splitlines() == [f"{way.score:.4f}\t{way.text}" for way in ways]
    done = run("unmask", saved["bert"], "Birds [MASK].", "--target", "the", "--target", "old")
    assert done.stdout.splitlines() == [f"{way.score:.4f}\t{way.text}" for way in words]


def test_chat_with_a_text_is_one_turn(saved: dict[str, str]) -> None:
    """Chat answers by the checkpoint's template, after the system message if there is one."""
    done = run("chat", saved["qwen3"], "Hello", "--system", "Be kind.", "--json", "--max-new-tokens", "5")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    with lmkit.load("causal", saved["qwen3"]) as generator:
        expected = generator.chat(messages, max_new_tokens=5)
    found = json.loads(done.stdout)
    assert (found["prompt"], found["text"]) == (expected.prompt, expected.text)


def test_chat_with_lines_answers_each_on_its_own(saved: dict[str, str]) -> None:
    """With --lines each line is a chat that knows nothing of the others."""
    done = run("chat", saved["qwen3"], "--lines", "--json", "--max-new-tokens", "2", given="Hello\nBye\n")
    prompts = [json.loads(line)["prompt"] for line in done.stdout.splitlines()]
    assert ["Hello" in prompt for prompt in prompts] == [True, False]
    assert ["Bye" in prompt for prompt in prompts] == [False, True]


def test_score_writes_log_probability_and_perplexity(saved: dict[str, str]) -> None:
    """Of a text, a continuation or each line; --json has all of the score; a masked model scores texts."""
    with lmkit.load("causal", saved["gpt2"]) as generator:
        whole, behind = generator.score(SAILOR), generator.score("The old", " sailor")
    with lmkit.load("masked", saved["bert"]) as unmasker:
        hidden = unmasker.score("Birds fly.")
    expected = f"{whole.logprob:.4f}\t{whole.perplexity:.4f}\n"
    assert run("score", saved["gpt2"], SAILOR).stdout == expected
    assert run("score", saved["gpt2"], "--lines", given=f"{SAILOR}\n" * 200).stdout == expected * 200
    found = json.loads(run("score", saved["gpt2"], "The old", "--continuation", " sailor", "--json").stdout)
    assert found["tokens"] == list(behind.tokens)
    assert run("score", saved["bert"], "Birds fly.").stdout == f"{hidden.logprob:.4f}\t{hidden.perplexity:.4f}\n"


def test_rank_writes_the_likeliest_first(saved: dict[str, str]) -> None:
    """A line per choice with its share; translations take languages; each line of a file has the same choices."""
    words = ["old", "sailor"]
    choices = ("--choice", "old", "--choice", "sailor")
    with lmkit.load("seq2seq", saved["nllb"]) as translator:
        ranking = translator.rank("Birds", words, source="eng_Latn", target="deu_Latn", normalize="tokens")
    expected = "".join(f"{choice.probability:.4f}\t{choice.text}\n" for choice in ranking.choices)
    assert run("rank", saved["nllb"], "Birds", *choices, *GERMAN, "--normalize", "tokens").stdout == expected
    with lmkit.load("causal", saved["gpt2"]) as generator:
        both = generator.rank([SAILOR, "She"], words, normalize="prior", neutral="The")
    done = run(
        "rank", saved["gpt2"], *choices, "--normalize", "prior", "--neutral", "The", "--lines", given=f"{SAILOR}\nShe\n"
    )
    assert done.stdout.splitlines() == [f"{one.probability:.4f}\t{one.text}" for found in both for one in found.choices]


@pytest.mark.parametrize(
    "name, arguments, code, message",
    [
        ("gpt2", ("score", "--source", "en"), 2, "a causal model takes no --source."),
        ("nllb", ("score", *GERMAN), 2, "pass --continuation."),
        ("nllb", ("rank", "--choice", "a", "--neutral", "b"), 2, "a seq2seq model takes no --neutral."),
        ("bert", ("rank", "--choice", "a"), 2, "a masked model takes no --choice."),
        ("bert", ("score", "--continuation", "a"), 2, "a masked model takes no --continuation."),
        ("gpt2", ("rank",), 2, "Missing option '--choice'"),
        ("nllb", ("score", "--continuation", "a"), 1, "this checkpoint needs --source"),
        ("gpt2", ("rank", "--choice", "a", "--normalize", "length"), 1, "--normalize 'length' is not accepted."),
        ("gpt2", ("score", "--continuation", "word " * 200), 1, "lmkit: error: the text has "),
    ],
)
def test_what_is_not_scored_says_why(
    saved: dict[str, str], name: str, arguments: tuple[str, ...], code: int, message: str
) -> None:
    """An option that a task has no use for, or lacks, is named as it is written here."""
    command, *others = arguments
    done = run(command, saved[name], "a text", *others)
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr


# In a terminal ------------------------------------------------------------------------------------


def test_a_terminal_sees_the_text_grow(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal a text is written in pieces that add up to the whole, and a limit is remarked on."""
    code, screen, errors = run_in_terminal(monkeypatch, "generate", saved["gpt2"], SAILOR)
    with lmkit.load("causal", saved["gpt2"]) as generator:
        assert screen.getvalue() == visible(generator(SAILOR).text) + "\n"
    assert screen.pieces > 50
    assert (code, errors) == (0, "lmkit: stopped at the limit of tokens, which --max-new-tokens sets.\n")


def test_a_terminal_shows_what_has_no_pieces_whole(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal JSON stays one object per line and filled masks are as in a pipe."""
    code, screen, _ = run_in_terminal(monkeypatch, "unmask", saved["bert"], "Birds [MASK].")
    assert (code, screen.getvalue()) == (0, run("unmask", saved["bert"], "Birds [MASK].").stdout)
    code, screen, _ = run_in_terminal(monkeypatch, "generate", saved["gpt2"], SAILOR, "--json")
    assert json.loads(screen.getvalue())["prompt"] == SAILOR


def test_a_terminal_shows_pictures_of_scores(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal a score is its tokens and facts by name, and a ranking is bars."""
    code, screen, _ = run_in_terminal(monkeypatch, "score", saved["gpt2"], SAILOR)
    assert (code, "perplexity  " in screen.getvalue()) == (0, True)
    code, screen, _ = run_in_terminal(monkeypatch, "rank", saved["gpt2"], SAILOR, "--choice", "a", "--choice", "b")
    assert (code, "█" in screen.getvalue()) == (0, True)


def test_a_chat_in_a_terminal_remembers(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The chat's second answer knows the first turn; empty lines are skipped; /exit ends it with 0."""
    code, screen, _ = run_in_terminal(
        monkeypatch, "chat", saved["qwen3"], "--max-new-tokens", "5", keys="Hello\n\nAgain\n/exit\nignored\n"
    )
    with lmkit.load("causal", saved["qwen3"]) as generator:
        messages = [{"role": "user", "content": "Hello"}]
        first = generator.chat(messages, max_new_tokens=5).text
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Again"}]
        second = generator.chat(messages, max_new_tokens=5).text
    shown = [visible(text) for text in (first, second)]
    assert screen.getvalue() == f"> {shown[0]}\n> > {shown[1]}\n> "
    assert code == 0


def test_a_message_too_long_for_a_chat_does_not_end_it(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a chat a message that does not fit is an error line and is forgotten; the next one is answered."""
    keys = f"{'word ' * 200}\nHello\n"
    code, screen, errors = run_in_terminal(monkeypatch, "chat", saved["qwen3"], "--max-new-tokens", "5", keys=keys)
    _, alone, _ = run_in_terminal(monkeypatch, "chat", saved["qwen3"], "--max-new-tokens", "5", keys="Hello\n")
    assert "lmkit: error: the talk has " in errors
    assert "leave out its oldest messages. /reset forgets what was said.\n" in errors
    assert screen.getvalue() == f"> \n{alone.getvalue()}"
    assert code == 0


def test_ctrl_c_stops_an_answer_and_not_the_chat(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during an answer keeps what was read of it, and at the prompt forgets the line; the chat goes on."""
    calls: list[list[str]] = []

    def interrupted(_self: object, messages: list[dict[str, str]], **_options: object) -> Iterator[lmkit.TextChunk]:
        calls.append([message["content"] for message in messages])
        yield lmkit.TextChunk("An", 0)
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield lmkit.TextChunk("swer", 0, "eos")

    monkeypatch.setattr(lmkit.Generator, "stream", interrupted)
    code, screen, _ = run_in_terminal(monkeypatch, "chat", saved["qwen3"], keys="one\ntwo\n")
    assert calls == [["one"], ["one", "An", "two"]]
    assert screen.getvalue() == "> An\n> Answer\n> \n"
    assert code == 0

    def interrupt(_prompt: str) -> str:
        raise endings.pop(0)

    endings: list[BaseException] = [KeyboardInterrupt(), EOFError()]
    monkeypatch.setattr("builtins.input", interrupt)
    code, screen, errors = run_in_terminal(monkeypatch, "chat", saved["qwen3"])
    assert (code, screen.getvalue(), endings) == (0, "\n", [])
    assert errors.endswith("\n/exit or Ctrl-D ends the talk.\n")


@pytest.mark.parametrize("arguments", [(), ("--lines",)])
def test_no_text_at_all_is_a_usage_error(
    arguments: tuple[str, ...], saved: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a text, and with nobody piping one in, the command says what it takes and exits with 2."""
    code, _, errors = run_in_terminal(monkeypatch, "generate", saved["gpt2"], *arguments)
    assert code == 2
    assert "there is no text: pass TEXT or --file, or pipe one in." in errors


def test_typed_lines_are_answered_one_by_one(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines typed into a terminal with --lines - are not read ahead."""
    seen: list[int] = []

    class Keyboard(Terminal):
        def __next__(self) -> str:
            seen.append(len(screen.getvalue().splitlines()))
            return super().__next__()

    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", Keyboard("She\nShe\n"))
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(SystemExit):
        app(["generate", saved["gpt2"], "-", "--lines", "--json", "--max-new-tokens", "2"], prog_name="lmkit")
    monkeypatch.undo()
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain ä 漢字 👩\u200d🚀\n\tstays", "plain ä 漢字 👩\u200d🚀\n\tstays"),
        ("\x1b[2J\x1b]0;title\x07", r"\u001b[2J\u001b]0;title\u0007"),
        ("\r\b\x00\x7f", r"\u000d\u0008\u0000\u007f"),
        ("\x9b31m\x85", r"\u009b31m\u0085"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
    ],
)
def test_control_characters_are_made_visible(text: str, shown: str) -> None:
    """Nothing but text, line feeds and tabs reaches a terminal; control characters are spelled out."""
    assert visible(text) == shown


@pytest.mark.parametrize("term, shown", [("xterm", "\x1b[2m\\u001b[0mhm\x1b[0mYes\n"), ("dumb", "\\u001b[0mhmYes\n")])
def test_reasoning_is_dimmed_and_cannot_undo_it(monkeypatch: pytest.MonkeyPatch, term: str, shown: str) -> None:
    """Reasoning is dimmed where the terminal can do so, and the model's own escape characters stay visible."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", term)
    reason = spell([lmkit.TextChunk("\x1b[0mhm", 0, kind="reasoning"), lmkit.TextChunk("Yes", 0, "eos")])
    monkeypatch.undo()
    assert (terminal.getvalue(), reason) == (shown, "eos")


def test_only_a_terminal_is_protected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Into a pipe the text goes as it is; in a terminal JSON with spelled-out characters is the same JSON."""
    write("\x1b[31mred")
    assert capsys.readouterr().out == "\x1b[31mred\n"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    write_json({"text": "\x1b\x9b\u202e\x7fä"})
    monkeypatch.undo()
    assert json.loads(terminal.getvalue()) == {"text": "\x1b\x9b\u202e\x7fä"}
    assert "\x9b" not in terminal.getvalue()


# Info ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, task, length, template",
    [
        ("gpt2", "causal", 128, "no"),
        ("qwen3", "causal", 128, "yes"),
        ("t5", "seq2seq", None, "no"),
        ("bert", "masked", 128, "no"),
    ],
)
def test_info_says_what_a_checkpoint_is(
    name: str, task: str, length: int | None, template: str, saved: dict[str, str]
) -> None:
    """Info names the architecture, the fitting task, the sizes and the Python that loads it."""
    folder = Path(saved[name])
    found = json.loads(run("info", saved[name], "--json").stdout)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert found == {
        "name": saved[name],
        "architecture": config["architectures"][0],
        "model_type": config["model_type"],
        "tasks": [task],
        "context_length": length,
        "weights": ["model.safetensors"],
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "dtype": "float32",
        "presets": sorted(config.get("task_specific_params") or {}),
        "chat_template": template == "yes",
        "load": f"lmkit.load({task!r}, {saved[name]!r})",
    }
    with eval(found["load"], {"lmkit": lmkit}) as model:  # noqa: S307 - the line it advises
        assert model.plan.task == task


def test_info_in_words(saved: dict[str, str]) -> None:
    """Without --json info writes one fact per line, for people."""
    lines = dict(line.split(":", 1) for line in run("info", saved["t5"]).stdout.splitlines())
    facts = {name: value.strip() for name, value in lines.items()}
    assert facts["tasks"] == "seq2seq"
    assert facts["context length"] == "none"
    assert facts["chat template"] == "no"
    assert facts["presets"].startswith("summarization, translation_en_to_de")
    assert facts["weights bytes"] == f"{(Path(saved['t5']) / 'model.safetensors').stat().st_size:,}"


def test_info_of_a_checkpoint_without_a_task(saved: dict[str, str], tmp_path: Path) -> None:
    """A checkpoint that does none of the tasks has no line to load it; pickled weights are part of the line."""
    config = json.loads((Path(saved["bert"]) / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = json.loads(run("info", str(tmp_path), "--json").stdout)
    assert found["load"] == f"lmkit.load('masked', {str(tmp_path)!r}, allow_pickle=True)"
    assert found["chat_template"] is False

    config = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = json.loads(run("info", str(tmp_path), "--json").stdout)
    assert (found["tasks"], found["load"]) == ([], None)
    assert "load:           none" in run("info", str(tmp_path)).stdout


def test_info_of_a_gguf_file(saved: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GGUF file info gives the one file, and leaves open what only parsing it would tell."""
    from transformers import AutoConfig

    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF and more")
    config = AutoConfig.from_pretrained(saved["gpt2"])
    monkeypatch.setattr("lmkit.checkpoint.config.read_config", lambda _source, **_: config)
    monkeypatch.setattr("lmkit.checkpoint.find.find", lambda name, *_, **__: Source(name, tmp_path, file.name))
    found = describe(Checkpoint(str(file)))
    assert (found["weights"], found["weights_bytes"], found["chat_template"]) == (["model.gguf"], 13, None)


# Plans --------------------------------------------------------------------------------------------

GPU = ("--budget", "cuda:0=24GiB", "--budget", "cpu=64GiB")


@pytest.mark.parametrize("name, task", [("gpt2", "causal"), ("t5", "seq2seq"), ("nllb", "seq2seq"), ("bert", "masked")])
def test_plan_prints_what_the_library_plans(saved: dict[str, str], name: str, task: Any) -> None:
    """Without a task the one that the checkpoint was made for is planned; the table is that of the plan."""
    expected = lmkit.plan(task, saved[name], "auto", {"cuda:0": "24GiB", "cpu": "64GiB"})
    done = run("plan", saved[name], *GPU)
    assert (done.exit_code, done.stderr, done.stdout) == (0, "", f"{expected}\n")
    assert done.stdout == run("plan", saved[name], "--task", task, *GPU).stdout


def test_plan_writes_json(saved: dict[str, str]) -> None:
    """With --json the plan is one line of JSON, the library's own."""
    done = run("plan", saved["gpt2"], "--precision", "int8", "--json", "--reserve-tokens", "7", *GPU)
    plan: Any = lmkit.plan
    expected = plan("causal", saved["gpt2"], "int8", {"cuda:0": "24GiB", "cpu": "64GiB"}, reserve_tokens=7)
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == expected.to_dict()


@pytest.mark.parametrize(
    "written, budget", [("123456789", 123456789), ("0.5", 0.5), ("1.5GiB", "1.5GiB"), ("2GB", "2GB"), ("0", 0)]
)
def test_a_budget_is_written_as_in_python(saved: dict[str, str], written: str, budget: Any) -> None:
    """Bytes, fractions and sizes mean what they mean in the library."""
    found = json.loads(run("plan", saved["gpt2"], "--budget", f"cpu={written}", "--json").stdout)
    expected = lmkit.plan("causal", saved["gpt2"], "auto", {"cpu": budget})
    assert found["placement"]["max_memory"] == dict(expected.placement.max_memory)


def test_a_plan_that_does_not_fit_exits_with_one(saved: dict[str, str], tmp_path: Path) -> None:
    """A plan that does not fit says so and what would; with a folder for the disk it fits, and nothing is written."""
    done = run("plan", saved["gpt2"], "--precision", "float32", "--budget", "cpu=40000")
    assert done.exit_code == 1
    assert "fits             NO" in done.stdout
    assert "why: fits" in done.stdout
    folder = tmp_path / "offload"
    done = run("plan", saved["gpt2"], "--precision", "float32", "--budget", "cpu=40000", "--budget", f"disk={folder}")
    assert "fits             yes" in done.stdout
    assert "why: offload" in done.stdout
    assert not folder.exists()


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("--budget", "cpu"), 2, "--budget 'cpu' is not written as cuda:0=24GiB"),
        (("--budget", "cpu=1GiB", "--device", "cpu"), 2, "pass --device or --budget, not both"),
        (("--reserve-tokens", "many"), 2, "'--reserve-tokens'"),
        (("--reserve-tokens", "-1"), 1, "lmkit: error: --reserve-tokens -1 is not accepted"),
        (("--budget", "cpu=lots"), 1, "lmkit: error: the budget {'cpu': 'lots'} is not accepted"),
        (("--budget", "cuda:7=0.5"), 1, "lmkit: error: 'cuda:7' is not on this machine, so 0.5 of its memory"),
        (("--device", "cuda:7"), 1, "lmkit: error: the device 'cuda:7' is not on this machine"),
        (("--precision", "fp23"), 1, "lmkit: error: unknown precision 'fp23'"),
        (("--task", "masked"), 1, "lmkit: error: "),
        (("--task", "dancing"), 1, "lmkit: error: "),
    ],
)
def test_a_plan_that_is_asked_for_wrongly_says_so(
    saved: dict[str, str], arguments: tuple[str, ...], code: int, message: str
) -> None:
    """What cannot be planned is one line on standard error, with the exit code of its kind."""
    done = run("plan", saved["gpt2"], *arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr
    assert code == 2 or done.stderr.count("\n") == 1


# Errors and exit codes ----------------------------------------------------------------------------


def test_an_error_is_one_line_and_debug_shows_where(saved: dict[str, str]) -> None:
    """What the library refuses is one line and exit code 1; --debug raises it with its traceback."""
    done = run("generate", saved["nllb"], SAILOR)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("lmkit: error: ")
    assert "made for 'seq2seq'" in done.stderr
    assert done.stderr.count("\n") == 1
    done = run("generate", saved["nllb"], SAILOR, "--debug")
    assert isinstance(done.exception, lmkit.UnknownTaskError)
    assert done.exit_code == 1


def test_an_error_that_is_not_ours_is_one_line_too(saved: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that lmkit does not know is named with its type, on one line, and without control characters."""

    def explode(*_arguments: object, **_options: object) -> None:
        msg = "first\nsecond \x1b[2J [/bold]"
        raise RuntimeError(msg)

    monkeypatch.setattr("lmkit.loading.load", explode)
    done = run("generate", saved["gpt2"], SAILOR)
    assert done.exit_code == 1
    expected = r"lmkit: error: RuntimeError: first second \u001b[2J [/bold] (--debug shows where)"
    assert done.stderr == expected + "\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("generate",), "Missing argument 'NAME'"),
        (("generate", "x", "text", "--file", __file__), "pass TEXT or --file, not both"),
        (("generate", "x", "--file", "/no/such/[red]file"), "/no/such/[red]file"),
        (("generate", "x", "text", "--max-new-tokens", "many"), "'--max-new-tokens'"),
        (("generate", "x", "text", "--temprature", "1"), "--temprature"),
        (("unmask", "x", "[MASK]", "--order", "random"), "'left_to_right', 'most_certain', 'independent'"),
        (("invent", "x"), "invent"),
    ],
)
def test_a_command_written_wrongly_exits_with_2(arguments: tuple[str, ...], message: str) -> None:
    """What typer or the commands cannot read is a usage error that shows what was given, brackets included."""
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_name_that_is_nowhere_needs_no_network(network: list[str]) -> None:
    """A checkpoint that is not here is one line and exit code 1, without a network call if none is wanted."""
    done = run("info", "nobody/nothing", "--local-files-only")
    assert done.exit_code == 1
    assert done.stderr.startswith("lmkit: error: 'nobody/nothing' was not found: ")
    assert network == []


# As processes of their own ------------------------------------------------------------------------


PROBE = """
import sys
from lmkit.cli.commands import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "huggingface_hub"} & sys.modules.keys()
    assert not heavy, heavy
"""


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_are_fast(argument: str) -> None:
    """Help and version import none of the heavy libraries, and come in well under two seconds."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PROBE, argument], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - started < 2
    said = "chat" if argument == "--help" else f"lmkit {lmkit.__version__}\n"
    assert said in done.stdout


def test_the_script_tells_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the `lmkit` script calls reads the program's own arguments, and needs no command for the version."""
    monkeypatch.setattr(sys, "argv", ["anything", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().out) == (0, f"lmkit {lmkit.__version__}\n")


def test_an_output_that_lacks_a_character_gets_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the terminal's encoding has no such character, its number is shown; JSON stays JSON."""
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["lmkit", "--version"])
    with pytest.raises(SystemExit):
        main()
    write("漢")
    write_json({"text": "漢"})
    monkeypatch.undo()
    assert stream.errors == "backslashreplace"
    assert written.getvalue().splitlines()[1:] == [rb"\u6f22", rb'{"text": "\u6f22"}']


@pytest.mark.slow
def test_an_error_of_a_process_is_one_line() -> None:
    """As a process, an error is one line on standard error and exit code 1; with --debug it is a traceback."""
    command = [sys.executable, "-m", "lmkit", "generate", "./nowhere", "text"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("lmkit: error: './nowhere' is not here: ")
    assert done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_it_quietly(saved: dict[str, str]) -> None:
    """Endless input gives results as it comes, and a closed pipe ends the command without a word."""
    feeder = subprocess.Popen(
        [sys.executable, "-c", "while True: print('She')"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    command = [sys.executable, "-m", "lmkit", "generate", saved["gpt2"], "--lines", "--json", "--max-new-tokens", "2"]
    with feeder, subprocess.Popen(
        command, stdin=feeder.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        first = json.loads(process.stdout.readline())
        process.stdout.close()
        errors = process.stderr.read()
        code = process.wait(60)
        feeder.kill()
    assert first["prompt"] == "She"
    assert (code, errors) == (0, "")


@pytest.mark.slow
def test_tokens_stream_into_a_real_terminal_until_ctrl_c(saved: dict[str, str]) -> None:
    """A text that would take an hour shows at once in a pseudo-terminal, and Ctrl-C ends it with 130."""
    terminal = Screen("generate", saved["bloom"], SAILOR, "--max-new-tokens", "1000000")
    terminal.wait_for(length=100)
    still_running = terminal.process.poll() is None
    terminal.process.send_signal(signal.SIGINT)
    code = terminal.close()
    with lmkit.load("causal", saved["bloom"]) as generator:
        expected = visible(generator(SAILOR, max_new_tokens=200).text).replace("\n", "\r\n")
    assert terminal.shown[:80] == expected[:80]
    assert "Traceback" not in terminal.shown
    assert (still_running, code) == (True, 130)


@pytest.mark.slow
def test_a_chat_in_a_real_terminal_ends_with_ctrl_d(saved: dict[str, str]) -> None:
    """In a pseudo-terminal a chat prompts, answers, prompts again, and Ctrl-D ends it with 0."""
    terminal = Screen("chat", saved["qwen3"], "--max-new-tokens", "5")
    terminal.wait_for("> ")
    terminal.press("Hello\n")
    with lmkit.load("causal", saved["qwen3"]) as generator:
        answer = generator.chat([{"role": "user", "content": "Hello"}], max_new_tokens=5).text
    terminal.wait_for(visible(answer).replace("\n", "\r\n"))
    assert "\x1b" not in terminal.wait_for("\n> ")
    terminal.press("\x04")
    assert terminal.close() == 0


@pytest.mark.slow
def test_a_shell_completes_commands_options_and_their_words() -> None:
    """In bash, Tab writes the rest of a command and of an option's value."""
    with Screen("--norc", "--noprofile", "-i", program="bash", term="dumb") as shell:
        found = f'export PATH="{Path(sys.executable).parent}:$PATH"; eval "$(_LMKIT_COMPLETE=source_bash lmkit)"'
        shell.press(f"{found}; echo rea''dy\n", "ready")
        shell.press("lmkit trans\t", "translate ")
        shell.press("\x15lmkit unmask --order m\t", "most_certain ")
        shell.press("\x15lmkit rank --ch\t", "--choice ")


def test_a_forced_end_is_remarked_on(tmp_path: Path) -> None:
    """A translation that its config ended at the limit of positions was cut, and the command says so."""
    where = str(checkpoints.configured("marian", tmp_path / "marian", forced_eos_token_id=2, eos_token_id=2))
    first, second = (run("translate", where, text) for text in checkpoints.texts("marian")[:2])
    assert "stopped at the limit of tokens, which --max-new-tokens sets" in first.stderr
    assert (second.exit_code, second.stderr) == (0, "")
