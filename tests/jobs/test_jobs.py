import csv
import gzip
import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import lmkit
from checkpoints import folder, wrapper
from lmkit.jobs.job import row_seed
from lmkit.testing import FakeGenerator, FakeTranslator, FakeUnmasker
from lmkit.wrappers import progress

TEXTS = ["She wrote", "The old sailor", "Once", "A bird in the hand"]


def write(path: Path, rows: Iterable[Any]) -> Path:
    """Write rows as JSONL; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Read JSONL."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def column(path: Path, name: str = "answer") -> list[Any]:
    """Read a column of JSONL."""
    return [row[name] for row in read(path)]


def texts(path: Path, given: Sequence[str] = TEXTS) -> Path:
    """Write rows with texts."""
    return write(path, ({"id": n, "text": text} for n, text in enumerate(given)))


def echo() -> FakeGenerator:
    """Return a fake that answers with the prompt, and its seed where it draws."""
    return FakeGenerator(
        lambda prompt, options: f"{prompt}! {options['seed']}" if "temperature" in options else f"{prompt}!"
    )


# What is answered ---------------------------------------------------------------------------------


def test_a_drawn_row_is_the_call_with_its_own_seed(tmp_path: Path) -> None:
    """A model's rows are those of single calls, whose seeds follow from the job's and the rows' numbers."""
    report = wrapper("llama").run_job(
        texts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", temperature=0.9, seed=5, max_new_tokens=6
    )
    calls = [
        wrapper("llama")(text, temperature=0.9, seed=row_seed(5, row), max_new_tokens=6)
        for row, text in enumerate(TEXTS)
    ]
    assert column(tmp_path / "out.jsonl") == [call.text for call in calls]
    assert len({row_seed(5, row) for row in range(1000)} | {row_seed(6, row) for row in range(1000)}) == 2000
    assert (report.rows, report.done, report.failed) == (4, 4, 0)
    assert report.generated_tokens == sum(call.generated_tokens for call in calls)


def test_other_columns_come_out_as_they_went_in(tmp_path: Path) -> None:
    """Their bytes do, numbers and escapes included; the new ones stand behind them, with a prefix if asked for."""
    lines = ['{"x" : 1e2,"y":[0.10, null] ,"text":"Hi", "z": "\\u00e9\\ud800"}', '  {"text": "Ho"}\t', '{"text":"é"}']
    write(tmp_path / "in.jsonl", lines)
    echo().run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", prefix="new_")
    found = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert found == [
        f'{line.strip()[:-1]}, "new_answer": "{text}!", "new_finish_reason": "eos", "new_error": null}}'
        for line, text in zip(lines, ["Hi", "Ho", "é"], strict=True)
    ]
    with pytest.raises(lmkit.OptionError, match=r"row 0 has a column 'new_answer' of its own: pass a prefix="):
        echo().run_job(tmp_path / "out.jsonl", tmp_path / "again.jsonl", prefix="new_")


@dataclass
class Person:
    """What an answer is made of."""

    name: str
    age: int


def test_chats_have_messages_and_outputs_have_values(tmp_path: Path) -> None:
    """A chat may be JSON in a text; with `output=` an answer is its value, and one that has none is an error."""
    hello = [{"role": "user", "content": "Hello"}]
    write(tmp_path / "in.jsonl", [{"messages": hello}, {"messages": json.dumps(hello)}, {"messages": "Hello"}])
    fake = FakeGenerator({"Hello": '{"name": "Ada", "age": 36}'})
    fake.run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", verb="chat", output=Person)
    first, second, third = read(tmp_path / "out.jsonl")
    assert first["answer"] == second["answer"] == {"name": "Ada", "age": 36}
    assert first["message"] == {"role": "assistant", "content": '{"name": "Ada", "age": 36}'}
    assert third["error"]["message"].startswith("row 2 has 'Hello' in the column 'messages'")
    fake.run_job(tmp_path / "in.jsonl", tmp_path / "cut.jsonl", verb="chat", output=Person, max_new_tokens=1, full=True)
    cut = read(tmp_path / "cut.jsonl")[0]
    assert (cut["answer"], cut["error"]["type"], cut["result"]["text"]) == (None, "OutputError", '{"name":')
    with pytest.raises(lmkit.JobError, match="options output title was 'Person' and is None"):
        fake.run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", verb="chat", output=int)


