import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings

import checkpoints
import identity
import lmkit
from checkpoints import wrapper
from drawn_documents import documents, splits

NUMBERS = Path(__file__).parents[2] / "examples" / "checkpoints"
DOCUMENT = (
    "# A title\r\n\r\n- First item. A second sentence, which is longer than the first one!  Third?\r\n"
    "* {name} said: hello.\tcolumn\r\n\r\n---\r\n1. 日本語です。二番目の文です。\n> مرحبا. كيف حالك؟\n"
    "  👩‍👩‍👧‍👦 e\u0301a\n\n"
)
seldom = settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # no shrinking


@cache
def copier(positions: int = 96) -> Any:
    """Load the model that copies."""
    folder = identity.save(checkpoints.ROOT / f"identity-{positions}", positions)
    return lmkit.load("seq2seq", str(folder), "float32", "cpu")


@cache
def numbers(name: str = "numbers-m2m100") -> Any:
    """Load the shipped translator of numbers."""
    return lmkit.load("seq2seq", str(NUMBERS / name), "float32", "cpu")


def covered(result: Any) -> None:
    """Check that the segments follow each other over all of the source and of the text."""
    for start, end, whole in (("source_start", "source_end", result.source), ("start", "end", result.text)):
        places = [(getattr(s, start), getattr(s, end)) for s in result.segments]
        assert [a for a, _ in places] == [0, *(b for _, b in places)][: len(places)]
        assert (places[-1][1] if places else 0) == len(whole)


# A model that copies


