"""What a Terraform file says: its resources, with the values that can be known without Terraform.

The language: https://developer.hashicorp.com/terraform/language/syntax/configuration
"""

from __future__ import annotations

import ast
import json
import operator
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cml_runner import installer
from cml_runner.errors import ConfigurationError, MissingDependency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

HEREDOC = re.compile(r'"<<(-?)[^\n]*\n(.*\n)?[^\n]*"', re.DOTALL)
INTERPOLATION = re.compile(r"\$\$\{|%%\{|[$%]\{|\\(?:u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)")
FILE = re.compile(r'file\(\s*"(?:\$\{path\.\w+\}/)?([^"$]+)"\s*\)')
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
HERE = ("path.root", "path.module", "path.cwd")
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Unknown:
    """A value which only Terraform can know; `text` has it, as far as we do."""

    text: str
    expressions: tuple[str, ...]
    template: bool = False  # the text is known but for the expressions in it


@dataclass(frozen=True)
class File:
    """The content of a file."""

    path: str


@dataclass(frozen=True, kw_only=True)
class Resource:
    """A block `resource KIND NAME`."""

    kind: str
    name: str
    arguments: Mapping[str, Any]  # text, numbers, lists, mappings, Unknown, File; blocks are lists
    assumed: Mapping[str, Any]  # variables which have been taken to be their defaults
    source: str = field(repr=False)  # what the file says from its beginning on
    before: int  # lines of the file

    def line(self, *words: str) -> int:
        """Find the number of the line where the words are, each one behind that before it."""
        place = 0
        for word in words:
            found = re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", self.source[place:])
            place += found.start() if found else 0
        return self.before + self.source[:place].count("\n") + 1


def read(name: str, text: str) -> list[Resource]:
    """Read a .tf file or, if its name ends like that, a .tf.json.

    Raises ConfigurationError; MissingDependency without the library that reads the language.
    """
    content = _json(name, text) if name.endswith(".json") else _hcl(name, text)
    values = _Values(escaped=not name.endswith(".json"))
    values.learn(content)
    found = []
    for kind, blocks in _named(content.get("resource", [])):
        for title, body in _named(blocks):
            for block in body if isinstance(body, list) else [body]:
                found.append(_resource(kind, title, block, text, values))
    return found


def _resource(kind: str, title: str, block: Any, text: str, values: _Values) -> Resource:
    values.assumed = {}
    arguments = values.value(block)
    head = re.search(rf'"?{re.escape(kind)}"?[\s:{{]+"?{re.escape(title)}"?', text)
    start = head.start() if head else 0
    return Resource(
        kind=kind,
        name=title,
        arguments=arguments if isinstance(arguments, dict) else {},
        assumed=values.assumed,
        source=text[start:],
        before=text[:start].count("\n"),
    )


def _hcl(name: str, text: str) -> dict[str, Any]:
    try:
        import hcl2
        from hcl2.utils import SerializationOptions
        from lark.exceptions import LarkError
    except ImportError as error:
        raise MissingDependency(installer.lacking("import")) from error
    plain = SerializationOptions(with_comments=False, explicit_blocks=False)
    try:
        found: dict[str, Any] = hcl2.loads(text, serialization_options=plain)
    except LarkError as error:
        msg = f"{name}: {str(error).splitlines()[0]}"
        raise ConfigurationError(msg) from error
    return found


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        msg = f"{name}: {error}"
        raise ConfigurationError(msg) from error
    if not isinstance(found, dict):
        msg = f"{name}: not what Terraform reads"
        raise ConfigurationError(msg)
    return found


def _named(blocks: Any) -> Iterator[tuple[str, Any]]:
    """Go through blocks of one kind, which are a mapping by name or a list of such."""
    for block in blocks if isinstance(blocks, list) else [blocks]:
        for name, body in block.items() if isinstance(block, dict) else ():
            yield name.strip('"'), body


