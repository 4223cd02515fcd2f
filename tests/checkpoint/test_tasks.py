from typing import Any

import pytest
import transformers

from lmkit.checkpoint.tasks import TASK_WORDS, Task, auto_class, check_task, fitting_tasks, resolve_task
from lmkit.errors import UnknownTaskError

hf: Any = transformers  # Its annotations are narrower than what it accepts.


@pytest.mark.parametrize(
    "word, task",
    [
        ("causal", "causal"),
        ("text-generation", "causal"),
        ("seq2seq", "seq2seq"),
        ("translation", "seq2seq"),
        ("summarization", "seq2seq"),
        ("text2text-generation", "seq2seq"),
        ("masked", "masked"),
        ("fill-mask", "masked"),
    ],
)
def test_a_task_is_known_by_its_name_and_by_its_pipelines_names(word: str, task: Task) -> None:
    """Each task's name and each pipeline's name stands for one of the three tasks."""
    assert resolve_task(word) == task


def test_no_other_word_is_a_task() -> None:
    """The words of the parametrized test above are all there are."""
    assert len(TASK_WORDS) == 8


@pytest.mark.parametrize(
    "word, near", [("casual", "causal"), ("seq2sec", "seq2seq"), ("mask", "masked"), ("fillmask", "fill-mask")]
)
def test_a_misspelt_task_names_the_nearest(word: str, near: str) -> None:
    """An unknown task word is refused with what was given, the nearest word and all the words."""
    with pytest.raises(UnknownTaskError) as caught:
        resolve_task(word)
    message = str(caught.value)
    assert f"unknown task {word!r}" in message
    assert f"Did you mean {near!r}?" in message
    assert all(repr(known) in message for known in TASK_WORDS)


@pytest.mark.parametrize("word", ["question-answering", "", None, 3, ["causal"]])
def test_a_task_that_is_near_nothing_lists_the_words(word: Any) -> None:
    """A word far from all others, or something that is no word, is refused with the words alone."""
    with pytest.raises(UnknownTaskError, match="Accepted: 'causal', 'text-generation'") as caught:
        resolve_task(word)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "task, name",
    [("causal", "AutoModelForCausalLM"), ("seq2seq", "AutoModelForSeq2SeqLM"), ("masked", "AutoModelForMaskedLM")],
)
def test_each_task_has_its_auto_class(task: Task, name: str) -> None:
    """A task is loaded by the transformers Auto class of that kind of model."""
    assert auto_class(task) is getattr(transformers, name)


@pytest.mark.parametrize(
    "kind, architecture, tasks",
    [
        ("gpt2", "GPT2LMHeadModel", ["causal"]),
        ("llama", "LlamaForCausalLM", ["causal"]),
        ("mamba", "MambaForCausalLM", ["causal"]),
        ("bert", "BertForMaskedLM", ["masked"]),
        ("bert", "BertLMHeadModel", ["causal"]),
        ("roberta", "RobertaForMaskedLM", ["masked"]),
        ("roberta", "RobertaForCausalLM", ["causal"]),
        ("xlm-roberta", "XLMRobertaForMaskedLM", ["masked"]),
        ("deberta-v2", "DebertaV2ForMaskedLM", ["masked"]),
        ("t5", "T5ForConditionalGeneration", ["seq2seq"]),
        ("mt5", "MT5ForConditionalGeneration", ["seq2seq"]),
        ("m2m_100", "M2M100ForConditionalGeneration", ["seq2seq"]),
        ("marian", "MarianMTModel", ["seq2seq"]),
        ("bart", "BartForCausalLM", ["causal"]),
    ],
)
def test_the_architecture_a_checkpoint_names_decides_its_task(kind: str, architecture: str, tasks: list[Task]) -> None:
    """Of a model type that can be built for several tasks, the saved class tells which it is for."""
    config = hf.CONFIG_MAPPING[kind](architectures=[architecture])
    assert fitting_tasks(config) == tasks
    assert [check_task(task, config, "here") for task in tasks] == [architecture] * len(tasks)


@pytest.mark.parametrize(
    "kind, options, tasks",
    [
        ("gpt2", {}, ["causal"]),
        ("t5", {}, ["seq2seq"]),
        ("bert", {}, ["masked"]),
        ("bert", {"is_decoder": True}, ["causal", "masked"]),
        ("bert", {"architectures": ["BertModel"]}, ["masked"]),
        ("vit", {}, []),
    ],
)
def test_without_a_known_architecture_the_model_type_decides(
    kind: str, options: dict[str, Any], tasks: list[Task]
) -> None:
    """A config that names no class of the three tasks is judged by its model type and settings."""
    assert fitting_tasks(hf.CONFIG_MAPPING[kind](**options)) == tasks


@pytest.mark.parametrize(
    "task, kind, architecture, fitting",
    [
        ("causal", "bert", "BertForMaskedLM", "masked"),
        ("seq2seq", "bert", "BertForMaskedLM", "masked"),
        ("masked", "t5", "T5ForConditionalGeneration", "seq2seq"),
        ("causal", "t5", "T5ForConditionalGeneration", "seq2seq"),
        ("masked", "gpt2", "GPT2LMHeadModel", "causal"),
        ("seq2seq", "gpt2", "GPT2LMHeadModel", "causal"),
        ("masked", "roberta", "RobertaForCausalLM", "causal"),
    ],
)
def test_the_wrong_task_names_the_one_that_fits(task: Task, kind: str, architecture: str, fitting: str) -> None:
    """A checkpoint made for another task is refused with its class and the call to write."""
    config = hf.CONFIG_MAPPING[kind](architectures=[architecture])
    with pytest.raises(UnknownTaskError) as caught:
        check_task(task, config, "some/name")
    message = str(caught.value)
    assert f"'some/name' is {architecture} (model type '{config.model_type}')" in message
    assert f"made for '{fitting}', not {task!r}" in message
    assert f"load({fitting!r}" in message


@pytest.mark.parametrize("task", ["causal", "seq2seq", "masked"])
def test_a_model_of_images_does_none_of_the_tasks(task: Task) -> None:
    """A checkpoint that no task fits is refused with what it is and what lmkit loads."""
    config = hf.ViTConfig(architectures=["ViTForImageClassification"])
    with pytest.raises(UnknownTaskError) as caught:
        check_task(task, config, "some/name")
    message = str(caught.value)
    assert "ViTForImageClassification (model type 'vit'), which does none of lmkit's tasks" in message
    assert "'causal', 'seq2seq', 'masked'" in message
