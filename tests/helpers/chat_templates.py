"""Short chat templates in the manner of a dozen families, and tokenizers that have their control tokens."""

# ruff: noqa: E501, Q003 - templates are read whole

from typing import Any

import transformers
from tokenizers import AddedToken, normalizers

import tokenizers_tiny as tiny

hf: Any = transformers

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "thinking": "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' and not (m.content.startswith("
    "'<tool_response>') and m.content.endswith('</tool_response>')) %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content or '' %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ content }}{% for c in m.tool_calls or [] %}\n<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": "
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}<|im_start|>user\n"
    "<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "headers": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.content is mapping or (m.content is iterable and m.content is not string) %}{{ m.content | tojson }}"
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "inst": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('an id has nine characters') }}{% endif %}[TOOL_CALLS]{{ c.function | tojson }}{% endfor %}"
    " {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "pieces": "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "turns": "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "wide": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == "
    "'assistant' %}<｜Assistant｜>{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% else %}"
    "{{ m.content }}{% endif %}<｜end▁of▁sentence｜>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
    "lines": "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + eos_token }}"
    "{% elif m.role == 'system' %}{{ '<|system|>\n' + m.content + eos_token }}{% else %}"
    "{{ '<|assistant|>\n' + m.content + eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "parts": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "channels": "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>{% for m in messages %}"
    "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "documents": "{% for d in documents or [] %}<|start_of_role|>document {{ d | tojson }}<|end_of_role|>{% for k, v in "
    "d.items() %}{{ k }}: {{ v }}\n{% endfor %}<|end_of_text|>{% endfor %}{% for m in messages %}<|start_of_role|>"
    "{{ m['role'] }}<|end_of_role|>{{ m['content'] }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
    "named": "{% for m in messages %}<|im_start|>{{ m.name | default(m.role) }}\n{{ m.content | replace('[cut]', '') }}"
    "<|im_end|>{% endfor %}",
}  # fmt: skip
SPECIAL = [
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "[INST]", "[/INST]",
    "[TOOL_CALLS]", "<|start|>", "<|message|>", "<|channel|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>",
]  # fmt: skip
ADDED = [
    "<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "<|tool|>", "<think>", "</think>", "<tool_call>",
    "</tool_call>", "<tool_response>", "</tool_response>",
]  # fmt: skip
"""Added tokens that are not special, as they are with several families."""
ORDINARY = ["\n\n", "    ", "Zürich", "<table>"]
"""Added tokens that no template writes."""


def byte_level(*, wide: bool = False) -> Any:
    """Build a byte-level tokenizer with all these tokens; `wide` reads wide letters as narrow ones."""
    tokens, merges = tiny.byte_bpe()
    tokenizer = hf.Qwen2Tokenizer(
        tiny.numbered(tokens, ["<|endoftext|>"]), merges, bos_token="<s>", eos_token="</s>", unk_token=None
    )
    if wide:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return _with_tokens(tokenizer, normalized=wide)


def sentencepiece() -> Any:
    """Build a Llama tokenizer with all these tokens."""
    return _with_tokens(tiny.llama(), normalized=False)


def _with_tokens(tokenizer: Any, *, normalized: bool) -> Any:
    tokenizer.add_tokens([AddedToken(x, special=True, normalized=normalized) for x in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(x, normalized=normalized) for x in [*ADDED, *ORDINARY]])
    return tokenizer
