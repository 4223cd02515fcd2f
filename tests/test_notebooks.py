"""A real kernel of Jupyter: completion, help, errors, lists and bars, and the tour in examples/."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

import gguf_tiny
import hub_stub
import notebooks
from lmkit.loading import LoadOptions
from lmkit.options.generation import GeneratorOptions

LOADED = """import lmkit
unmasker = lmkit.load("masked", "checkpoints/world-bert")"""
MORE = f"""import sys
sys.path.insert(0, {str(notebooks.ROOT / "tests" / "helpers")!r})
import checkpoints
generator, translator = checkpoints.wrapper("llama"), checkpoints.wrapper("t5")
def processor(token_ids, scores):
    return scores / (1 // 0)
"""


PLAIN = """import sys
sys.modules["ipywidgets"] = None"""


@contextmanager
def kernel(*cells: str) -> Iterator[notebooks.Notebook]:
    """Start a kernel that has run some cells."""
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(notebooks.EXAMPLES))
    found = notebooks.Notebook(client)
    try:
        for cell in cells:
            found.run(cell)
        yield found
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def notebook() -> Iterator[notebooks.Notebook]:
    """Start a kernel without widgets that has loaded models."""
    with kernel(PLAIN, LOADED, MORE) as found:
        yield found


@pytest.mark.parametrize(
    "code, options",
    [
        ("generator(", GeneratorOptions.__annotations__),
        ("generator.chat([], temp", ["temperature"]),
        ("lmkit.load(", LoadOptions.__annotations__),
        ("unmasker('a', targ", ["targets"]),
    ],
)
def test_the_tab_key_offers_options(notebook: notebooks.Notebook, code: str, options: list[str]) -> None:
    """Behind an open parenthesis there is every option of the call."""
    assert {f"{name}=" for name in options} <= {*notebook.complete(code)}


def test_a_question_mark_shows_all_options(notebook: notebooks.Notebook) -> None:
    """`generator?` has each in the signature, and says what it does."""
    ((kind, told),) = notebook.run("generator?")
    (text,) = ["\n".join(notebooks.lines(told["data"]["text/plain"]))]
    assert kind == "help"
    for name in GeneratorOptions.__annotations__:
        assert f"\n    {name}: " in text.partition("Options:")[0]
        assert f"\n    {name}: " in text.partition("Options:")[2]


ERRORS = {
    "generator('She', max_new_tokens=-1)": "OptionError: max_new_tokens=-1 is not accepted",
    "generator('She', tempature=1)": "UnknownOptionError: unknown option 'tempature'",
    "lmkit.load('causal', 'nobody/nothing', local_files_only=True)": "ModelNotFoundError: 'nobody/nothing'",
    "await generator.acall('She', top_p=2)": "OptionError: top_p=2 is not accepted",
    "list(generator.map(['She'], seed=-1))": "OptionError: seed=-1",
}


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_is_short(notebook: notebooks.Notebook, code: str) -> None:
    """It has the caller's own line and the message: no frames of lmkit, nor of what it calls."""
    ((kind, error),) = notebook.run(code)
    first, line, *marks, message = error["traceback"]
    assert (kind, line.strip()) == ("error", code)
    assert first.startswith('  File "/tmp/ipykernel')
    assert all(not mark.strip("^~ ") for mark in marks)
    assert message.startswith(ERRORS[code])


def test_an_error_of_the_callers_code_shows_where(notebook: notebooks.Notebook) -> None:
    """A processor that fails is the caller's to mend: its line is there."""
    ((_, error),) = notebook.run("generator('She', processors=[processor])")
    assert "    return scores / (1 // 0)" in error["traceback"]
    assert "in forward" not in str(error["traceback"])
    assert "ZeroDivisionError" in error["traceback"][-1]


@pytest.mark.parametrize("rows, count", [("rows", 3), ("rows[1:]", 2)])
def test_lists_are_tables(notebook: notebooks.Notebook, rows: str, count: int) -> None:
    """So are slices of them."""
    notebook.run("rows = generator(['She', 'He', 'It'], max_new_tokens=2)")
    ((kind, found),) = notebook.run(rows)
    assert kind == "execute_result"
    assert found["data"]["text/plain"].startswith(f"{count} results\n   0  '")
    assert found["data"]["text/html"].startswith("<table")
    assert found["data"]["text/html"].count("<tr>") == count + 1


BARS = {
    "generator(['She'] * 9, max_new_tokens=2, progress=True);": "9/9",
    "list(generator.map(iter(['She'] * 9), max_new_tokens=2, progress=True));": "9 rows",
    "generator.score(['She is'] * 9, progress=True);": "9/9",
    "generator.rank('She', [' is', ' was', ' has'], progress=True);": "3/3",
    "unmasker(['Paris is the [MASK].'] * 9, progress=True);": "9/9",
    "translator('It is. ' * 9, split='sentence', source='en', target='de', max_new_tokens=4, progress=True);": "9/9",
}


@pytest.mark.parametrize("code", BARS)
def test_a_bar_is_one_line(notebook: notebooks.Notebook, code: str) -> None:
    """Of rows, of texts that are scored, and of the pieces of a document."""
    line, *rest = notebook.screen(code)
    assert BARS[code] in line
    assert rest == [""]


@pytest.mark.parametrize("named", ["", ".gguf"])
def test_a_load_has_a_bar_that_goes(notebook: notebooks.Notebook, tmp_path: Path, named: str) -> None:
    """Who loads many weights sees how far it is; nothing of it is left, and a load that is quick shows nothing."""
    load = LOADED
    if named:
        gguf_tiny.save(tmp_path / "tiny.gguf", "<|endoftext|>")
        load = f"import lmkit\nlmkit.load('causal', {str(tmp_path / 'tiny.gguf')!r}).close()"
    assert notebook.run(load) == []
    slow = "from lmkit.wrappers import progress\nprogress.DELAY_SECONDS = -1\n"
    outputs = notebook.run(f"{slow}{load}\nprogress.DELAY_SECONDS = 2.0")
    text = "".join(content["text"] for _, content in outputs)
    assert "Loading weights:" in text
    assert ("de-quantizing" in text) == bool(named)
    assert notebooks.lines(text) == [""]


def test_where_there_are_widgets_a_bar_is_one() -> None:
    """It is drawn by ipywidgets, and counts to the end; that of a load goes."""
    with kernel(LOADED, MORE) as notebook:
        told = notebook.run("generator(['She'] * 9, max_new_tokens=2, progress=True);")
        (drawn,) = [content["data"] for kind, content in told if kind == "display_data"]
        assert "application/vnd.jupyter.widget-view+json" in drawn
        states = [str(content["data"].get("state")) for kind, content in told if kind == "comm_msg"]
        assert any("9/9" in state and "rows/s" in state for state in states)
        assert not [content for kind, content in told if kind == "stream"]
        told = notebook.run(f"from lmkit.wrappers import progress\nprogress.DELAY_SECONDS = -1\n{LOADED}")
        (drawn,) = [content["data"] for kind, content in told if kind == "display_data"]
        assert drawn["text/plain"].startswith("Loading weights")
        shown = drawn["application/vnd.jupyter.widget-view+json"]["model_id"]
        assert [content["comm_id"] for kind, content in told if kind == "comm_close"] == [shown]


HUB = """from huggingface_hub import constants
constants.ENDPOINT, constants.HF_HUB_OFFLINE = {endpoint!r}, False
constants.HUGGINGFACE_CO_URL_TEMPLATE = {endpoint!r} + "/{{repo_id}}/resolve/{{revision}}/{{filename}}"
lmkit.load("masked", "nobody/world", cache_dir={cache!r}).close()
"""


def test_a_download_has_a_bar(notebook: notebooks.Notebook, tmp_path: Path) -> None:
    """What is fetched is shown as it comes; of what is here already there is nothing to show."""
    with hub_stub.serving() as hub:
        hub.repositories["nobody/world"] = {"main": notebooks.EXAMPLES / "checkpoints" / "world-bert"}
        code = HUB.format(endpoint=hub.endpoint, cache=str(tmp_path))
        assert any("Fetching" in line and "100%" in line for line in notebook.screen(code))
        assert notebook.run(code) == []


def test_the_tour_runs() -> None:
    """From its first cell to its last nothing goes to standard error, and results draw themselves."""
    outputs = [output for cell in notebooks.executed().cells for output in cell.get("outputs", [])]
    assert [one for one in outputs if one.get("name") == "stderr"] == []
    drawn = [one["data"].get("text/html", "") for one in outputs if one["output_type"] == "execute_result"]
    assert len([html for html in drawn if html.startswith(("<div", "<table"))]) >= 4
    assert "InputTooLongError" in str(outputs)
