import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import checkpoints
from lmkit.cli.talk import Talk
from lmkit.results.pictures import visible
from lmkit.testing import FakeGenerator
from terminals import Screen

pytestmark = pytest.mark.slow

ENTER, UP, ALT_ENTER, CTRL_D = "\r", "\x1b[A", "\x1b\r", "\x04"
STATUS = " tokens/s; context "


def answer(*said: str, **options: Any) -> Any:
    """Return what the library answers when as much was said, in turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(said)]
    return checkpoints.wrapper("qwen3").chat(messages, max_new_tokens=5, **options)


def on_screen(text: str) -> str:
    """Write a text as a terminal gets it."""
    return visible(text).replace("\n", "\r\n")


def started(*arguments: str, folder: Path | None = None, term: str = "xterm") -> Screen:
    """Begin a talk, and wait for it to ask."""
    screen = Screen("chat", str(folder or checkpoints.folder("qwen3")), "--precision", "float32", *arguments, term=term)
    screen.wait_for("> ")
    return screen


def entered(screen: Screen, line: str) -> str:
    """Type a line, wait for the next prompt, and return what came between."""
    screen.press(line + ENTER)
    while "> " not in (behind := screen.shown.partition("\x1b[?2004l")[2]):
        screen.wait_for(length=len(screen.shown) + 1)
    return behind


def saved(screen: Screen, path: Path) -> list[dict[str, str]]:
    """Save the talk and read it."""
    assert " saved." in entered(screen, f"/save {path}")
    messages: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["messages"]
    return messages


def long_winded(where: Path) -> Path:
    """Save a checkpoint whose context is long enough for an answer without an end."""
    shutil.copytree(checkpoints.folder("qwen3"), where)
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1_000_000}))
    return where


def test_a_talk_as_people_have_it(tmp_path: Path) -> None:
    """Answers are the library's; the arrow keys bring back a message; the last line has the speed and the context."""
    with started("--max-new-tokens", "5") as screen:
        first = answer("Hello")
        shown = screen.press("Hello" + ENTER, "\n\x1b[?2004h> ")
        used = first.prompt_tokens + first.generated_tokens
        assert on_screen(first.text) in shown
        assert f"{first.generated_tokens} tokens, " in shown
        assert f"; context {used} of 128" in shown
        second = answer("Hello", first.text, "Hello!")
        assert STATUS in entered(screen, UP + "!")
        turns = [(one["role"], one["content"]) for one in saved(screen, tmp_path / "talk.jsonl")]
        assert turns == [
            ("user", "Hello"), ("assistant", first.content), ("user", "Hello!"), ("assistant", second.content),
        ]  # fmt: skip
        screen.press(CTRL_D)
        assert screen.close() == 0


PASTED = "\x1b[200~one\n\ttwo\x1b[201~"


@pytest.mark.parametrize(
    "keys, message",
    [(PASTED, "one\n\ttwo"), (f"one{ALT_ENTER}two", "one\ntwo"), (f'"""one{ENTER}{ENTER}two"""', "one\n\ntwo")],
)
def test_a_message_may_have_several_lines(keys: str, message: str, tmp_path: Path) -> None:
    """What is pasted is one message, and so is what Alt-Enter or three quotes hold together."""
    with started("--max-new-tokens", "5") as screen:
        screen.press(keys)
        assert STATUS in entered(screen, "")
        assert saved(screen, tmp_path / "talk.jsonl")[0]["content"] == message


def test_ctrl_c_ends_an_answer_and_not_the_talk(tmp_path: Path) -> None:
    """During an answer Ctrl-C ends it, and keeps what was read; where nobody answers it forgets the line."""
    with started(folder=long_winded(tmp_path / "model")) as screen:
        entered(screen, "/options min_new_tokens=900000")
        screen.press("Hello" + ENTER)
        screen.wait_for(length=100)
        assert "stopped; what it said is kept." in screen.interrupt("> ")
        screen.press("Again" + ENTER)
        screen.wait_for(length=100)
        screen.interrupt()
        screen.interrupt("> ")
        screen.press("forget this", "forget this")
        screen.settle()
        screen.interrupt("Ctrl-D ends the talk.")
        user, assistant, *_ = saved(screen, tmp_path / "talk.jsonl")
        assert user["content"] == "Hello"
        assert len(assistant["content"]) > 50


