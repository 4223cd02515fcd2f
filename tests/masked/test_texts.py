"""The reference is the tokenizer on the whole text, with the word in the mask's place."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, processors

import lmkit
import tokenizers_tiny as tiny
from brute import log_probabilities
from lmkit.masked.texts import MaskedTexts
from lmkit.text.codec import Codec

hf: Any = transformers

WORDS = [
    "▁北京",
    "北京",
    "是",
    "的",
    "首都",
    "。",
    "中国",
    "▁中国",
    "▁的",
    "人民",
    "▁ฉัน",
    "รัก",
    "▁รัก",
    "คุณ",
    "▁l'",
    "eau",
]
WORDS += ["▁eau", "(", ")", "«", "»", "Paris", "▁Paris", "▁well", "-", "known", "▁known", "“", "”", "▁「", "」"]


def pieces() -> list[tuple[str, float]]:
    """Return unigram pieces with words of scripts that write no spaces, with and without one before them."""
    ours = dict.fromkeys(WORDS, -5.0) | {"▁": -3.0}
    return [piece for piece in tiny.unigram() if piece[0] not in ours] + list(ours.items())


def byte_level(mask: Any = None) -> Any:
    """Build a tokenizer as ModernBERT's, with a mask that swallows spaces before it or as given."""
    return tiny.byte_level_backend(
        ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"), "[CLS] $A [SEP]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", pad_token="[PAD]", mask_token=mask or tiny.mask("[MASK]"),
    )  # fmt: skip


def word_piece() -> Any:
    """Build a WordPiece tokenizer that knows Chinese characters."""
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return hf.BertTokenizer(tiny.numbered(first, tiny.word_pieces(), "我爱你中国是好", ["iphone", "手机", "(", ")"]))


def replaced_spaces() -> Any:
    """Build a BPE tokenizer that writes each space as a mark and divides no words, as mmBERT has of Gemma."""
    vocabulary = tiny.numbered(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"], "".join(WORDS), ["中国", "▁中国"])
    inner = Tokenizer(models.BPE(vocabulary, [("中", "国"), ("▁", "中国")], unk_token="[UNK]"))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Replace("▁", " ")
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    named = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return hf.TokenizersBackend(tokenizer_object=inner, mask_token=tiny.mask("[MASK]"), **named)


@cache
def tokenizer(name: str) -> Any:
    """Build a tokenizer of a family."""
    scored = tiny.scored
    if name == "xlm_roberta":
        made = [*scored(["<s>", "<pad>", "</s>", "<unk>"]), *pieces(), *scored(["<mask>"])]
        return hf.XLMRobertaTokenizer(made, mask_token=tiny.mask("<mask>"))
    if name == "camembert":
        made = [*scored(["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>"]), *pieces(), *scored(["<mask>"])]
        return hf.CamembertTokenizer(vocab=made)
    if name == "albert":
        made = [*scored(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]), *pieces()]
        return hf.AlbertTokenizer(made, mask_token=tiny.mask("[MASK]"), do_lower_case=False, keep_accents=True)
    if name == "deberta_v2":
        made = [*scored(["[PAD]", "[CLS]", "[SEP]", "[UNK]"]), *pieces(), *scored(["[MASK]"])]
        return hf.DebertaV2Tokenizer(made)
    if name == "mmbert":
        return replaced_spaces()
    others = {"roberta": tiny.roberta, "modernbert": byte_level, "bert": word_piece}
    return others[name]() if name in others else byte_level("[MASK]")


SENTENCEPIECE = ["xlm_roberta", "camembert", "albert", "deberta_v2"]
BYTES = ["roberta", "modernbert", "greedy"]


def read(name: str, text: str, words: list[str]) -> Any:
    """Return per mask what lmkit makes of each word."""
    job = MaskedTexts(Codec(tokenizer(name)), None, name).job(
        text, targets=words, row=0, top_k=1, width=1, order="left_to_right", per_token=False, sample=None, seed=None
    )
    assert job.blanks.targets is not None
    return job.blanks.targets


