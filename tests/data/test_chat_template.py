"""transformers is the oracle: what it renders."""

import json

import pytest

transformers = pytest.importorskip("transformers")

from kimi_jax.data import chat_template  # noqa: E402
from kimi_jax.data.chat_template import ChatTemplate  # noqa: E402
from kimi_jax.data.hf_chat import encode_messages  # noqa: E402
from kimi_jax.data.hf_tokenizer import HFTokenizer  # noqa: E402
from tests.data.conversations import (  # noqa: E402
    CHATML,
    CONVERSATIONS,
    NAMED,
    TEMPLATES,
    TOOL_USE,
    TOOLS,
    WITH_TOOLS,
    template,
    write_model,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return HFTokenizer.load(directory)


@pytest.fixture(scope="module")
def oracle(directory):
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **NAMED)


def all_cases():
    for name, source in TEMPLATES.items():
        for title, conversation in CONVERSATIONS.items():
            yield pytest.param(source, conversation, None, id=f"{name}-{title}")
    yield pytest.param(WITH_TOOLS, TOOL_USE, TOOLS, id="tools")
    yield pytest.param(WITH_TOOLS, TOOL_USE[:1], [], id="no tools")


@pytest.mark.parametrize(("source", "conversation", "tools"), list(all_cases()))
def test_text_and_ids(tokenizer, oracle, source, conversation, tools):
    ours = template(tokenizer, source)
    for prompt in (True, False):
        expected = oracle.apply_chat_template(
            conversation, tools, chat_template=source, add_generation_prompt=prompt, tokenize=False
        )
        assert ours.render(conversation, tools=tools, add_generation_prompt=prompt).text == expected
    ids = oracle.apply_chat_template(conversation, tools, chat_template=source, add_generation_prompt=True).input_ids
    found = encode_messages(conversation, tokenizer=tokenizer, template=ours, process_image=None, tools=tools)
    assert found.tokens.tolist() == ids and found.tokens.dtype == "int32"


def test_variables_reach_the_template(tokenizer, oracle):
    for variables in ({"enable_thinking": False}, {"enable_thinking": True}):
        expected = oracle.apply_chat_template(
            CONVERSATIONS["one"], chat_template=WITH_TOOLS, add_generation_prompt=True, tokenize=False, **variables
        )
        ours = template(tokenizer, WITH_TOOLS, **variables).render(CONVERSATIONS["one"], add_generation_prompt=True)
        assert ours.text == expected and ("<think>" in expected) != variables["enable_thinking"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError.*'__class__' of a str"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError.*__init__"),
        ("{{ ('%s'|format(1))['__class__'] }}", "SecurityError.*__class__"),
        ("{{ '{0.__class__}'.format(messages) }}", "SecurityError.*__class__"),
        ("{{ messages.append(1) }}", "SecurityError.*'append' of a list"),
        ("{% set x = namespace(_a=1) %}", "SecurityError.*'_a'"),
        ("{% set x = namespace() %}{% set x._a = 1 %}", "SecurityError.*'_a'"),
        ("{{ dict.__class__ }}", "SecurityError.*__class__"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError.*Range too big"),
        ("{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", "more than .* seconds"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}", "more than .* seconds"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10 ** 12 }}", "multiplies something"),
        ("{{ 7 ** (10 ** 9) }}", "computes a number of more than"),
        ("{{ ((7 ** 999) ** 999) ** 999 }}", "computes a number of more than"),
        ("{{ (10 ** 12) * messages }}", "multiplies something"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("a\n{% if %}", "syntax error in line 2"),
        ("{% for %}", "syntax error in line 1"),
        ("{% include 'x' %}", "failed"),
    ],
)
def test_bad_templates(tokenizer, source, message, monkeypatch):
    monkeypatch.setattr(chat_template, "_SECONDS", 0.2)
    with pytest.raises(ValueError, match=f"the chat template.*{message}"):
        template(tokenizer, source).render(CONVERSATIONS["one"], add_generation_prompt=True)


def test_bad_conversations(tokenizer):
    with pytest.raises(ValueError, match="at least one message"):
        template(tokenizer, CHATML).render([], add_generation_prompt=True)
    with pytest.raises(ValueError, match="a message must be a dict.*got 'hello'"):
        template(tokenizer, CHATML).render(["hello"], add_generation_prompt=True)


def test_where_templates_are_found(tokenizer, tmp_path):
    def source(tools=None):
        return ChatTemplate.load(tmp_path, tokenizer).source(tools)

    def write(name, content):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    with pytest.raises(FileNotFoundError, match="no chat template in"):
        source()
    write("tokenizer_config.json", {"chat_template": "config"})
    assert source() == source(tools=[]) == "config"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    write("tokenizer_config.json", {"chat_template": named})
    assert (source(), source(tools=TOOLS)) == ("plain", "with tools")
    write("chat_template.json", {"chat_template": "of the processor"})
    assert source() == "of the processor"
    write("chat_template.jinja", "jinja\n")
    assert source() == "jinja\n"
    (tmp_path / "additional_chat_templates").mkdir()
    write("additional_chat_templates/tool_use.jinja", "more")
    assert (source(), source(tools=TOOLS)) == ("jinja\n", "more")
    write("chat_template.jinja", "{% if")
    with pytest.raises(ValueError, match="syntax error"):
        source()
