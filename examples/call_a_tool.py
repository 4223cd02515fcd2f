"""Let a chat model call a function, and answer with what the function returned.

SmolLM2's chat template knows no tools, so this brings one; a model that was made for tools has its own.
"""

from __future__ import annotations

from typing import Any

import lmkit
import smollm2

TEMPLATE = """{% if tools %}<|im_start|>system
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>. You can call:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""


def weather(city: str) -> dict[str, object]:
    """Say how the weather is.

    Args:
        city: The name of a city.
    """
    return {"city": city, "degrees": 21}


def main() -> None:
    """Ask until an answer calls nothing, or twice."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "How is the weather in Lisbon?"}]
    with lmkit.load("causal", smollm2.path(), "float32") as generator:
        for choice in ("required", "auto"):
            answer = generator.chat(
                messages, tools=[weather], tool_choice=choice, template={"chat_template": TEMPLATE}, max_new_tokens=40
            )
            for call in answer.tool_calls:
                print(f"calls {call.name}({call.arguments})")
            messages += [answer.message, *lmkit.call_tools(answer, [weather])]
    for message in messages:
        print(f"{message['role']}: {message.get('content') or 'a call'}")


if __name__ == "__main__":
    main()