def within(name: str, text: str, word: str) -> list[list[int]]:
    """Return for each mask the tokens of the whole text, with the word at all masks, that have characters of it.

    Tokens that are nothing but space before it belong to it where the mask swallows that space.
    """
    made, parts = tokenizer(name), text.split("[MASK]")
    starts = [len(word.join(parts[: mask + 1])) for mask in range(len(parts) - 1)]
    found = made(text.replace("[MASK]", word), return_offsets_mapping=True)
    tokens, spans = found["input_ids"], found["offset_mapping"]
    all_found = []
    for start in starts:
        inside = [n for n, (a, b) in enumerate(spans) if a < start + len(word) and b > start]
        first = inside[0]
        while name != "greedy" and first > 1 and not made.decode(tokens[first - 1]).strip():
            first -= 1
        all_found.append(tokens[first : inside[-1] + 1])
    return all_found


@pytest.mark.parametrize("name", SENTENCEPIECE)
@pytest.mark.parametrize(
    "text, word",
    [
        ("北京是[MASK]的首都。", "中国"),
        ("[MASK]的首都。", "中国"),
        ("北京是[MASK]", "中国"),
        ("北京 [MASK] 的", "中国"),
        ("ฉัน[MASK]คุณ", "รัก"),
        ("l'[MASK] est", "eau"),
        ("The capital ([MASK]) is", "Paris"),
        ("«[MASK]» is", "Paris"),
        ("well-[MASK] is", "known"),
        ("“[MASK]”", "Paris"),
        ("The [MASK] is old.", "capital of the"),
        ("The capital of France is [MASK].", "Paris"),
        ("北京是[MASK]。", "中国人民"),
    ],
)
def test_a_target_has_the_tokens_of_the_whole_text(name: str, text: str, word: str) -> None:
    """With a sentencepiece tokenizer a word has a space before it only where the text has one."""
    ((target,),) = read(name, text, [word])
    assert [list(target.token_ids)] == within(name, text, word)


@pytest.mark.parametrize("name", ["mmbert", "bert"])
@pytest.mark.parametrize("text", ["我[MASK]你", "是 [MASK] 好", "[MASK]是好", "([MASK])"])
def test_a_word_of_a_script_without_spaces_is_the_word_itself(name: str, text: str) -> None:
    """WordPiece and BPE without a division into words agree with the whole text too."""
    ((target,),) = read(name, text, ["中国"])
    assert [list(target.token_ids)] == within(name, text, "中国")


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("target", [" old", "old ", " old ", "  old\n", "old"])
@pytest.mark.parametrize("text", ["The [MASK] is", "[MASK] is", "The ([MASK])", "The\n[MASK]", "sea of the [MASK]."])
def test_spaces_around_a_target_change_nothing(name: str, target: str, text: str) -> None:
    """The text says whether a space stands before the word; byte-level tokenizers have it in the first token."""
    ((found,),) = read(name, text, [target])
    assert [list(found.token_ids)] == within(name, text, "old")
    assert found.word == "old"


@pytest.mark.parametrize("name", [*BYTES, "xlm_roberta", "bert"])
def test_a_space_that_a_target_brings_divides_two_words(name: str) -> None:
    """Behind a letter the space of a target is kept, as in what byte-level models are usually given."""
    ((found,),) = read(name, "The[MASK] is", [" old"])
    assert [list(found.token_ids)] == within(name, "The [MASK] is", "old")
    ((glued,),) = read(name, "The[MASK] is", ["old"])
    assert [list(glued.token_ids)] == within(name, "The[MASK] is", "old") != [list(found.token_ids)]


@pytest.mark.parametrize("name", [*SENTENCEPIECE, *BYTES, "mmbert"])
@pytest.mark.parametrize("text", ["是[MASK][MASK]的", "[MASK] [MASK]", "[MASK]是[MASK]", "是 [MASK]的[MASK]"])
def test_each_of_several_masks_has_the_words_tokens_there(name: str, text: str) -> None:
    """The same word has other tokens at the beginning than behind another; the other masks hold the word as well."""
    targets = read(name, text, ["中国", "是"])
    for number, word in enumerate(("中国", "是")):
        assert [list(words[number].token_ids) for words in targets] == within(name, text, word)


