"""Chat templates that behave as those of real models do, each as short as its behaviour allows."""

from __future__ import annotations

from tests.corpora import make_tokenizer

# Reasoning after the last question alone; raises at what it does not know; content is text.
CHATML = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for tool in tools or [] %}{{ '{tool}' + tool | tojson + '\\n' }}{% endfor %}
{%- for m in messages %}
{%- if m.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('role ' + m.role) }}{% endif %}
{%- set content = m.content or '' %}
{%- set thought = '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and thought %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
{%- endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{{- '{call}' + call.function.name + call.function.arguments | tojson }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Arguments are looked through; an empty block stands for reasoning that was taken away; a null
# content would be printed.
ITEMS = """[gMASK]
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}<|{{ m.role }}|>
{%- if m.role == 'assistant' %}
{%- if loop.index0 > ns.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>
{%- else %}<think></think>{% endif %}
{%- endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}<call>{{ call.function.name }}
{%- for k, v in call.function.arguments.items() %}({{ k }}={{ v | tojson }}){% endfor %}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

# Reasoning is cut out of every turn; the prompt opens it; arguments are text.
OPENED = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<User>' + m.content }}
{%- elif m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'tool' %}{{ '<Result>' + m.content }}
{%- else %}
{%- if m.tool_calls %}
{%- for call in m.tool_calls %}{{ '<Call>' + call.function.name + '<sep>' + call.function.arguments }}{% endfor %}{{ '</s>' }}
{%- endif %}
{%- if m.content or not m.tool_calls %}{{ '<Assistant>' + m.content.split('</think>')[-1] + '</s>' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}"""

# As before, with a switch, and a mark before every answer that was given at once.
SWITCHED = """
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<User>' + m.content }}
{%- else %}{{ '<Assistant></think>' + m.content + '<end>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant>' + ('<think>' if thinking else '</think>') }}{% endif %}"""

# Reasoning between calls alone: an answer that ends a conversation has an empty block.
BLOCKS = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'assistant' and not m.tool_calls %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}<{{ m.role }}>
{%- if m.role == 'assistant' %}<think>{{ m.reasoning_content if loop.index0 > ns.last else '' }}</think>{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}<{{ call.id }}>{{ call.function.arguments | tojson }}{% endfor %}
{%- endfor %}"""

# Knows no reasoning and no tools.
PLAIN = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('Only user and assistant') }}{% endif %}
{{- '[' + m.role + '] ' + m.content + '\\n' }}
{%- endfor %}"""

# Ids of nine characters, and calls printed whole.
SHORT_IDS = """
{%- for m in messages %}<{{ m.role }}>
{%- if m.tool_calls %}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
{{- call.id }}{{ call.function | tojson }}
{%- endfor %}
{%- elif m.role == 'tool' %}{{ m.tool_call_id + m.content }}
{%- else %}{{ m.content }}{% endif %}
{%- endfor %}"""

# Reasoning under its other name, and not beside text.
THINKING = """
{%- for m in messages %}<{{ m.role }}>
{%- if m.tool_calls and m.thinking and m.content %}{{ raise_exception('not both') }}{% endif %}
{%- if m.thinking and (loop.last or m.tool_calls) %}{{ '<analysis>' + m.thinking }}{% endif %}
{{- '<final>' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + call.function.arguments | tojson }}{% endfor %}
{%- endfor %}"""


def with_template(template, **options):
    tokenizer = make_tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer
