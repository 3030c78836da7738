"""Conversations, chat templates in the style of the families (each with something of its own), and a vocabulary."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kimi_jax.data import hf_vocab
from kimi_jax.data.chat_template import ChatTemplate

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

WITH_TOOLS = """{%- set ns = namespace(first=true) -%}
{%- if messages[0].role == 'system' %}{% set intro = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set intro = 'You help with sums.' %}{% set rest = messages %}{% endif -%}
<|im_start|>system
{{ intro }}
{%- if tools %}

# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
{{ tools | tojson(indent=2) }}
{%- endif %}<|im_end|>
{% for message in rest %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' ~ message.content | trim ~ '\\n</tool_response><|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' ~ message['role'] ~ '\\n' }}{{ message.content if message.content is defined }}
    {%- for call in message.tool_calls | default([]) %}
        {{- '\\n<tool_call>\\n' ~ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
        {{- '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
    {%- set ns.first = false %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if not (enable_thinking | default(true)) -%}
<think>

</think>

{% endif %}{% endif %}"""

HEADERS = """{{ bos_token }}{% for message in messages %}
{%- set content = '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|eot|>' %}
{%- if loop.first and message.role == 'system' %}{% set content = content | replace('DATE', strftime_now('%Y')) %}
{%- endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"""

GENERATION = """{% for message in messages %}
    {%- if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.reasoning_content ~ '</think>' if message.reasoning_content }}{{ message.content }}
        {%- if loop.index is even %}<|im_end|>{% endif %}{% endgeneration %}
        {%- if loop.index is odd %}<|im_end|>{% endif %}

    {%- else %}
        {{- '<|im_start|>%s\\n%s<|im_end|>' % (message.role, message.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

PICTURES = """{% set seen = namespace(images=0) %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' or 'image' in part %}{% set seen.images = seen.images + 1 %}
{%- if number_images is defined %}Picture {{ seen.images }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TEMPLATES = {"chatml": CHATML, "tools": WITH_TOOLS, "headers": HEADERS, "generation": GENERATION, "pictures": PICTURES}
SPECIAL = "<|begin|> <|im_start|> <|im_end|> <|head|> <|/head|> <|eot|> <|vision_start|> <|vision_end|> <|image_pad|>"
ENDS = ("<|im_end|>", "<|eot|>")


def say(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS = {
    "one": say(("user", "3+4=?")),
    "system": say(("system", "Be brief. DATE"), ("user", "3+4=?"), ("assistant", "7")),
    "turns": say(("user", " 3+4=?\n"), ("assistant", "7"), ("user", "\n\n+1?"), ("assistant", "\n8 \n")),
    "foreign": say(("user", "“左边有几个？” 龘"), ("assistant", "三个 🙂👩\u200d👧 é\n\nAnswer: 3")),
    "empty": say(("system", ""), ("user", ""), ("assistant", ""), ("user", " "), ("assistant", "\n")),
    "thinking": [*say(("user", "x")), {"role": "assistant", "content": "y", "thinking": "hm", "name": None}],
}
TOOLS = [
    {"type": "function", "function": {"name": "加", "description": "a < b & 'c'", "parameters": {"n": [1, None, True]}}}
]
TOOL_USE = [
    *say(("user", "3+4?")),
    {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "加", "arguments": {"a": 3, "b": "四"}}}],
        "content": "",
    },
    *say(("tool", " 7\n"), ("assistant", "It is 7.")),
]


def vocabulary():
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(hf_vocab._ONE_DIGIT), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    texts = [f"{json.dumps(c)}\n\n" for c in (*CONVERSATIONS.values(), TOOLS, TOOL_USE)] + [*TEMPLATES.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=401, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL.split()])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<tool_call>", "</tool_call>", "</think>")])
    return backend


NAMED = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}


def template(tokenizer, source, **variables):
    return ChatTemplate({"default": source}, tokenizer.special_tokens | variables, tuple(tokenizer.special_ids))


def write_model(directory):
    """A text model without a chat template."""
    vocabulary().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(NAMED))
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 419}))
    return directory