class _Values:
    """Finds out what is meant by what is written."""

    def __init__(self, *, escaped: bool) -> None:
        self.escaped = escaped  # texts are as in HCL: in quotes, with backslashes
        self.known: dict[str, Any] = dict.fromkeys(HERE, ".")
        self.assumed: dict[str, Any] = {}

    def learn(self, content: Mapping[str, Any]) -> None:
        """Take note of variables' defaults and of locals."""
        for name, body in _named(content.get("variable", [])):
            block = body[0] if isinstance(body, list) and body else body
            if isinstance(block, dict) and "default" in block:
                self._note(f"var.{name}", block["default"])
        for name, body in _named(content.get("locals", [])):
            self._note(f"local.{name}", body)

    def _note(self, name: str, raw: Any) -> None:
        found = self.value(raw)
        if isinstance(found, (str, int, float)):
            self.known[name] = found

    def value(self, raw: Any) -> Any:
        """Read one value, with all that is in it."""
        if isinstance(raw, dict):
            return {self._key(key): self.value(one) for key, one in raw.items()}
        if isinstance(raw, list):
            return [self.value(one) for one in raw]
        if not isinstance(raw, str):
            return raw
        if self.escaped and (found := HEREDOC.fullmatch(raw)):
            text = found[2] or ""
            return self._template(_dedent(text) if found[1] else text, escaped=False)
        if self.escaped and raw.startswith('"'):
            return self._template(raw[1:-1], escaped=True)
        if raw.startswith("${") and _end(raw, 2) == len(raw):
            return self._expression(raw[2:-1].strip())
        return self._template(raw, escaped=False)

    def _key(self, key: str) -> str:
        found = self.value(key) if key.startswith('"') else key
        return found if isinstance(found, str) else key.strip('"')

    def _expression(self, text: str) -> Any:
        if text in self.known:
            if text.startswith("var."):
                self.assumed[text] = self.known[text]
            return self.known[text]
        if found := FILE.fullmatch(text):
            return File(found[1])
        if text.startswith('"'):
            return self._template(text[1:-1], escaped=True)
        number = _number(text)
        return Unknown(f"${{{text}}}", (text,)) if number is None else number

    def _template(self, text: str, *, escaped: bool) -> str | Unknown:
        pieces, unknown, place = [], [], 0
        while found := INTERPOLATION.search(text, place):
            pieces.append(text[place : found.start()])
            place = found.end()
            if found[0].startswith("\\"):
                pieces.append(_escape(found[0]) if escaped else found[0])
            elif found[0] in ("$${", "%%{"):
                pieces.append(found[0][1:])
            else:
                place = _end(text, found.end())
                piece, missing = self._inserted(text[found.start() : place])
                pieces.append(piece)
                unknown += missing
        pieces.append(text[place:])
        whole = "".join(pieces)
        return Unknown(whole, tuple(unknown), template=True) if unknown else whole

    def _inserted(self, text: str) -> tuple[str, list[str]]:
        """Return the text for an interpolation, or itself and what is unknown of it."""
        found = self._expression(text[2:-1].strip("~ \n")) if text.startswith("$") else None
        if isinstance(found, bool):
            return str(found).lower(), []
        if isinstance(found, (str, int, float)):
            return str(found), []
        return text, [text[2:-1].strip("~ \n")]


def _end(text: str, place: int) -> int:
    """Return where an interpolation ends, whose content begins at the place."""
    depth, quoted = 1, False
    while depth and place < len(text):
        letter = text[place]
        if quoted and letter == "\\":
            place += 1
        elif letter == '"':
            quoted = not quoted
        elif not quoted:
            depth += {"{": 1, "}": -1}.get(letter, 0)
        place += 1
    return place


def _escape(text: str) -> str:
    if text[1] in "uU" and len(text) > 2:
        return chr(int(text[2:], 16))
    return ESCAPES.get(text[1], text[1])


def _dedent(text: str) -> str:
    """Take from each line what the line that is indented least begins with."""
    lines = text.splitlines(keepends=True)
    least = min((len(one) - len(one.lstrip()) for one in lines if one.strip()), default=0)
    return "".join(one[least:] if one.strip() else one.lstrip(" \t") for one in lines)


def _number(text: str) -> Any:
    """Calculate 24 * 60 * 60; None for what isn't numbers alone."""
    try:
        return _calculate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return None


def _calculate(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=int() | float()):
            return node.value
        case ast.UnaryOp(op=ast.USub()):
            return -_calculate(node.operand)
        case ast.BinOp():
            return OPERATORS[type(node.op)](_calculate(node.left), _calculate(node.right))
    raise ValueError(node)