def test_the_identity_model_copies() -> None:
    """The model that these tests lean on gives back what plain transformers' `generate` gives: its input."""
    text = "Any bytes: é 字 👍🏽"
    model, words = copier().model, copier().tokenizer
    ids = words(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.generate(ids, do_sample=False, max_new_tokens=90)
    assert words.decode(found[0], skip_special_tokens=True) == text
    assert copier()(text).text == text


@seldom
@given(documents, splits)
def test_a_document_is_copied(text: str, split: Any) -> None:
    """Through a model that copies, any document comes out as it went in, and segments cover both."""
    result = copier()(text, split=split)
    assert result.text == text == result.source
    covered(result)
    assert result.finish_reason == "eos"
    inner = [s for s in result.segments if s.notes != ("copied",)]
    assert [text[s.source_start : s.source_end] for s in inner] == [result.text[s.start : s.end] for s in inner]


@seldom
@given(documents, splits)
def test_a_document_with_placeholders_is_copied(text: str, split: Any) -> None:
    """With `keep`, too, a model that copies copies, and nothing has to be put right."""
    result = copier()(text, split=split, keep=["icu", "urls", "tags", r"\w+\.\w+"])
    assert result.text == text
    assert not any({"repaired", "inserted", "removed"} & set(s.notes) for s in result.segments)


@pytest.mark.parametrize("split", ["sentence", "paragraph"])
@pytest.mark.parametrize("keep", [[], ["icu"]], ids=["grows", "kept"])
def test_a_document_streams_in_order(split: Any, keep: list[str]) -> None:
    """Chunks of several documents, joined per row, are the whole texts; the last of each says why it ended."""
    texts = [DOCUMENT, "", "One. " * 40, " \n", DOCUMENT * 2]
    chunks = list(copier().stream(texts, split=split, keep=keep))
    for row, text in enumerate(texts):
        own = [chunk for chunk in chunks if chunk.index == row]
        assert "".join(chunk.text for chunk in own) == text
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + ["eos"]
        assert own[-1].result is not None
        assert own[-1].result.text == text
    if not keep:
        assert len([chunk for chunk in chunks if chunk.index == 4]) > 20


def test_a_stream_with_placeholders_shows_whole_pieces() -> None:
    """With `keep` a piece is shown once it is whole, so that nothing shown has to be taken back."""
    text = "A {name} is here.\nAnother {n} is there.\n"
    chunks = [chunk.text for chunk in copier().stream(text, split="sentence", keep=["icu"])]
    assert "".join(chunks) == text
    assert len([chunk for chunk in chunks if chunk]) <= 2


def test_a_paragraph_of_ten_thousand_words() -> None:
    """A paragraph far beyond the model's length is translated whole, in pieces of whole sentences."""
    text = " ".join("W!" if n % 30 == 29 else "wx"[: n % 2 + 1] for n in range(10_000))
    result = copier(256)(text, split="paragraph")
    assert result.text == text
    covered(result)
    assert result.generated_tokens == result.prompt_tokens
    assert all(s.notes in ((), ("copied",)) for s in result.segments)
    assert all(result.text[s.start : s.end].endswith("!") for s in result.segments[:-1:2])


def test_all_verbs_take_documents() -> None:
    """`map` and lists give documents back in order, empty ones among them, and one piece fails for nobody else."""
    texts = [DOCUMENT, "", "Two. Words.\n", "\t", "a"] * 3
    assert [r.text for r in copier()(texts, split="sentence")] == texts
    assert [r.text for r in copier().map(iter(texts), split="sentence")] == texts
    endless = copier().map(itertools.repeat(""), split="paragraph")
    assert [result.text for result in itertools.islice(endless, 600)] == [""] * 600
    assert [r.text for r in copier()(texts[:3], split=["sentence", "paragraph", "none"])] == texts[:3]


def test_pieces_of_all_documents_run_in_the_same_batches() -> None:
    """Documents together take fewer forward passes than one by one."""
    texts = [DOCUMENT, DOCUMENT[::-1], "One. Two. Three. Four.\n" * 3]

    def forwards(run: Any) -> int:
        before = copier().stats.forwards
        run()
        return int(copier().stats.forwards - before)

    alone = forwards(lambda: [copier()(text, split="sentence") for text in texts])
    together = forwards(lambda: copier()(texts, split="sentence"))
    assert together < 0.6 * alone


def test_a_piece_that_fails_fails_its_row_only() -> None:
    """A row with a piece that cannot be computed gets the error once; the other rows are whole."""
    bad = identity.tokenizer().convert_tokens_to_ids("Z")

    def fail(_step: int, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is not None and bool((ids == bad).any()):
            raise RuntimeError("no Z")

    texts = ["Good one. And two.\n", "Good. Z bad. Good. Z again.", "Fine."]
    with checkpoints.before_forwards(copier().model.get_encoder(), fail):
        with pytest.raises(lmkit.EngineError, match=r"row 1: .*no Z") as caught:
            copier()(texts, split="sentence")
        rows = list(copier().map(texts, split="sentence", on_error="return"))
    assert [str(row) for row in caught.value.results] == [texts[0], "None", texts[2]]
    assert [getattr(row, "text", None) for row in rows] == [texts[0], None, texts[2]]
    assert checkpoints.idle(copier())


# Lengths


def test_without_splitting_a_long_text_is_an_error() -> None:
    """`split="none"` takes a text as it is; one that is too long is an InputTooLongError, or cut where one says so."""
    assert copier()("a " * 40, split="none").text == "a " * 40
    with pytest.raises(lmkit.InputTooLongError, match="row 0 has 121 tokens, the model takes 96"):
        copier()("a " * 60, split="none")
    cut = copier()("a " * 60, split="none", truncate="right", max_new_tokens=200)
    assert cut.truncated
    assert cut.text == ("a " * 60)[:95]


@pytest.mark.parametrize("split", ["sentence", "paragraph"])
def test_splitting_and_cutting_contradict(split: Any) -> None:
    """`truncate` beside a split is an error that names both; a wrong split names the choices."""
    with pytest.raises(lmkit.OptionError, match=f"split='{split}' and truncate='left' contradict"):
        copier()("a", split=split, truncate="left")
    with pytest.raises(lmkit.OptionError, match="split takes 'sentence', 'paragraph' or 'none'"):
        copier().map(["a"], split=split + "s")


def test_truncate_alone_means_that_nothing_is_split() -> None:
    """Where documents are split by default, `truncate` cuts them instead."""
    text = " ".join(f"the sailor {n}." for n in range(60))
    result = wrapper("m2m100")(text, source="en", target="fr", truncate="right", max_new_tokens=2)
    assert result.truncated
    assert len(result.segments) == 1


@pytest.mark.parametrize("name", ["m2m100", "mbart", "mbart50", "nllb", "marian", "marian_group"])
def test_pieces_never_exceed_what_the_model_takes(name: str) -> None:
    """A family that translates splits by default; each piece has its language tokens and at most 128 tokens."""
    text = " ".join("the old sailor told a story." for _ in range(100)) + "\n" + "the sea and " * 100
    with checkpoints.forwards(wrapper(name).model.get_encoder()) as seen:
        result = wrapper(name)(text, max_new_tokens=3, **checkpoints.languages(name))
    rows = [
        row[kept.bool()].tolist()
        for call in seen
        for row, kept in zip(call["input_ids"], call["attention_mask"], strict=True)
    ]
    assert max(map(len, rows)) <= 128
    around = checkpoints.encoded(name, "the")
    other = checkpoints.encoded(name, "sea")
    ends = next(n for n, (a, b) in enumerate(zip(around[::-1], other[::-1], strict=False)) if a != b)
    assert all(row[len(row) - ends :] == around[len(around) - ends :] for row in rows)
    inner = [s for s in result.segments if "copied" not in s.notes]
    expected = [checkpoints.encoded(name, text[s.source_start : s.source_end]) for s in inner]
    assert sorted(rows) == sorted(expected)
    assert result.prompt_tokens == sum(map(len, expected))
    covered(result)


def test_a_model_without_bound_gets_pieces_of_512_tokens() -> None:
    """T5 takes any length; its documents are packed to at most 512 tokens of prefix and text."""
    text = " ".join("the old sailor told the children a story." for _ in range(100))
    options: dict[str, Any] = {"source": "en", "target": "de", "num_beams": 1, "suppress_tokens": [5]}
    with checkpoints.forwards(wrapper("t5").model.get_encoder()) as seen:
        wrapper("t5")(text, max_new_tokens=3, split="none", **options)
        result = wrapper("t5")(text, max_new_tokens=768, split="paragraph", min_new_tokens=0, stop="e", **options)
    whole, *pieces = [call["input_ids"].shape[1] for call in seen]
    assert whole > 512 >= max(pieces)
    assert max(pieces) > 400
    assert result.prompt == "translate English to German: " + text


def test_a_piece_leaves_its_answer_room() -> None:
    """Sentences are packed to two thirds of what an answer may have; the default answer is as long as the model's."""
    text = "Ab cd. " * 20
    for most, options in ((95, {}), (30, {"max_new_tokens": 30})):
        result = copier()(text, split="paragraph", **options)
        sizes = [s.source_end - s.source_start + 1 for s in result.segments if not s.notes]
        assert result.text == text
        assert most / 1.5 - len("Ab cd. ") < max(sizes) <= most / 1.5
    long = "word " * 80 + "end."
    assert copier(512)(long, split="paragraph").text == long  # 405 tokens, more than the default of 256


def test_an_answer_that_runs_out_is_marked() -> None:
    """`max_new_tokens` holds for each piece; a piece that runs out is marked, and the whole says `"length"`."""
    result = copier()("abcdefgh\nab\nabcdef", split="sentence", max_new_tokens=4)
    assert result.text == "abcd\nab\nabcd"
    assert result.finish_reason == "length"
    assert [s.notes for s in result.segments] == [("length",), ("copied",), (), ("copied",), ("length",)]
    covered(result)


def test_a_long_sentence_is_marked() -> None:
    """A sentence longer than the model is split, every piece of it marked, and comes out whole."""
    text = "Short one.\n" + "clause of words, " * 20 + "字" * 60 + "!"
    result = copier()(text, split="paragraph")
    assert result.text == text
    notes = [s.notes for s in result.segments if s.notes != ("copied",)]
    assert notes[0] == ()
    assert set(notes[1:]) == {("split",)}


# Placeholders


def test_placeholders_survive_a_model_that_breaks_them() -> None:
    """What a model cannot say is put in again, in its segment, as often as in the source; other text is the model's."""
    text = "Hello {name}, see {url} and {name}.\n{alone}\n- Bye {name}!\n"
    brace = identity.tokenizer().convert_tokens_to_ids("{")
    broken = copier()(text, split="sentence", suppress_tokens=[brace])
    result = copier()(text, split="sentence", suppress_tokens=[brace], keep=["icu"])
    assert "{name}" not in broken.text
    assert [result.text.count(word) for word in ("{name}", "{url}", "{alone}")] == [3, 1, 1]
    assert result.text.split("\n")[1] == "{alone}"
    covered(result)
    touched = [s for s in result.segments if {"inserted", "repaired"} & set(s.notes)]
    assert len(touched) == 2
    assert [result.text[s.start : s.end].count("{name}") for s in touched] == [2, 1]


def test_patterns_may_differ_per_row() -> None:
    """`keep` is a list for all rows, or a list of lists with one per row; a wrong pattern is an OptionError."""
    brace = identity.tokenizer().convert_tokens_to_ids("{")
    texts = ["to {a} b", "to {a} b"]
    first, second = copier()(texts, split="sentence", suppress_tokens=[brace], keep=[["icu"], []])
    assert "{a}" in first.text
    assert "{a}" not in second.text
    assert copier()(texts[0], split="none", suppress_tokens=[brace], keep="icu").text == first.text
    with pytest.raises(lmkit.OptionError, match="no regular expression"):
        copier()("a", keep=["("])


# Results


LINES = ["seventeen", "twenty-one", "three hundred and five", "nine"]
PAIR = {"source": "eng_Latn", "target": "fra_Latn"}


def test_a_document_is_its_lines_translated() -> None:
    """The shipped translator: a list of numbers is the list of their translations, markers and line ends in place."""
    text = "# {}\r\n\r\n- {}\r\n  2. {}\t{}\n".format(*LINES)
    alone = numbers()(LINES, **PAIR)
    result = numbers()(text, **PAIR)
    assert result.text == "# {}\r\n\r\n- {}\r\n  2. {}\t{}\n".format(*alone)
    assert alone[0].text == "dix-sept"
    assert result.token_ids == tuple(token for row in alone for token in row.token_ids)
    assert result.prompt_tokens == sum(row.prompt_tokens for row in alone)
    assert result.generated_tokens == sum(row.generated_tokens for row in alone)
    assert result.timing.seconds > 0
    assert result.timing.seconds >= result.timing.seconds_to_first_token


def test_a_line_that_fits_has_the_tokens_of_plain_transformers() -> None:
    """A text of one line is one piece, white space aside, and splitting changes nothing."""
    for split in ("paragraph", "sentence", "none"):
        result = numbers()("seventeen", split=split, **PAIR)
        assert (result.text, len(result.segments)) == ("dix-sept", 1)
    assert numbers()("  seventeen\n", **PAIR).text == "  dix-sept\n"


@pytest.mark.parametrize("text", ["", "   ", "\r\n\r\n", "— … —", "😀"])
def test_a_text_without_words_needs_no_model(text: str) -> None:
    """What has nothing to translate comes out as it is, without a forward pass, for each completion."""
    before = numbers().stats.forwards
    result = numbers()(text, num_beams=2, num_return_sequences=2, **PAIR)
    assert [completion.text for completion in result.completions] == [text, text]
    assert (result.finish_reason, result.generated_tokens, result.prompt_tokens) == ("eos", 0, 0)
    assert numbers().stats.forwards == before
    covered(result)


def test_the_best_of_a_document_join_those_of_its_pieces() -> None:
    """Completion j joins the j-th of each piece; its score is the mean of theirs, weighted by their tokens."""
    options: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 3, **PAIR}
    alone = numbers()(LINES, **options)
    result = numbers()("\n".join(LINES), **options)
    for number, completion in enumerate(result.completions):
        parts = [row.completions[number] for row in alone]
        assert completion.text == "\n".join(part.text for part in parts)
        tokens = [part.generated_tokens for part in parts]
        mean = sum(part.score * n for part, n in zip(parts, tokens, strict=True)) / sum(tokens)
        assert completion.score == pytest.approx(mean, abs=1e-5)
    scores = [completion.score for completion in result.completions]
    assert scores == sorted(scores, reverse=True)


def test_the_best_of_one_piece_are_those_of_generate() -> None:
    """`num_beams=4, num_return_sequences=4`: texts and scores are those of `model.generate`."""
    model, tokenizer = numbers().model, numbers().tokenizer
    result = numbers()("seventy-one", num_beams=4, num_return_sequences=4, **PAIR)
    ids = torch.tensor([list(checkpoints_ids("seventy-one"))])
    with torch.no_grad():
        found = model.generate(
            ids, num_beams=4, num_return_sequences=4, do_sample=False, max_new_tokens=63, return_dict_in_generate=True,
            output_scores=True, forced_bos_token_id=tokenizer.convert_tokens_to_ids("fra_Latn"),
        )  # fmt: skip
    texts = tokenizer.batch_decode(found.sequences, skip_special_tokens=True)
    assert [completion.text for completion in result.completions] == texts
    assert [c.score for c in result.completions] == pytest.approx(found.sequences_scores.tolist(), abs=1e-4)


def checkpoints_ids(text: str) -> list[int]:
    """Encode an English text as the number translator's tokenizer does."""
    import copy

    tokenizer = copy.deepcopy(numbers().tokenizer)
    tokenizer.src_lang = "eng_Latn"
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def test_log_probabilities_follow_the_tokens() -> None:
    """`logprobs` of a document are those of its pieces, one after the other."""
    alone = numbers()(LINES, logprobs=1, **PAIR)
    result = numbers()("\n".join(LINES), logprobs=1, **PAIR)
    assert [entry.token_id for entry in result.logprobs] == [e.token_id for row in alone for e in row.logprobs]
    assert len(result.logprobs) == result.generated_tokens


def test_a_sampled_document_is_reproducible() -> None:
    """A seed gives the same document, alone and among others; its first piece draws what it draws alone."""
    text = "\n".join(LINES * 2)
    options: dict[str, Any] = {"temperature": 3.0, "seed": 7, **PAIR}
    first = numbers()(text, **options)
    assert first.text == numbers()(["nine", text], **options)[1].text
    assert first.text.split("\n")[0] == numbers()(LINES[0], **options).text
    assert first.text.split("\n")[4] != numbers()(LINES[0], **options).text
    assert first.seed == 7
    drawn = numbers()(text, temperature=3.0, **PAIR)
    assert numbers()(text, temperature=3.0, seed=drawn.seed, **PAIR).text == drawn.text


def test_sentences_are_translated_by_themselves() -> None:
    """Between languages each sentence is a piece by default: lines of several are whole, as they are alone."""
    for name, pair in (("numbers-m2m100", PAIR), ("numbers-t5", {"preset": "translation_en_to_de"})):
        words = ["Eleven.", "Seventeen!", "Two?", "Nine."]
        alone = [result.text for result in numbers(name)(words, **pair)]
        assert numbers(name)(" ".join(words), **pair).text == " ".join(alone)


@pytest.mark.parametrize("name", ["m2m100", "mbart", "mbart50", "nllb", "marian", "marian_group"])
def test_families_that_translate_read_sentences(name: str) -> None:
    """Every family whose rows go from one language to another splits them by default; a paragraph is by wish."""
    text, options = "One is here. Two is there.\nThree.", {"max_new_tokens": 40, **checkpoints.languages(name)}
    for split, expected in ((None, 3), ("sentence", 3), ("paragraph", 2), ("none", 1)):
        result = wrapper(name)(text, split=split, **options)
        pieces = [segment for segment in result.segments if not {"copied", "spaced"}.intersection(segment.notes)]
        assert len(pieces) == expected


def test_pieces_are_joined_as_the_target_writes() -> None:
    """A space between sentences that the source writes without one, and none in Chinese and Japanese."""
    together = numbers()("Eleven.Twelve.", **PAIR)
    assert together.text == " ".join(result.text for result in numbers()(["Eleven.", "Twelve."], **PAIR))
    assert [segment.notes for segment in together.segments] == [(), ("spaced",), ()]
    pieces = {"zh": ["一。", "二。"], "en": ["One.", "Two."]}
    for source, gap in (("zh", ""), ("en", " ")):
        for target, expected in (("fr", " "), ("ja", ""), ("zh", ""), ("th", gap), ("ko", " ")):
            options = {"source": source, "target": target, "max_new_tokens": 4}
            text, alone = gap.join(pieces[source]), wrapper("m2m100")(pieces[source], **options)
            result = wrapper("m2m100")(text, **options)
            assert result.text == expected.join(one.text for one in alone)
            assert "".join(chunk.text for chunk in wrapper("m2m100").stream(text, **options)) == result.text
            covered(result)


def test_a_tag_in_the_text_holds_for_all_pieces() -> None:
    """A Marian tag written into a document is put before every piece, and stays out of the text."""
    text = ">>spa<< Birds fly.\nShe sings."
    expected = [
        checkpoints.reference("marian_group")[1](f">>spa<< {line}")["input_ids"]
        for line in ("Birds fly.", "She sings.")
    ]
    with checkpoints.forwards(wrapper("marian_group").model.get_encoder()) as seen:
        result = wrapper("marian_group")(text, max_new_tokens=2)
    rows = [
        row[kept.bool()].tolist() for c in seen for row, kept in zip(c["input_ids"], c["attention_mask"], strict=True)
    ]
    assert sorted(rows) == sorted(expected)
    assert result.segments[0].notes == ("prefix",)
    covered(result)


def test_a_summary_reads_its_whole_text() -> None:
    """A preset that is no translation, and a model that is told nothing, take a text as it is."""
    for name, options in (("t5", {"preset": "summarization"}), ("bart", {}), ("t5", {})):
        result = wrapper(name)("One is here. Two.\nThree.", max_new_tokens=2, num_beams=1, **options)
        assert [(s.source_start, s.source_end) for s in result.segments] == [(0, 24)]


def test_what_the_vocabulary_lacks_is_noted() -> None:
    """A piece with characters that the model cannot see says so, with all ways to split; the others do not."""
    text = "twenty\nseven \u65e5\u672c\n* * *\nnine"
    for split, expected in (("sentence", [(), ("copied",), ("unknown",), ("copied",), ()]), ("none", [("unknown",)])):
        result = numbers()(text, split=split, **PAIR)
        assert [segment.notes for segment in result.segments] == expected


def test_what_is_kept_need_not_be_in_the_vocabulary() -> None:
    """Placeholders come out whatever the model sees of them."""
    keep = [r"\{\w+\}"]
    one, both = numbers()(["seven {\u540d}", "seven {\u540d} \u65e5"], keep=keep, **PAIR)
    assert "{\u540d}" in one.text
    assert "unknown" not in one.segments[0].notes
    assert "unknown" in both.segments[0].notes


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"temperature": 1.0, "seed": 1}])
def test_an_unknown_token_that_is_written_is_noted_and_can_be_forbidden(way: dict[str, Any], tmp_path: Path) -> None:
    """A model that likes its unknown token: the text lacks it and says so; forbidden, the tokens are `generate`'s."""

    def edit(model: Any, tokenizer: Any) -> None:
        model.final_logits_bias[0, tokenizer.unk_token_id] = 50.0

    where = checkpoints.changed("marian", tmp_path / "marian", edit)
    model, tokenizer = checkpoints.plain("seq2seq", where)
    unknown, text = tokenizer.unk_token_id, "One is here."
    with checkpoints.fresh("marian", where) as loaded:
        result = loaded(text, max_new_tokens=6, **way)
        forbidden = loaded(text, max_new_tokens=6, suppress_unknown=True, **way)
        both = loaded(text, max_new_tokens=6, suppress_unknown=True, suppress_tokens=[5], **way)
    assert unknown in result.token_ids
    assert result.segments[0].notes[-3:] == ("unwritten", "length", "empty")
    assert unknown not in forbidden.token_ids
    assert "unwritten" not in forbidden.segments[0].notes
    assert not {5, unknown} & set(both.token_ids)
    if "seed" not in way:
        settings = {"max_new_tokens": 6, "suppress_tokens": [unknown], **way}
        assert list(forbidden.token_ids) == checkpoints.generated("marian", [text], model, **settings)[0]


def test_a_tag_around_a_text_is_not_translated() -> None:
    """`<p>seventeen</p>` reads as `seventeen` alone."""
    for text in ("<p>{}</p>", "<li><b>{}</b></li>", "🎉 {} 🎉", "- {}<br/>"):
        result = numbers()(text.format("seventeen"), keep=["tags", "emoji"], **PAIR)
        assert result.text == text.format("dix-sept")
        covered(result)


def test_a_vocabulary_without_an_unknown_token_lacks_nothing() -> None:
    """Bytes express everything."""
    assert copier()("\u65e5\u672c").segments[0].notes == ()