def test_commands(tmp_path: Path) -> None:
    """/system, /options and /reset do what /help says; what is written wrongly is an error line and changes nothing."""
    with started("--max-new-tokens", "5", "--system", "Be kind.") as screen:
        assert "/save FILE" in entered(screen, "/help")
        assert STATUS in entered(screen, "Hello")
        assert "error: temperature=-1 is not accepted" in entered(screen, "/options temperature=-1")
        assert "Did you mean 'temperature'?" in entered(screen, "/options tempratur=1")
        assert "not written as NAME=VALUE" in entered(screen, "/options seed")
        assert "'prompts' is not an option of chats" in entered(screen, "/options prompts=1")
        entered(screen, '/options stop=["a"]')
        entered(screen, "/options max_new_tokens=")
        assert entered(screen, "/options").startswith('\r\x1b[2mstop=["a"]\x1b[0m')
        entered(screen, "/system Be brief.")
        assert [one["role"] for one in saved(screen, tmp_path / "talk")] == ["system", "user", "assistant"]
        assert "forgotten." in entered(screen, "/reset")
        assert saved(screen, tmp_path / "talk") == [{"role": "system", "content": "Be brief."}]
        assert "there is no /nothing" in entered(screen, "/nothing")
        assert "No such file" in entered(screen, f"/save {tmp_path}/no/where")
        shown = entered(screen, "word " * 200)
        assert "the talk has " in shown
        assert "/reset forgets what was said." in shown
        screen.press(f"/exit{ENTER}")
        assert screen.close() == 0


def test_a_model_cannot_steer_the_terminal() -> None:
    """A model that writes escape characters is shown to do so, and none of them reaches the terminal."""
    with started("--max-new-tokens", "9", term="dumb") as screen:
        screen.press(f'/options logit_bias={{"\\u001b": 1000}}{ENTER}', "> ")
        shown = screen.press("Hello" + ENTER, STATUS)
        assert r"\u001b" * 9 in shown
        assert "\x1b\x1b" not in shown


def test_what_cannot_be_saved_is_an_error_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Half of a character, which a terminal of another encoding gives, has no UTF-8: the talk goes on."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/system \udcff\n/save {tmp_path}/talk\n/system\nHello\n"))
    Talk(FakeGenerator(lambda *_given: "Hi."), [], {}).run()
    out, err = capsys.readouterr()
    assert "talk cannot be written: " in err
    assert out == "Hi.\n\n"


def test_what_no_answer_can_come_of_is_refused_at_once() -> None:
    """A checkpoint without a chat template, or an option that is not accepted, ends the command before it asks."""
    for name, option, message in (("gpt2", (), "chat template"), ("qwen3", ("--top-p", "7"), "--top-p 7")):
        screen = Screen("chat", str(checkpoints.folder(name)), *option)
        assert screen.close() == 1
        assert message in screen.shown
        assert "> " not in screen.shown


@pytest.mark.parametrize("columns", [40, 100])
def test_loading_is_told_on_one_line_and_wiped(columns: int) -> None:
    """While a model is loaded its name is shown, cut where the line ends, and nothing of it is left behind."""
    long = str(checkpoints.folder("gpt2")) + "/." * 50
    screen = Screen("generate", long, "She", "--max-new-tokens", "2", term="xterm", columns=columns)
    shown = screen.wait_for("\x1b[K")
    assert shown.startswith(f"\x1b[?7lloading {long[:20]}")
    assert " …\x1b[?7h\r\x1b[K" in shown
    assert screen.close() == 0