def test_rows_are_scored_and_ranked_as_by_calls(tmp_path: Path) -> None:
    """The choices and continuations of a row are in columns, or the same for all."""
    model, choices = wrapper("llama"), [[" a", " letter"], [" sang", " a song", "."]]
    rows = [{"text": text, "of": of, "to": of[0]} for text, of in zip(TEXTS, choices, strict=False)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    model.run_job(source, out, verb="rank", columns={"choices": "of"}, normalize="tokens")
    ranked = model.rank(TEXTS[:2], choices, normalize="tokens")
    assert column(out) == [str(one) for one in ranked]
    assert column(out, "probability") == pytest.approx([one.choices[0].probability for one in ranked])
    model.run_job(source, out, verb="score", columns={"continuation": "to"}, restart=True)
    assert column(out) == pytest.approx([one.logprob for one in model.score(TEXTS[:2], [" a", " sang"])])
    model.run_job(source, out, verb="score", restart=True, full=True)
    alone = model.score(TEXTS[:2])
    assert column(out) == pytest.approx([one.logprob for one in alone])
    assert [lmkit.Score.from_dict(one).tokens for one in column(out, "result")] == [one.tokens for one in alone]
    with pytest.raises(lmkit.OptionError, match="normalize='words' is not accepted"):
        model.run_job(source, out, verb="rank", columns={"choices": "of"}, normalize="words", restart=True)
    with pytest.raises(lmkit.UnknownOptionError, match=r"unknown option 'normalise'\. Did you mean 'normalize'\?"):
        model.run_job(source, out, verb="rank", normalise="tokens")


def test_translators_and_unmaskers_have_the_same_verb(tmp_path: Path) -> None:
    """Languages, targets and translations are said per row, in CSV as text or JSON."""
    words = {"one": {"de": "eins", "es": "uno"}}
    translator = FakeTranslator(
        lambda text, options: words[text][options.get("target", "de")], languages=("en", "de", "es")
    )
    (tmp_path / "in.csv").write_text("text,to,limit,is\none,de,5,eins\none,es,,uno\none,xx,1,\n")
    columns = {"target": "to", "max_new_tokens": "limit"}
    report = translator.run_job(tmp_path / "in.csv", tmp_path / "out.jsonl", columns=columns, source="en")
    assert column(tmp_path / "out.jsonl") == ["eins", "uno", None]
    assert (report.failed, translator.calls[0].options["max_new_tokens"]) == (1, 5)
    columns = {"target": "to", "translation": "is"}
    translator.run_job(tmp_path / "in.csv", tmp_path / "s.jsonl", verb="score", columns=columns, source="en")
    assert [row["error"] is None for row in read(tmp_path / "s.jsonl")] == [True, True, False]
    unmasker = FakeUnmasker({"A [MASK].": ["bird", "song"]})
    write(tmp_path / "masks.jsonl", [{"text": "A [MASK].", "t": ["song"]}, {"text": "A [MASK].", "t": '["bird"]'}])
    unmasker.run_job(tmp_path / "masks.jsonl", tmp_path / "m.jsonl", columns={"targets": "t"})
    assert column(tmp_path / "m.jsonl") == ["A song.", "A bird."]
    write(tmp_path / "r.jsonl", [{"text": ["A bird.", "A song."]}, {"text": "A bird."}])
    assert unmasker.run_job(tmp_path / "r.jsonl", tmp_path / "k.jsonl", verb="rank").failed == 1


def test_a_bad_row_has_its_error_and_the_others_their_answers(tmp_path: Path) -> None:
    """Lines that are no JSON, without the column, too long, or that the model fails at; blank ones are no rows."""
    long = "word " * 500
    rows = ['{"text": "She"', {"text": "She"}, "", "[1]", {"other": 1}, {"text": 5}, {"text": long}, '{"text": NaN}']
    source = write(tmp_path / "in.jsonl", rows)
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes() + b'{"text": "\xff"}')
    report = wrapper("gpt2").run_job(source, tmp_path / "out.jsonl", max_new_tokens=2)
    out = read(tmp_path / "out.jsonl")
    assert [row["error"] and row["error"]["type"] for row in out] == [
        "OptionError", None, "OptionError", "OptionError", "OptionError", "InputTooLongError", *["OptionError"] * 2,
    ]  # fmt: skip
    assert out[0]["error"]["line"] == '{"text": "She"'
    assert out[1]["answer"] == wrapper("gpt2")("She", max_new_tokens=2).text
    assert "line 1 is no JSON" in out[0]["error"]["message"]
    assert "row 3 has nothing in the column 'text': its columns are 'other'" in out[3]["error"]["message"]
    assert (out[5]["text"], out[7]["error"]["line"]) == (long, '{"text": "\\xff"}')
    assert (report.rows, report.failed) == (8, 7)
    assert "8 rows in" in str(report)
    assert "7 FAILED, see their errors" in str(report)


