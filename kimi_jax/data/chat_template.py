"""Conversations as the chat template of a published checkpoint writes them, equal to transformers' apply_chat_template.

A template is a program in Jinja that came with the weights, so it runs in a sandbox: it sees plain data, cannot reach
Python through it, and is stopped when it takes too long. What a user wrote never becomes a special token unless that is
asked for (`allow_special`); transformers calls the same `sanitize_control_tokens`.
"""

import dataclasses
import datetime
import functools
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.sandbox
import numpy as np
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError

from kimi_jax.data.hf_tokenizer import HFTokenizer, read_json

Message = Mapping[str, Any]  # {"role": ..., "content": text or [{"type": "text", "text": ...}, {"type": "image"}], ...}

_SECONDS = 10.0  # of CPU time that a template may use; real ones need milliseconds
_LONGEST = 10_000_000  # characters or elements that a multiplication may give
_BEGIN, _END = "_generation_begin", "_generation_end"  # variables that frame what {% generation %} encloses
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing, the first the usual one
_clock = threading.local()


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation in writing. Joined, the pieces are the text; those marked True came from a user, as they are."""

    pieces: tuple[tuple[str, bool], ...]
    assistant: tuple[tuple[int, int], ...] = ()  # [start, stop) of what an assistant wrote, in characters of the text

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """sources: the templates by name: "default", and perhaps "tool_use", which is for conversations with tools.

    variables: what they may refer to besides the conversation: the named special tokens, and options that a template
    knows, such as enable_thinking.
    """

    sources: Mapping[str, str]
    variables: Mapping[str, Any]
    special: tuple[str, ...]  # the special tokens, which users are kept from writing

    @classmethod
    def load(cls, directory: str | os.PathLike, tokenizer: HFTokenizer, **variables: Any) -> "ChatTemplate":
        """Reads chat_template.jinja, chat_template.json or tokenizer_config.json, whichever comes first.

        Raises FileNotFoundError if there is no template, ValueError if one is not valid Jinja.
        """
        directory = Path(directory)
        sources = {path.stem: _read(path) for path in sorted(directory.glob("additional_chat_templates/*.jinja"))}
        if (directory / "chat_template.jinja").is_file():
            sources["default"] = _read(directory / "chat_template.jinja")
        if not sources:
            configs = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
            given = (read_json(directory / name).get("chat_template") for name in configs)
            template = next((template for template in given if template), None)
            if isinstance(template, list):
                sources = {named["name"]: named["template"] for named in template}
            elif template:
                sources = dict(template) if isinstance(template, dict) else {"default": template}
        if not sources:
            raise FileNotFoundError(
                f"no chat template in {str(directory)!r}: neither chat_template.jinja nor a 'chat_template' in "
                "tokenizer_config.json. A model without one reads raw text only (--raw)."
            )
        for source in sources.values():
            _compiled(source)
        return cls(sources, tokenizer.special_tokens | variables, tuple(tokenizer.special_ids))

    def source(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        """The template for a conversation with, or without, tools."""
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise ValueError(f"the model has chat templates {sorted(self.sources)}, but none with the name 'default'")
        return self.sources[name]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool,
        allow_special: bool = False,
    ) -> Rendered:
        """tools: JSON schemas. add_generation_prompt: end where an assistant begins to write.

        Raises ValueError if the template refuses the conversation, is stopped by the sandbox, or fails otherwise.
        """
        if not messages:
            raise ValueError("a conversation needs at least one message")
        for message in messages:
            if not isinstance(message, Mapping):
                raise ValueError(f"a message must be a dict such as {{'role': 'user', 'content': ''}}, got {message!r}")
        plain = [_plain({key: value for key, value in m.items() if value is not None}) for m in messages]
        tools = None if tools is None else _plain(tools)
        source = self.source(tools)
        written = json.dumps([plain, tools], ensure_ascii=False, skipkeys=True)
        begin, end, opening, closing = _unused_characters(source + written)
        if not allow_special and self.special:
            pattern = re.compile("|".join(re.escape(token) for token in sorted(self.special, key=len, reverse=True)))
            plain, tools = (_marked(value, pattern, rf"{opening}\g<0>{closing}") for value in (plain, tools))
        text = _run(
            source,
            {
                **_plain(self.variables),
                "messages": [_with_reasoning(message) for message in plain],
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                _BEGIN: begin,
                _END: end,
            },
        )
        return _parse_marks(text, begin=begin, end=end, opening=opening, closing=closing, special=self.special)

    def render_turns(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        allow_special: bool = False,
        end_texts: Sequence[str],
    ) -> Rendered:
        """A finished conversation, with what its assistants wrote: up to one of `end_texts`, which is included.

        Where the template says it ({% generation %}), that is used. Else the conversation is rendered turn by turn,
        and what a turn adds to the prompt before it is the assistant's. Raises ValueError, besides for what `render`
        does, if a later turn changes how an earlier one is written, as then no one prompt leads to it.
        """
        options: dict[str, Any] = {"tools": tools, "allow_special": allow_special}
        whole = self.render(messages, add_generation_prompt=False, **options)
        text = whole.text
        spans = []
        if _GENERATION.search(self.source(tools)):
            for start, stop in whole.assistant:
                following = next((end for end in end_texts if text.startswith(end, stop)), "")
                spans.append((start, stop + len(following)))
            return dataclasses.replace(whole, assistant=tuple(spans))
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            if index == 0:
                raise ValueError("a conversation to learn from cannot begin with the assistant: nothing prompts it")
            before = self.render(messages[:index], add_generation_prompt=True, **options).text
            after = self.render(messages[: index + 1], add_generation_prompt=False, **options).text
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"the chat template writes the conversation up to message {index} (assistant) otherwise when more "
                    "follows, or not behind the prompt that it makes for it, so what the assistant wrote cannot be "
                    "told from the rest. Train on conversations that end there, or mark it in the template with "
                    "{% generation %} ... {% endgeneration %}."
                )
            users = _users_characters(whole)
            ends = [m.end() for e in end_texts for m in re.finditer(re.escape(e), after) if m.start() >= len(before)]
            ends = [stop for stop in ends if stop - 1 not in users]
            spans.append((len(before), max(ends, default=len(after))))
        return dataclasses.replace(whole, assistant=tuple(spans))


def _users_characters(rendered: Rendered) -> set[int]:
    """Where the special tokens stand that are none, because a user wrote them."""
    users, at = set(), 0
    for piece, from_user in rendered.pieces:
        users |= set(range(at, at + len(piece))) if from_user else set()
        at += len(piece)
    return users


# --- what a template sees


def _plain(value: Any) -> Any:
    """`value` rebuilt of JSON's types; anything else, such as an image, becomes a name in angle brackets."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    thoughts = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _unused_characters(text: str) -> list[str]:
    """Four private characters that are not in `text`, so that they can mark places."""
    used = set(text)
    found = (chr(code) for code in range(0xF0000, 0xFFFFD) if chr(code) not in used)
    return [next(found) for _ in range(4)]