@pytest.mark.parametrize("name, text, word", [("bert", "s[MASK]", "he is"), ("roberta", "t[MASK]", "he")])
def test_a_word_that_shares_a_token_with_the_text_has_its_own(name: str, text: str, word: str) -> None:
    """Where the whole text has a token with characters of both, the word's are those it has by itself."""
    ((target,),) = read(name, text, [word])
    assert list(target.token_ids) == tokenizer(name)(word, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_marks_the_ends_of_words_is_asked_for_the_whole_text(tmp_path: Path) -> None:
    """XLM's writes a word in another way where letters follow it, and knows no places of characters."""
    made = tiny.xlm(tmp_path)
    how = {"top_k": 1, "width": 1, "order": "left_to_right", "per_token": False, "sample": None, "seed": None}
    job = MaskedTexts(Codec(made), None, "xlm").job("the [MASK]q", targets=["xx"], row=0, **how)
    assert made.tokenize("the xxq") == ["the</w>", "x", "x", "q</w>"]
    assert job.blanks.targets is not None
    assert made.convert_ids_to_tokens(job.blanks.targets[0][0].token_ids) == ["x", "x"]


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Give wrappers of tiny models with an XLM-RoBERTa's, a RoBERTa's and a BERT's tokenizer."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    loaded = {}
    for name, kind in {"xlm_roberta": "XLMRoberta", "roberta": "Roberta", "bert": "Bert"}.items():
        where, made = tmp_path_factory.mktemp(name), tokenizer(name)
        config = getattr(hf, f"{kind}Config")(vocab_size=len(made), pad_token_id=made.pad_token_id, **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            getattr(hf, f"{kind}ForMaskedLM")(config).eval().save_pretrained(where)
        made.save_pretrained(where)
        loaded[name] = lmkit.load("masked", str(where), "float32", "cpu")
    yield loaded
    for unmasker in loaded.values():
        unmasker.close()


@pytest.mark.parametrize(
    "name, text, word",
    [
        ("xlm_roberta", "北京是[MASK]的首都。", "中国"),
        ("xlm_roberta", "l'[MASK] est", "eau"),
        ("roberta", "The [MASK] is", " sailor "),
        ("roberta", "The ([MASK]) is", " sailor"),
        ("bert", "我[MASK]你", "爱"),
    ],
)
def test_a_target_is_scored_as_those_tokens(chinese: dict[str, Any], name: str, text: str, word: str) -> None:
    """Its log-probabilities are plain transformers' for the tokens of the whole text; the text has just the word."""
    unmasker, made = chinese[name], tokenizer(name)
    (candidate,) = unmasker(text, targets=[word]).candidates
    (expected,) = within(name, text, word.strip())
    masked = made(text.replace("[MASK]", made.mask_token * len(expected)))["input_ids"]
    logprobs = []
    for token_id in expected:
        place = masked.index(made.mask_token_id)
        logprobs.append(float(log_probabilities(unmasker.model, [masked])[0, place, token_id]))
        masked[place] = token_id
    assert list(candidate.token_ids) == expected
    assert candidate.token_logprobs == pytest.approx(logprobs, abs=1e-5)
    assert (candidate.text, candidate.token) == (text.replace("[MASK]", word.strip()), word.strip())


@pytest.mark.parametrize("name", ["xlm_roberta", "roberta"])
@pytest.mark.parametrize("text", ["是[MASK]的", "the [MASK] is", "the[MASK]", "([MASK])", "[MASK] is"])
def test_a_space_stands_before_a_fill_where_its_token_has_one(chinese: dict[str, Any], name: str, text: str) -> None:
    """The text is what the tokens say together, as transformers decodes them, but for a space that begins it."""
    made, (left, right) = tokenizer(name), text.split("[MASK]")
    for candidate in chinese[name](text, top_k=len(made)).candidates:
        piece = made.convert_ids_to_tokens(candidate.token_id)
        said = made.decode([candidate.token_id]) if name == "roberta" else piece.replace("▁", " ")
        if said.strip() and candidate.token_id not in made.all_special_ids:
            assert candidate.text == ((left.rstrip(" ") + said) if left else said.lstrip()) + right


@pytest.mark.parametrize(
    "text, fills",
    [
        ("我[MASK]你", {"爱": "我爱你", "iphone": "我iphone你", "##a": "我a你"}),
        ("我 [MASK] 你", {"爱": "我 爱 你", "##a": "我a 你"}),
        ("the[MASK].", {"sea": "the sea.", "爱": "the爱.", "##a": "thea.", ")": "the)."}),
    ],
)
def test_fills_in_chinese_have_no_space_before_them(chinese: dict[str, Any], text: str, fills: dict[str, str]) -> None:
    """WordPiece takes Chinese characters apart by itself: a space stands only where words would grow together."""
    made, found = tokenizer("bert"), {one.token_id: one.text for one in chinese["bert"](text, top_k=1000).candidates}
    assert {piece: found[made.convert_tokens_to_ids(piece)] for piece in fills} == fills