def test_a_row_that_goes_too_deep_takes_no_other_down(tmp_path: Path) -> None:
    """It is an error before the output is made of all, in each format."""
    most = sys.getrecursionlimit()  # which jedi raises for the whole process
    deep = f'{{"text": "a", "x": {"[" * most}{"]" * most}}}'
    for name in ("out.jsonl", "out.csv"):
        report = echo().run_job(write(tmp_path / "in.jsonl", [deep, {"text": "b", "x": [[1]] * 999}]), tmp_path / name)
        assert (report.rows, report.failed) == (2, 1)
    assert read(tmp_path / "out.jsonl")[0]["error"]["line"] == deep


# What goes on -------------------------------------------------------------------------------------


def test_what_changed_and_what_is_new_is_done_and_nothing_else(tmp_path: Path) -> None:
    """The same line again does appended rows, and those again whose own columns changed."""
    source, out, fake = texts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", echo()
    fake.run_job(source, out, temperature=1.0)
    first = column(out)
    write(source, [{"id": 9, "text": TEXTS[0]}, *({"text": text} for text in ["new", *TEXTS[2:], "more"])])
    report = fake.run_job(source, out, temperature=1.0)
    assert [call.prompt for call in fake.calls] == [*TEXTS, "new", "more"]
    assert (report.rows, report.done, report.kept, report.changed) == (5, 2, 3, 1)
    assert [column(out)[row] for row in (0, 2, 3)] == [first[row] for row in (0, 2, 3)]
    assert read(out)[0]["id"] == 9
    texts(source, TEXTS[:2])
    assert (fake.run_job(source, out, temperature=1.0).rows, len(read(out))) == (2, 2)


def test_rows_that_failed_are_done_again_when_asked(tmp_path: Path) -> None:
    """Until then their errors are kept."""
    answers: dict[str, Any] = dict.fromkeys(TEXTS, "well")
    answers[TEXTS[1]] = ValueError("no memory")
    fake = FakeGenerator(answers)
    source, out = texts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert fake.run_job(source, out).failed == 1
    fake._table[TEXTS[1]] = "better"
    assert fake.run_job(source, out).failed == 1
    report = fake.run_job(source, out, retry_errors=True)
    assert (report.done, report.kept, report.failed) == (1, 3, 0)
    assert column(out) == ["well", "better", "well", "well"]


@pytest.mark.parametrize(
    "other, told",
    [
        ({"max_new_tokens": 3}, "options max_new_tokens was 2 and is 3"),
        ({"max_new_tokens": 2, "stop": "."}, "options stop was None and is '.'"),
        ({"max_new_tokens": 2, "seed": 2}, "seed was 1 and is 2"),
        ({"max_new_tokens": 2, "column": "id"}, "column was 'text' and is 'id'"),
        ({"max_new_tokens": 2, "columns": {"seed": "id"}}, "columns seed was None and is 'id'"),
        ({"max_new_tokens": 2, "full": True}, "full was False and is True"),
    ],
)
def test_a_job_of_other_options_is_refused(tmp_path: Path, other: dict[str, Any], told: str) -> None:
    """The difference is spelt out, and `restart=True` begins anew."""
    source, out, fake = texts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", echo()
    fake.run_job(source, out, max_new_tokens=2, seed=1)
    with pytest.raises(lmkit.JobError, match=told):
        fake.run_job(source, out, **other)
    assert fake.run_job(source, out, restart=True, **other).done == 4


def test_another_checkpoint_or_input_is_refused(tmp_path: Path) -> None:
    """A file of weights that was written again, an input of another name, or one in which no row is as it was."""
    there = shutil.copytree(folder("gpt2"), tmp_path / "model")
    source, out = texts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    run: Any = {"devices": "cpu", "max_new_tokens": 2}
    lmkit.run_job("causal", str(there), source, out, **run)
    os.utime(there / "model.safetensors", (1, 1))
    with pytest.raises(lmkit.JobError, match=r"model checkpoint model\.safetensors was '\d+ bytes of \d+' and is"):
        lmkit.run_job("causal", str(there), source, out, **run)
    fake = echo()
    fake.run_job(source, out, restart=True)
    with pytest.raises(lmkit.JobError, match=r"source was 'in\.jsonl' and is 'other\.jsonl'"):
        fake.run_job(texts(tmp_path / "other.jsonl"), out)
    texts(source, ["quite", "another"])
    with pytest.raises(lmkit.JobError, match=r"is of another input: none of the first rows that it has is in"):
        fake.run_job(source, out)


