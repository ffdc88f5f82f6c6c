"""A chat template with everything that published ones use, and conversations for it."""

# A template of our own with what published ones use: blocks trimmed to the left, namespaces, string methods, thoughts.
TEMPLATE = """\
{% macro words(content) %}
  {%- set out = namespace(text='') %}
  {%- for part in content if content is not string %}
    {%- set tag = {'image': 'vision|image_pad', 'video': 'vision|video_pad', 'audio': 'audio|audio_pad'}[part.type] %}
    {%- if tag %}
      {%- set tag = tag.split('|') %}
      {%- set part = {'text': '<|' ~ tag[0] ~ '_start|><|' ~ tag[1] ~ '|><|' ~ tag[0] ~ '_end|>'} %}
    {%- endif %}
    {%- set out.text = out.text ~ part.text %}
  {%- endfor %}
  {{- content if content is string else out.text -}}
{%- endmacro %}
{% if tools %}
    {{- '<|im_start|>system\\nYou have:' -}}
    {% for tool in tools %}
    {{- '\\n' ~ tool | tojson -}}
    {% endfor %}
    {{- '<|im_end|>\\n' -}}
{% endif %}
{% for message in messages %}
    {% set text = words(message.content) %}
    {% if message.role == 'system' and tools and not loop.first %}
        {% continue %}
    {% endif %}
    {{- '<|im_start|>' ~ {'tool': 'user'}.get(message.role, message.role) ~ '\\n' -}}
    {% if message.role == 'assistant' %}
        {% set thought = message.reasoning_content or text.rpartition('</think>')[0].lstrip('<think>').strip('\\n') %}
        {{- '<think>' ~ thought ~ '</think>' if thought -}}
        {% generation %}
        {{- text.split('</think>')[-1].lstrip() -}}
        {% endgeneration %}
        {% for call in message.tool_calls or [] %}
            {% set call = call.function or call %}
            {% set arguments = call.arguments if call.arguments is string else call.arguments | tojson %}
            {{- '<tool_call>' ~ call.name ~ ': ' ~ arguments ~ '</tool_call>' -}}
        {% endfor %}
    {% else %}
        {{- '<tool_response>' ~ text ~ '</tool_response>' if message.role == 'tool' else text -}}
    {% endif %}
    {{- '<|im_end|>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' ~ ('<think></think>' if enable_thinking is false else '') -}}
{% endif %}
"""

TOOLS = [
    {
        "type": "function",
        "function": {"name": "look_up", "description": "Größe <b>&</b> 'Maß'", "parameters": {"q": {"type": "string"}}},
    }
]

CONVERSATIONS = {
    "text": [{"role": "user", "content": "What is 2 + 2?"}],
    "turns": [
        {"role": "system", "content": "You are terse.\n"},
        {"role": "user", "content": "Hi  there"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "text", "text": "now?\n\n"}]},
    ],
    "thoughts": [
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nbecause"},
        {"role": "user", "content": "really"},
        {"role": "assistant", "content": "yes", "reasoning_content": "sure\n"},
        {"role": "user", "content": "so"},
    ],
    "media": [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "見て "},
                {"type": "audio", "audio": "b.wav"},
                {"type": "video", "video": "c.mp4"},
                {"type": "text", "text": " ?"},
            ],
        }
    ],
    "tools": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "weather in Köln"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "look_up", "arguments": {"q": "Köln", "n": 3}}},
                {"name": "look_up", "arguments": '{"q":"Bonn"}'},
            ],
        },
        {"role": "tool", "content": '{"t": 21.5}', "name": "look_up", "tool_call_id": "1"},
        {"role": "tool", "content": [{"type": "text", "text": "rain"}]},
    ],
}
