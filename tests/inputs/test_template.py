"""Chat templates: found, rendered as transformers renders them, and stopped at their limits."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from omni_jax.errors import CheckpointError, InputError
from omni_jax.inputs import limits
from omni_jax.inputs.template import ChatTemplate
from tests.helpers.templates import CONVERSATIONS, TEMPLATE, TOOLS

DATA = Path(__file__).parent.parent / "data"
PUBLIC = (DATA / "public_chat_template.jinja").read_text("utf-8")
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


def ours(source, messages=(), tools=None, **settings):
    settings = {"add_generation_prompt": True} | settings
    return ChatTemplate(source, VARIABLES, Path("chat_template.jinja")).render(list(messages), tools, **settings)


def theirs(source, messages=(), tools=None, **settings):
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    settings = {"add_generation_prompt": True} | settings | VARIABLES
    return render([list(messages)], tools=tools, chat_template=source, **settings)[0][0]


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"chat_template.json": {"chat_template": "J"}, "tokenizer_config.json": {"chat_template": "T"}}, "J"),
        ({"tokenizer_config.json": {"chat_template": "T"}}, "T"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "R"},
                                                      {"name": "default", "template": "D"}]}}, "D"),
        ({"tokenizer_config.json": {"chat_template": "{{ eos_token }}{{ pad_token }}",
                                    "eos_token": "E", "pad_token": {"content": "P"}, "add_bos_token": True}}, "EP"),
    ],
)  # fmt: skip
def test_where_a_template_is_found(tmp_path, files, expected):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    template = ChatTemplate.from_dir(tmp_path)
    assert template.render([], None, add_generation_prompt=True) == expected
    (tmp_path / "chat_template.jinja").write_text("first")
    assert ChatTemplate.from_dir(tmp_path).render([], None, add_generation_prompt=True) == "first"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_template_of_any_unicode_encoding(tmp_path, encoding):
    """Editors of other systems add byte-order marks or write UTF-16."""
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "Ü", "chat_template": "{{ eos_token }}é"}', encoding)
    assert ChatTemplate.from_dir(tmp_path).render([], None, add_generation_prompt=True) == "Üé"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}語", encoding)
    assert ChatTemplate.from_dir(tmp_path).render([], None, add_generation_prompt=True) == "Ü語"


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no chat template"),
        ({"tokenizer_config.json": "{}"}, "no chat template"),
        ({"chat_template.jinja": "{% if %}"}, "cannot be compiled"),
        ({"chat_template.json": "{"}, "chat_template.json: no valid JSON"),
        ({"tokenizer_config.json": "[]"}, "holds no JSON object"),
    ],
)
def test_bad_template_files(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        ChatTemplate.from_dir(tmp_path)


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_failing_templates(tmp_path, source, message):
    template = ChatTemplate(source, {}, tmp_path / "chat_template.jinja")
    with pytest.raises(InputError, match=f"chat_template.jinja cannot render.*{message}"):
        template.render([{"role": "user", "content": "a"}], None, add_generation_prompt=True)


def test_templates_know_the_date(tmp_path):
    template = ChatTemplate("{{ strftime_now('%Y') }}", {}, tmp_path)
    assert int(template.render([], None, add_generation_prompt=False)) >= 2024


# As transformers renders


@pytest.mark.parametrize("source", [PUBLIC, TEMPLATE], ids=["public", "own"])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "with tools"])
@pytest.mark.parametrize("settings", [{}, {"add_generation_prompt": False}, {"enable_thinking": False}], ids=str)
def test_text_is_that_of_transformers(source, name, tools, settings):
    messages = CONVERSATIONS[name]
    assert ours(source, messages, tools, **settings) == theirs(source, messages, tools, **settings)


# Each line is something that templates of models do, or could.
HONEST = [
    "{{ messages[0].content.split('a')[-1].strip('\\n') ~ 1 ~ none ~ true ~ 1.5 ~ undefined_name }}",
    "{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.role }}{% else %}none{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ m.content | trim }}{% endfor %}",
    "{% for a, b in {'x': 1, 'y': [2, 3]}.items() %}{{ a }}{{ b }}{% endfor %}",
    "{% set ns = namespace(text='', n=0) %}{% for m in messages %}{% set ns.text = ns.text + m.role %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.text }}{{ ns.n }}",
    "{% macro f(a, b=2) %}[{{ b }}{{ caller() if caller }}]{% endmacro %}{{ f(1) }}{% call f(3) %}in{% endcall %}",
    "{% set x %}block {{ messages | length }}{% endset %}{{ x }}{% filter upper %}loud {{ x }}{% endfilter %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}",
    "{% if messages | selectattr('role', '==', 'nobody') %}a generator is true{% endif %}",
    "{{ (messages | map(attribute='role') | list) == ['user', 'assistant', 'user'] }}{{ 1 < 2 < 3 }}",
    "{{ '%s and %d%%' % ('a', 5) }}{{ '{:>5}|{}'.format(1, 'b') }}{{ '%05.1f' | format(2.25) }}",
    "{{ 'a,b' | replace(',', ';') }}{{ 'x\\ny' | indent(4) }}{{ 'x'.center(5) }}{{ ', '.join(['a', 'b']) }}",
    "{{ [3, 1, 2] | sort | join }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 2] | sum }}{{ 2.5 | round | int }}",
    "{{ tools | tojson }}{{ messages | tojson(indent=2) }}{{ {'ä': '<'} | tojson(ensure_ascii=true) }}",
    "{{ range(3) | list }}{{ range(2, 9, 3) | join('-') }}{{ 2 ** 10 }}{{ 7 // 2 }}{{ -7 % 3 }}{{ 'ab' * 2 }}",
    "{{ messages[0] is mapping }}{{ 'x' is string }}{{ y is not defined }}{{ (none or 'd') | default('e') }}",
    "{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}",
    "{{ bos_token }}{{ dict(a=1) }}{{ [1, 2] + [3] }}{{ (1, 2)[0] }}{{ 'abc'[1:] }}{{ messages[0].get('none', 'd') }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner() %}{{ j() }}{{ j() }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% block title %}title{% endblock %}{{ self.title() }}{% with a = 1 %}{{ a }}{% endwith %}{% raw %}{{{% endraw %}",
    "{% generation %}{{ messages[-1].content }}{% endgeneration %}{# a comment #}  {%- if true %} x {% endif -%}  y",
    "{{ messages | map(attribute='role') | unique | list | first }}{{ 'A b' | lower | title | wordcount | string }}",
    "{{ '<' | e }}{{ '<' | safe }}{{ ['a', 'b'] | last | upper }}{{ messages | groupby('role') | length }}",
]  # fmt: skip


@pytest.mark.parametrize("source", HONEST, ids=range(len(HONEST)))
def test_what_templates_do_gives_what_transformers_gives(source):
    messages = CONVERSATIONS["turns"][1:]
    assert ours(source, messages, TOOLS) == theirs(source, messages, TOOLS)


LONG = {
    "one message": [{"role": "user", "content": "Größe 語 " * 1_000_000}],
    "many turns": [{"role": role, "content": "x" * 2000} for role in ("user", "assistant") * 2000],
    "many parts": [{"role": "user", "content": [{"type": "text", "text": "ab " * 27_000} for _ in range(100)]}],
    "a long thought": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>" + "hm " * 1_300_000 + "</think>" + "语言 " * 1_400_000},
    ],
}


@pytest.mark.parametrize("name", LONG)
def test_eight_million_characters_are_rendered(name):
    assert ours(PUBLIC, LONG[name]) == theirs(PUBLIC, LONG[name])


# Limits; `tests/bad_inputs` has what goes beyond each of them


def test_what_a_template_drops_is_not_held():
    """A text that grows by pieces is copied at each: 400 million characters here, of which one copy is held."""
    loop = "{% set ns = namespace(x='') %}{% for i in range(400) %}{% set ns.x = ns.x ~ 'abcde' * 1000 %}{% endfor %}"
    assert len(ours(loop + "{{ ns.x }}")) == 2_000_000


def test_what_a_template_keeps_is_held():
    big = "{% set b = 'b' * 20000000 %}"
    sets = "".join(f"{{% set a{i} = b ~ {i} %}}" for i in range(11))
    assert ours(big + sets + "{{ a9[-1] }}") == "9"
    attributes = "{% set ns = namespace() %}" + sets.replace("set a", "set ns.a")
    for kept in (sets, attributes):
        with pytest.raises(InputError, match="holds more than 256,000,000 characters at once"):
            ours(big + kept + "{% set c = b ~ b[:10000000] %}")


def test_limits_hold_on_another_thread_and_for_one_rendering(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(f"{{% if not messages %}}{loops}{{% endif %}}ok", {}, Path("t"))
    said = []

    def run():
        for messages in ([], [{"role": "user"}]):
            try:
                said.append(template.render(messages, None, add_generation_prompt=False))
            except InputError as error:
                said.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert "more than 0.2 seconds" in said[0] and said[1] == "ok"


@pytest.mark.parametrize(
    "expression, limit",
    [
        ("'a' * N", 32_000_000),
        ("'a' ~ 'b' * (N - 1)", 32_000_000),
        ("[0] * N", 32_000_000 // 64),
        ("2 ** N", 5000),
    ],
)
def test_the_stated_limits_are_the_limits(expression, limit):
    for n, within in ((limit, True), (limit + 1, False)):
        source = "{% set x = " + expression.replace("N", str(n)) + " %}ok"
        if within:
            assert ours(source) == "ok"
        else:
            with pytest.raises(InputError, match="goes beyond what a chat template may do"):
                ours(source)


NESTED = [
    "'(' * n + '1' + ')' * n",
    "'[' * n + ']' * n",
    "'not ' * n + '1'",
    "'1+' * n + '1'",
    "'a' + '.b' * n",
    "'a' + '|e' * n",
]


def test_nothing_crashes_a_compiler_whose_recursion_is_unlimited():
    """Programs that raise Python's limit would die of a template's depth if nothing else bounded it."""
    code = f"""
import sys
from pathlib import Path
from omni_jax.inputs.template import ChatTemplate
sys.setrecursionlimit(10**6)
sources = [("{{{{ " + eval(form) + " }}}}") for form in {NESTED!r} for n in (450, 20000)]
sources += ["{{% if a %}}" * 5000, "{{% for a in b %}}" * 5000, "{{% macro m() %}}" * 5000, "x" * 100001]
for source in sources:
    try:
        ChatTemplate(source, {{}}, Path("t"))
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert sum("more than 1,000 words and signs" in line for line in said) == len(NESTED)
    assert sum("more than 50 blocks" in line for line in said) == 3
    assert sum("more than 100,000" in line for line in said) == 1


def test_small_values_count_for_good(monkeypatch):
    """Each is little, and all together are what a rendering may hold."""
    monkeypatch.setattr(limits, "MAX_HELD", 50_000)
    with pytest.raises(InputError, match="makes and holds more than 50,000 characters at once"):
        ours("{% for i in range(900) %}{% set x = 'a' * 90 %}{% endfor %}")