def test_a_file_that_no_job_wrote_is_not_written_over(tmp_path: Path) -> None:
    """Unless it is asked for; and the input is never the output."""
    source, out = texts(tmp_path / "in.jsonl"), write(tmp_path / "out.jsonl", ["mine"])
    with pytest.raises(lmkit.JobError, match=r"out\.jsonl exists, and .*journal does not say that this job wrote it"):
        echo().run_job(source, out)
    assert out.read_text() == "mine\n"
    assert echo().run_job(source, out, restart=True).done == 4
    with pytest.raises(lmkit.OptionError, match="the input and the output are both"):
        echo().run_job(source, source)


def test_an_input_that_changes_meanwhile_is_told(tmp_path: Path) -> None:
    """The output is not made of rows that were not asked; run again, the job does what changed."""
    source, out = texts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"

    def changing(prompt: str, _options: object) -> str:
        texts(source, [*TEXTS[:3], "changed"])
        return prompt

    fake = FakeGenerator(changing)
    with pytest.raises(lmkit.JobError, match="has changed in row 3 while the job ran"):
        fake.run_job(source, out)
    assert not out.exists()
    assert fake.run_job(source, out).changed == 1
    assert column(out) == [*TEXTS[:3], "changed"]


def test_other_versions_are_told_and_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer library may answer otherwise, which a line in the log says."""
    source, out = texts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    echo().run_job(source, out)
    monkeypatch.setattr("lmkit.jobs.job.version", lambda _name: "99")
    echo().run_job(source, out)
    assert "the job began with other versions, so answers may differ: lmkit was" in caplog.text


def test_progress_is_logged_where_nobody_looks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and tokens per second and the time left, now and then; a bar that is asked for begins with what is done."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    source, out = texts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    with caplog.at_level(logging.INFO, "lmkit.jobs"):
        echo().run_job(source, out)
    assert "3 of 4 rows, " in caplog.text
    assert " tokens/s, 0 minutes left" in caplog.text


def test_a_bar_begins_with_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of five rows, four were done before."""
    source, out = texts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    echo().run_job(source, out)
    texts(source, [*TEXTS, "more"])
    echo().run_job(source, out, progress=True)
    shown = capsys.readouterr().err
    assert "4/5" in shown
    assert "5/5" in shown


# Formats ------------------------------------------------------------------------------------------


def test_csv_comes_out_as_csv(tmp_path: Path) -> None:
    """Cells with commas, quotes and line ends are as they were, and a row of another length is an error."""
    rows = [["id", "text"], ["1", 'a, "b"\nc'], ["2", "é"], ["3"], ["4", "x" * 200_000]]
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    with source.open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows(rows)
    report = FakeGenerator(lambda prompt, _: prompt[:3]).run_job(source, out)
    with out.open(newline="", encoding="utf-8") as stream:
        found = list(csv.reader(stream))
    assert found[0] == ["id", "text", "answer", "finish_reason", "error"]
    assert [row[:2] for row in found[1:]] == [rows[1], rows[2], ["3", ""], rows[4]]
    assert [row[2] for row in found[1:]] == ["a, ", "é", "", "xxx"]
    assert "line 5 has 1 cells, and there are 2 columns" in json.loads(found[3][4])["message"]
    assert report.failed == 1
    with pytest.raises(lmkit.OptionError, match=r"in\.csv has no column 'texts': it has 'id', 'text'"):
        echo().run_job(source, out, column="texts", restart=True)
    source.write_text("text,text\n1,2\n")
    with pytest.raises(lmkit.OptionError, match="must name columns, each once"):
        echo().run_job(source, out, restart=True)


