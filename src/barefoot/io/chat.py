"""Chat templates: jinja2 in a sandbox, rendered so that what a message says can't become a control token.

Before rendering, the first character of every control token's text in a message is wrapped in two noncharacters.
The template handles the message as usual; afterwards the result is cut at the wraps into segments for
``Tokenizer.encode_segments``, where control tokens count only in what the template itself wrote. No control token
survives in a message, since each start of one is broken; and where a message begins or ends with a part of one, a
third noncharacter keeps the template's text from completing it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.io.inventory import Checkpoint
from barefoot.io.strict_json import read_object
from barefoot.io.tokenizer import Segment, Tokenizer

MAX_TEMPLATE_CHARS = 1 << 20
MAX_STEPS = 1 << 20  # turns of range() in one rendering
_OPEN, _CLOSE, _BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
_WRAPPED = re.compile(f"{_OPEN}(.){_CLOSE}", re.DOTALL)
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}{_BREAK}]")

# For models whose file leaves the template out; each is the model family's published turn format.
_BY_ARCHITECTURE = {
    "gemma3": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else 'user' }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "qwen2": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
_BY_ARCHITECTURE |= {"gemma3_text": _BY_ARCHITECTURE["gemma3"], "qwen3": _BY_ARCHITECTURE["qwen2"]}


@dataclass(frozen=True)
class ChatTemplate:
    """A template's source, and where it comes from: the model's file, or its architecture's usual format."""

    source: str
    from_model: bool

    def render(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """Messages (``role`` and ``content``) as segments for ``Tokenizer.encode_segments(..., add_bos=False)``.

        Raises
        ------
        InvalidInput : the template rejects the messages.
        CorruptFile : the template is not valid, reaches for what the sandbox forbids, or never ends.
        """
        import jinja2

        guarded = [_guard(dict(message), tokenizer) for message in messages]
        limit = 16 * (sum(len(str(m)) for m in guarded) + len(self.source)) + (1 << 16)
        names = {
            "messages": guarded,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
            "eos_token": tokenizer.piece(min(tokenizer.eos_ids)) if tokenizer.eos_ids else "",
        }
        if len(self.source) > MAX_TEMPLATE_CHARS:
            raise CorruptFile(f"chat template of {len(self.source)} characters, at most {MAX_TEMPLATE_CHARS} are read")
        parts: list[str] = []
        left = limit
        try:
            environment = _environment(limit)
            template = environment.template_class.from_code(environment, _compiled(self.source), environment.globals)
            for part in template.generate(**names):
                parts.append(part)
                left -= len(part)
                if left < 0:
                    raise CorruptFile("the chat template writes far more than the messages hold")
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise CorruptFile(f"the chat template fails: {type(error).__name__}: {error}") from None
        return _segments("".join(parts))


def find_chat_template(checkpoint: Checkpoint) -> ChatTemplate | None:
    """The model's own template, or else its architecture's, or None; base models are told apart by ``from_model``."""
    if checkpoint.kind == "gguf":
        source, family = checkpoint.config.get("tokenizer.chat_template"), checkpoint.config.get("general.architecture")
    else:
        source, family = folder_template(checkpoint.path), checkpoint.config.get("model_type")
    if isinstance(source, str):
        return ChatTemplate(source, True)
    usual = _BY_ARCHITECTURE.get(family) if isinstance(family, str) else None
    return ChatTemplate(usual, False) if usual else None


def folder_template(folder: Path) -> str | None:
    """The text of a folder's own chat template, the default one of several."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > 4 * MAX_TEMPLATE_CHARS:
            raise CorruptFile(f"chat_template.jinja has {file.stat().st_size} bytes")
        return file.read_text("utf-8", "replace")
    config = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    found = config.get("chat_template")
    if isinstance(found, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _guard(value: Any, tokenizer: Tokenizer) -> Any:
    """The value with every control token in its texts broken."""
    if isinstance(value, str):
        return _break_control(_MARKS.sub("\ufffd", value), tokenizer)
    if isinstance(value, Mapping):
        return {_guard(k, tokenizer): _guard(v, tokenizer) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_guard(v, tokenizer) for v in value]
    return value


def _break_control(text: str, tokenizer: Tokenizer) -> str:
    out, done = [], 0
    for start in tokenizer.control_starts(text):
        out.append(f"{text[done:start]}{_OPEN}{text[start]}{_CLOSE}")
        done = start + 1
    guarded = "".join(out) + text[done:]
    body = guarded.strip()  # a template may trim; the break must then still stand
    begins, ends = tokenizer.control_edges(text.strip())
    lead, tail = guarded[: guarded.find(body)], guarded[guarded.find(body) + len(body) :]
    return f"{lead}{_BREAK * begins}{body}{_BREAK * ends}{tail}"


def _segments(rendered: str) -> list[Segment]:
    """Cut at the wraps: the wrapped characters are not trusted, what lies between them is (it holds no whole token)."""
    segments: list[Segment] = []
    done = 0
    for match in _WRAPPED.finditer(rendered):
        segments += [(part, True) for part in _MARKS.split(rendered[done : match.start()])]
        segments.append((match.group(1), False))
        done = match.end()
    segments += [(part, True) for part in _MARKS.split(rendered[done:])]
    return [segment for segment in segments if segment[0]]


@functools.lru_cache(maxsize=1)  # a conversation is rendered at every turn, and many that are trained on
def _compiled(source: str) -> Any:
    """The code of a template; it looks filters up, and with them their limit, when it runs."""
    return _environment(MAX_TEMPLATE_CHARS).compile(source)


def _environment(limit: int) -> Any:
    """A sandbox in which no text or list grows beyond ``limit`` elements, however often it is joined to itself.

    Everything that makes a longer text out of shorter ones passes one of the bounded operations: ``+``, ``~``, block
    assignments and macros (``concat``), ``join`` and ``replace`` as filters and as methods, and every other filter.
    """
    from jinja2.compiler import CodeGenerator
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    steps = 0

    def bounded(size: int) -> None:
        if size > limit:
            raise SecurityError(f"a value of more than {limit} characters")

    def bounded_range(*bounds: int) -> range:
        nonlocal steps
        found = range(*bounds)
        steps += len(found)
        if steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} steps")
        return found

    def join(parts: Iterable[Any], separator: str = "") -> str:
        found, size = [], 0
        for part in map(str, parts):
            size += len(part) + len(separator)
            bounded(size)
            found.append(part)
        return separator.join(found)

    def join_filter(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        return join((v[attribute] for v in value) if attribute else value, str(d))

    def replace(text: Any, old: str, new: str, count: int = -1) -> str:
        before = str(text)
        bounded(len(before) + (before.count(old) if old else len(before) + 1) * len(new))
        return before.replace(old, new, count)

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps the marks by which jinja2 passes environment or context
        def call(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            bounded(len(found) if isinstance(found, (str, list, tuple)) else 0)
            return found

        return call

    class Generator(CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Sandbox(ImmutableSandboxedEnvironment):
        code_generator_class = Generator
        intercepted_binops = frozenset({"+", "*", "**", "%"})
        concat = staticmethod(join)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
            if operator == "+" and not numbers:
                bounded(len(left) + len(right))
            elif not numbers or operator == "**":
                raise SecurityError(f"{operator} on {type(left).__name__} and {type(right).__name__}")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
            if isinstance(text, str) and name == "join":
                return join(args[0], text)
            if isinstance(text, str) and name == "replace":
                return replace(text, *args)
            return super().call(context, function, *args, **kwargs)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            growing = isinstance(obj, str) and attr in _GROWING
            return not growing and super().is_safe_attribute(obj, attr, value)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in ("format", "center", "indent", "wordwrap", "batch", "slice"):
        del environment.filters[name]
    environment.filters |= {"tojson": _to_json, "join": join_filter, "replace": replace}
    environment.filters = {name: checked(function) for name, function in environment.filters.items()}
    del environment.globals["lipsum"]
    environment.globals |= {"range": bounded_range, "raise_exception": _reject, "strftime_now": _now}
    return environment


_GROWING = frozenset({"format", "format_map", "ljust", "rjust", "center", "zfill", "expandtabs", "translate"})


def _reject(message: str) -> None:
    raise InvalidInput(f"the chat template rejects these messages: {message}")


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=None if indent is None else min(int(indent), 8))