def _marked(value: Any, pattern: re.Pattern, replacement: str) -> Any:
    if isinstance(value, str):
        return pattern.sub(replacement, value)
    if isinstance(value, dict):
        return {key: _marked(item, pattern, replacement) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_marked(item, pattern, replacement) for item in value)
    return value


def _parse_marks(text: str, *, begin: str, end: str, opening: str, closing: str, special: Sequence[str]) -> Rendered:
    pieces: list[tuple[str, bool]] = []
    spans, starts = [], []
    piece, length, quoted = "", 0, False

    def close(from_user: bool) -> None:
        nonlocal piece
        if piece:
            pieces.append((piece, from_user))
        piece = ""

    for part in re.split(f"([{begin}{end}{opening}{closing}])", text):
        if part == begin:
            starts.append(length)
        elif part == end and starts:
            spans.append((starts.pop(), length))
        elif part in (opening, closing):  # a template may have cut a user's text within the marks: then it is no token
            close(quoted and part == closing and piece in special)
            quoted = part == opening
        elif part != end:
            piece += part
            length += len(part)
    close(False)
    return Rendered(tuple(pieces), tuple(sorted(spans)))


# --- the sandbox


def _run(source: str, variables: Mapping[str, Any]) -> str:
    template = _compiled(source)
    _clock.stop = time.thread_time() + _SECONDS
    try:
        return template.render(**variables)
    except Exception as error:  # a template can raise anything that Python can
        raise ValueError(f"the chat template failed: {type(error).__name__}: {error}") from error


def _check_time() -> None:
    if time.thread_time() > _clock.stop:
        raise RuntimeError(f"it takes more than {_SECONDS:g} seconds; is there a loop without end?")


def _metered(items: Any) -> Any:
    for item in items:
        _check_time()
        yield item


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    """The jinja2.Template. Raises ValueError for a syntax error."""
    environment = _environment()
    try:
        tree = environment.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_metered", [], [], None, None, lineno=loop.lineno)
        return environment.from_string(tree)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from error
    except Exception as error:  # constants are computed here
        raise ValueError(f"the chat template cannot be compiled: {type(error).__name__}: {error}") from error


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} frames what an assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in (_BEGIN, _END))
        return nodes.Scope([begin, *body, end], lineno=line)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"it may not use the attribute {attribute!r} of a {type(obj).__name__}")

    def call(self, /, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _check_time()
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for one, other in ((left, right), (right, left)):
            if operator == "*" and hasattr(one, "__len__") and isinstance(other, int):
                if len(one) * other > _LONGEST:
                    raise SecurityError(f"it multiplies something to more than {_LONGEST} elements")
        if operator == "**" and isinstance(left, int) and left.bit_length() * right > _LONGEST:
            raise SecurityError(f"it computes a number of more than {_LONGEST} bits")
        return super().call_binop(context, operator, left, right)


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is among args, so that it can be a key, too
        jinja2.utils.Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dictionary:
    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"it may not store {name!r} in a namespace: a name there cannot begin with '_'")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


@functools.lru_cache(maxsize=1)
def _environment() -> Any:
    """What transformers offers to templates, and no more."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters |= {"tojson": _tojson, "_metered": _metered}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": _Dictionary(),
        "namespace": _Namespace,
    }
    return environment


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