def test_texts_with_any_line_end_come_out_of_csv_as_they_went_in(tmp_path: Path) -> None:
    """A return alone ends a line for who reads it, so it is quoted; numbers and dates are as one writes them."""
    given = ["a\rb", "a\r\nb", 'a\n"b"', "a,b\r"]
    lines = [json.dumps({"text": text, "x": 0.5}) for text in given] + ['{"text": "c", "x": 1e999}']
    echo().run_job(write(tmp_path / "in.jsonl", lines), tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as stream:
        found = list(csv.DictReader(stream, strict=True))
    assert [(row["text"], row["answer"]) for row in found] == [(text, f"{text}!") for text in [*given, "c"]]
    assert [row["x"] for row in found] == ["0.5"] * 4 + ["inf"]


def test_what_cannot_be_read_of_csv_is_in_its_error(tmp_path: Path) -> None:
    """Cells too many, text behind a quote, a quote that never ends: the lines are kept as they stand."""
    (tmp_path / "in.csv").write_text('text,b\n1,2,three\n"x"y,5\nok,6\nq,"open\nfoo,1\n')
    assert echo().run_job(tmp_path / "in.csv", tmp_path / "out.jsonl").failed == 3
    told = [row["error"] and row["error"]["line"] for row in read(tmp_path / "out.jsonl")]
    assert told == ["1,2,three\n", '"x"y,5\n', None, 'q,"open\nfoo,1\n']


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.csv.gz", "in.parquet"])
def test_a_file_that_is_cut_short_is_told(tmp_path: Path, name: str) -> None:
    """The error is a job's, with the file's name, and what was there of the output stays."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="the extra parquet")
    source = texts(tmp_path / "in.jsonl", [str(n) for n in range(999)])
    echo().run_job(source, tmp_path / "whole.csv")
    whole = (source if "jsonl" in name else tmp_path / "whole.csv").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(whole)[:-30])
    with pytest.raises(lmkit.JobError, match=rf"{re.escape(name)} cannot be read: .* what is done is kept"):
        echo().run_job(tmp_path / name, tmp_path / "out.jsonl", prefix="p_")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    """A folder is no file, and a column without a type or beyond its numbers no Parquet's: no row is asked."""
    (tmp_path / "folder.jsonl").mkdir()
    source, fake = texts(tmp_path / "in.jsonl"), echo()
    with pytest.raises(lmkit.OptionError, match="is a folder: name a file to write to"):
        fake.run_job(source, tmp_path / "folder.jsonl", restart=True)
    with pytest.raises(lmkit.OptionError, match="there is no file"):
        fake.run_job(tmp_path / "folder.jsonl", tmp_path / "out.jsonl")
    pytest.importorskip("pyarrow", reason="the extra parquet")
    for number, value in enumerate((10**30, {})):
        write(tmp_path / f"{number}.jsonl", [{"text": "a", "x": value}])
        with pytest.raises(lmkit.JobError, match="fits no Parquet file"):
            fake.run_job(tmp_path / f"{number}.jsonl", tmp_path / f"{number}.parquet")
    assert fake.calls == []


def test_the_journal_may_be_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is made beside its own place, for nothing can be renamed from one disk to another."""
    rename = Path.replace

    def replace(self: Path, target: Any) -> Path:
        if self.parent != Path(target).parent:
            raise OSError(18, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    (tmp_path / "there").mkdir()
    out = tmp_path / "there" / "out.jsonl"
    echo().run_job(texts(tmp_path / "in.jsonl"), out, journal=tmp_path / "journal")
    assert column(out) == [f"{text}!" for text in TEXTS]
    assert [one.name for one in out.parent.iterdir()] == ["out.jsonl"]


def test_one_job_at_a_time_writes_an_output(tmp_path: Path) -> None:
    """A second one is refused wherever its journal is; one that is done or has failed has let go, without a trace."""
    source, out = texts(tmp_path / "in.jsonl"), tmp_path / "new" / "out.jsonl"
    refused: list[lmkit.JobError] = []

    def answer(prompt: str, _options: Any) -> str:
        if prompt == TEXTS[0]:
            with pytest.raises(lmkit.JobError, match=r"another process runs the job of .*out\.jsonl") as raised:
                echo().run_job(source, out, journal=tmp_path / "second", restart=True)
            refused.append(raised.value)
        return f"{prompt}!"

    FakeGenerator(answer).run_job(source, out, journal=tmp_path / "first")
    assert len(refused) == 1
    assert not (tmp_path / "second").exists()
    assert column(out) == [f"{text}!" for text in TEXTS]
    with pytest.raises(lmkit.JobError, match="exists"):
        echo().run_job(source, out, journal=tmp_path / "second")
    echo().run_job(source, out, journal=tmp_path / "second", restart=True)
    assert [one.name for one in out.parent.iterdir()] == ["out.jsonl"]


def test_gzip_has_the_same_rows_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    """A compressed file has no date in it."""
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(texts(tmp_path / "in.jsonl").read_bytes()))
    echo().run_job(tmp_path / "in.jsonl", tmp_path / "plain.jsonl")
    made = []
    for name in ("a", "b"):
        echo().run_job(tmp_path / "in.jsonl.gz", tmp_path / f"{name}.jsonl.gz")
        made.append((tmp_path / f"{name}.jsonl.gz").read_bytes())
    assert made[0] == made[1]
    assert gzip.decompress(made[0]) == (tmp_path / "plain.jsonl").read_bytes()


def test_parquet_keeps_types(tmp_path: Path) -> None:
    """Columns, their types and what is noted of them come out as they were; what is no text is JSON in a text."""
    pa, pq = pytest.importorskip("pyarrow", reason="the extra parquet"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {
            "text": ["a", "b", None],
            "when": pa.array([1, 2, 3], pa.timestamp("ns", "UTC")),
            "chat": [[{"role": "user", "content": "Hi"}], None, [{"role": "user", "content": "Ho"}]],
            "limit": pa.array([1, None, 2], pa.int16()),
        }
    ).replace_schema_metadata({"pandas": "{}"})
    pq.write_table(table, tmp_path / "in.parquet")
    report = echo().run_job(tmp_path / "in.parquet", tmp_path / "out.parquet", columns={"max_new_tokens": "limit"})
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.select(table.column_names).equals(pq.read_table(tmp_path / "in.parquet"), check_metadata=True)
    assert found["answer"].to_pylist() == ["a!", "b!", None]
    assert json.loads(found["error"].to_pylist()[2])["type"] == "OptionError"
    assert (report.rows, report.failed) == (3, 1)
    echo().run_job(tmp_path / "in.parquet", tmp_path / "chats.jsonl", verb="chat", column="chat")
    assert column(tmp_path / "chats.jsonl") == ["Hi!", None, "Ho!"]


def test_parquet_becomes_text_with_every_column(tmp_path: Path) -> None:
    """Dates and decimals are texts without quotes, bytes base64; two columns with one name are refused."""
    pa, pq = pytest.importorskip("pyarrow", reason="the extra parquet"), pytest.importorskip("pyarrow.parquet")
    columns = [pa.array(["a"]), pa.array([date(2026, 1, 2)]), pa.array([Decimal("1.50")]), pa.array([float("nan")])]
    columns.append(pa.array([b"\xff\x00"]))
    pq.write_table(pa.Table.from_arrays(columns, ["text", "day", "price", "x", "image"]), tmp_path / "in.parquet")
    echo().run_job(tmp_path / "in.parquet", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[1] == "a,2026-01-02,1.50,nan,/wA=,a!,eos,"
    pq.write_table(pa.Table.from_arrays(columns, ["text", "day", "day", "x", "y"]), tmp_path / "twice.parquet")
    with pytest.raises(lmkit.OptionError, match=r"twice\.parquet must name columns, each once"):
        echo().run_job(tmp_path / "twice.parquet", tmp_path / "twice.jsonl")


def test_jsonl_becomes_parquet_where_columns_have_a_type(tmp_path: Path) -> None:
    """Columns that some rows lack are empty there; one of numbers and texts is refused before a row is asked."""
    pq = pytest.importorskip("pyarrow.parquet", reason="the extra parquet")
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    write(source, [{"text": "a"}, {"text": "b", "x": [1.5]}, "{"])
    echo().run_job(source, out)
    assert pq.read_table(out).select(["text", "x"]).to_pylist() == [
        {"text": "a", "x": None}, {"text": "b", "x": [1.5]}, {"text": None, "x": None},
    ]  # fmt: skip
    fake = echo()
    write(source, [{"text": "a", "x": 1}, {"text": "b", "x": "one"}])
    with pytest.raises(lmkit.JobError, match="fits no Parquet file, where a column has one type"):
        fake.run_job(source, out, restart=True)
    assert fake.calls == []


def test_zstandard_is_read_and_written(tmp_path: Path) -> None:
    """By the standard library where that has it, else by pyarrow."""
    if sys.version_info < (3, 14):
        pytest.importorskip("pyarrow", reason="the extra parquet")
    source = texts(tmp_path / "in.jsonl")
    for name in ("a.jsonl", "b.jsonl.zst", "c.csv.zst"):
        echo().run_job(source, tmp_path / name)
    echo().run_job(tmp_path / "b.jsonl.zst", tmp_path / "d.jsonl", prefix="d_")
    echo().run_job(tmp_path / "c.csv.zst", tmp_path / "e.jsonl", prefix="d_")
    assert column(tmp_path / "d.jsonl") == column(tmp_path / "e.jsonl", "d_answer") == column(tmp_path / "a.jsonl")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet needs pyarrow, and the message says what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(lmkit.MissingExtraError, match=r"pip install 'lmkit\[parquet\]'"):
        echo().run_job(texts(tmp_path / "in.jsonl"), tmp_path / "out.parquet")


def test_what_is_no_unicode_is_an_error_only_where_it_is_read(tmp_path: Path) -> None:
    """Other columns come out with the bytes they had, or as escapes; Parquet, which has neither, is refused."""
    source, rows = tmp_path / "in.csv", b"text,x\na,\xff\n\xff,\xc3\xa9\n"
    source.write_bytes(rows)
    assert echo().run_job(source, tmp_path / "out.csv").failed == 1
    made = (tmp_path / "out.csv").read_bytes().splitlines()
    assert (made[1], made[2][:5]) == (b"a,\xff,a!,eos,", b"\xff,\xc3\xa9,")
    echo().run_job(source, tmp_path / "out.jsonl")
    assert b'{"text": "a", "x": "\\udcff", "answer": "a!"' in (tmp_path / "out.jsonl").read_bytes()
    write(tmp_path / "in.jsonl", ['{"text": "a", "x": "\\ud800"}'])
    echo().run_job(tmp_path / "in.jsonl", tmp_path / "half.csv")
    assert (tmp_path / "half.csv").read_text().splitlines()[1] == "a,\\ud800,a!,eos,"
    pytest.importorskip("pyarrow", reason="the extra parquet")
    for name in ("in.csv", "in.jsonl"):
        with pytest.raises(lmkit.JobError, match=r"fits no Parquet file, .* and texts are Unicode"):
            echo().run_job(tmp_path / name, tmp_path / f"{name}.parquet")
    report = echo().run_job(source, tmp_path / "moved.csv", journal=tmp_path / "in.csv.parquet.lmkit")
    assert report.kept == 2


@pytest.mark.parametrize("name", ["out.txt", "out", "out.parquet.gz", "out.json"])
def test_a_name_that_says_no_format_is_refused(tmp_path: Path, name: str) -> None:
    """The message says which endings there are."""
    with pytest.raises(lmkit.OptionError, match=r"names of files end in '\.jsonl', '\.ndjson', '\.csv', '\.parquet'"):
        echo().run_job(texts(tmp_path / "in.jsonl"), tmp_path / name)
    with pytest.raises(lmkit.OptionError, match="there is no file"):
        echo().run_job(tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl")


def test_standard_input_is_read_again_from_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows piped in again go on; without a journal of its own, standard output has them in order."""
    out, given = tmp_path / "out.jsonl", texts(tmp_path / "in.jsonl").read_bytes()

    def run(given: bytes, out: Any, **options: Any) -> tuple[lmkit.JobReport, str]:
        piped = io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        monkeypatch.setattr(sys, "stdout", piped)
        report = echo().run_job("-", out, **options)
        return report, piped.buffer.getvalue().decode()  # type: ignore[attr-defined]

    assert run(given, out)[0].done == 4
    assert run(given + b'{"text": "more"}', out)[0].done == 1
    report, piped = run(given + b'{"text": "more"}', "-")
    assert piped == out.read_text(encoding="utf-8")
    assert report.output == "standard output"
    assert run(given, "-", journal=tmp_path / "kept")[0].done == 4
    assert run(given, "-", journal=tmp_path / "kept")[0].kept == 4


def test_arguments_that_are_wrong_say_so(tmp_path: Path) -> None:
    """Verbs of other tasks, columns of no option, and options that a call would refuse."""
    source, out = texts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    for options, told in (
        ({"verb": "translate"}, "verb='translate' is not accepted"),
        ({"columns": {"max_tokens": "id"}}, "columns= has 'max_tokens'"),
        ({"columns": {"output": "id"}}, "columns= has 'output'"),
        ({"temperature": -1}, "temperature=-1 is not accepted"),
        ({"temperature": [1.0, 2.0]}, "map takes one for all rows"),
    ):
        with pytest.raises(lmkit.OptionError, match=told):
            echo().run_job(source, out, **options)  # type: ignore[arg-type]
    assert not out.with_name("out.jsonl.lmkit").exists()


def test_a_column_that_no_row_has_is_an_error_before_any_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """JSONL may have options in later rows only, and says so; what cannot be read, or is empty, has no columns yet."""
    write(tmp_path / "in.jsonl", ["{", {"id": 1, "text": "a"}])
    (tmp_path / "in.csv").write_text("id,text\n1,a\n")
    for name in ("in.jsonl", "in.csv"):
        with pytest.raises(lmkit.OptionError, match=rf"{name} has no column 'txt': .*it has 'id', 'text'"):
            echo().run_job(tmp_path / name, tmp_path / "out.jsonl", column="txt")
    limited: dict[str, Any] = {"columns": {"max_new_tokens": "limit"}}
    with pytest.raises(lmkit.OptionError, match=r"in\.csv has no column 'limit'"):
        echo().run_job(tmp_path / "in.csv", tmp_path / "out.jsonl", **limited)
    assert not (tmp_path / "out.jsonl.lmkit").exists()
    assert echo().run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", **limited).failed == 1
    assert "in.jsonl has no column 'limit': in its first rows, up to 100, it has 'id', 'text'." in caplog.text
    assert echo().run_job(write(tmp_path / "odd.jsonl", ["{"]), tmp_path / "odd.csv", column="txt").failed == 1


@pytest.mark.parametrize("options, told", [
    ({"verb": "rank"}, r"rank needs choices=, or in columns= the name of the column"),
    ({"verb": "rank", "choices": [["a"]] * 4}, r"choices=.* is not accepted: pass a list of texts for all rows"),
    ({"verb": "rank", "choices": "ab"}, r"choices='ab' is not accepted: pass a list of texts for all rows"),
    ({"verb": "score", "continuation": ["a"] * 4}, r"continuation=.* is not accepted: pass a text for all rows"),
])  # fmt: skip
def test_what_is_scored_is_of_all_rows_or_in_a_column(tmp_path: Path, options: Any, told: str) -> None:
    """A list with one for each row of a window would be taken for the rows of the next window too."""
    with pytest.raises(lmkit.OptionError, match=told):
        echo().run_job(texts(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", **options)
    assert not (tmp_path / "out.jsonl.lmkit").exists()


def test_errors_of_scores_name_the_row_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its place is among those that are scored together."""
    monkeypatch.setattr("lmkit.wrappers.file_jobs.WINDOW", 2)
    source = write(tmp_path / "in.jsonl", [{"text": "a b"}, {"other": 1}, {"text": "c d"}, {"text": "e"}, {"text": ""}])
    assert echo().run_job(source, tmp_path / "out.jsonl", verb="score").failed == 2
    told = [row["error"] and row["error"]["message"][:6] for row in read(tmp_path / "out.jsonl")]
    assert told == [None, "row 1 ", None, None, "row 4,"]


def test_whole_numbers_with_a_point_are_whole_numbers(tmp_path: Path) -> None:
    """A column in which one is missing has such numbers from pandas."""
    fake = echo()
    (tmp_path / "in.csv").write_text("text,limit\na,2.0\nb,\nc,2.5\n")
    fake.run_job(tmp_path / "in.csv", tmp_path / "out.jsonl", columns={"max_new_tokens": "limit"})
    assert [call.options.get("max_new_tokens") for call in fake.calls] == [2, None]
    assert "max_new_tokens=2.5 is not accepted" in read(tmp_path / "out.jsonl")[2]["error"]["message"]


def test_a_list_in_a_cell_is_a_list_where_a_text_would_do_too(tmp_path: Path) -> None:
    """As in the column of `stop`; what is no JSON of a list is the text that it is."""
    cells = [["text", "ends"], ["a", '["x", "\\n"]'], ["b", "["], ["c", "5"]]
    with (tmp_path / "in.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(cells)
    fake = echo()
    fake.run_job(tmp_path / "in.csv", tmp_path / "out.jsonl", columns={"stop": "ends"})
    assert [call.options["stop"] for call in fake.calls] == [["x", "\n"], "[", "5"]


def test_options_that_are_objects_are_told_apart(tmp_path: Path) -> None:
    """Functions by what they tell the model, modes by their values, biases whatever their keys; the same goes on."""
    hello, out = [{"role": "user", "content": "Hello"}], tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", [{"messages": hello}])

    def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: Where.
        """
        return city

    def other(city: str) -> str:
        """Tell the weather.

        Args:
            city: In which city.
        """
        return city

    other.__name__ = "weather"
    fake = FakeGenerator({"Hello": "Hi"})
    common: dict[str, Any] = {
        "verb": "chat",
        "mode": lmkit.Sample(0.5),
        "seed": 1,
        "logit_bias": {"Hello": 1.0, 0: 2.0},
    }
    fake.run_job(source, out, tools=[weather], **common)
    assert fake.run_job(source, out, tools=[weather], **common).kept == 1
    with pytest.raises(lmkit.JobError, match="options tools was"):
        fake.run_job(source, out, tools=[other], **common)
    with pytest.raises(lmkit.JobError, match=r"options mode was 'Sample\(temperature=0\.5.* and is 'Sample"):
        fake.run_job(source, out, tools=[weather], **{**common, "mode": lmkit.Sample(0.6)})
