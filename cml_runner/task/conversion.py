"""From Terraform's words to ours: a task.toml, or the command line of a launch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from shlex import join
from typing import TYPE_CHECKING, Any

from cml_runner import clouds
from cml_runner.errors import ConfigurationError
from cml_runner.task.terraform import File, Unknown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cml_runner.task.terraform import Resource

TASK, RUNNER = "iterative_task", "iterative_cml_runner"
CLOUDS = {"k8s": "kubernetes"} | clouds.ALIASES
LONG = 30  # lines; a longer script is better in a file of its own
WORDS = (
    *("cloud", "region", "machine", "image", "disk_size", "spot", "parallelism", "timeout"),
    *("name", "permission_set"),
)
TABLES = ("environment", "tags")
STORAGE = ("workdir", "output", "exclude", "container", "container_opts")
FLAGS = {
    **{one: f"--{one}" for one in ("repo", "driver", "labels", "name", "cloud", "single")},
    "idle_timeout": "--idle-timeout",
    "region": "--cloud-region",
    "image": "--cloud-image",
    "spot": "--cloud-spot",
    "spot_price": "--cloud-spot-price",
    "instance_type": "--cloud-type",
    "instance_gpu": "--cloud-gpu",
    "instance_hdd_size": "--cloud-hdd-size",
    "instance_permission_set": "--cloud-permission-set",
    "metadata": "--cloud-metadata",
    "startup_script": "--cloud-startup-script",
    "aws_security_group": "--cloud-aws-security-group",
    "aws_subnet_id": "--cloud-aws-subnet",
    "kubernetes_node_selector": "--cloud-kubernetes-node-selector",
    "docker_volumes": "--docker-volumes",
}
SECRET = {
    "token": "give it as a variable: REPO_TOKEN",
    "ssh_private": "give it as a variable: CML_RUNNER_CLOUD_SSH_PRIVATE",
}


@dataclass
class Converted:
    """What has become of a resource."""

    text: str = ""  # a task.toml, or a command line
    script: str = ""  # for a file of its own; empty: it has none
    warnings: list[str] = field(default_factory=list)


def choose(name: str, resources: Sequence[Resource]) -> list[Resource]:
    """Keep what can be converted. Raises ConfigurationError if there is nothing."""
    if found := [one for one in resources if one.kind in (TASK, RUNNER)]:
        return found
    others = ", ".join(sorted({one.kind for one in resources})) or "no resource at all"
    msg = f"{name}: there is neither an {TASK} nor an {RUNNER} in it, but {others}"
    raise ConfigurationError(msg)


def task(resource: Resource, file: str, script: str) -> Converted:
    """Write the task.toml for an iterative_task of a file; its script, if long, is for another."""
    return _Writer(resource, file).task(script)


def launch(resource: Resource, file: str) -> Converted:
    """Write the command line for an iterative_cml_runner of a file."""
    return _Writer(resource, file).launch()


class _Writer:
    def __init__(self, resource: Resource, file: str) -> None:
        self.resource, self.file, self.done = resource, file, Converted()
        self.left = {key: one for key, one in resource.arguments.items() if one is not None}
        if "cloud" in self.left and not isinstance(self.left["cloud"], Unknown):
            self.left["cloud"] = CLOUDS.get(self.left["cloud"], self.left["cloud"])
        for name, value in resource.assumed.items():
            self._warn(f"{name} is taken to be {json.dumps(value)}, its default", name)

    def task(self, script: str) -> Converted:
        head = [f"# From {self.resource.kind}.{self.resource.name} of {self.file}"]
        if self.left.get("disk_size") == -1:
            del self.left["disk_size"]
        lines = [line for key in WORDS for line in self._entry(self.left, key)]
        lines += self._script(self.left.pop("script", None), script)
        tables = [line for key in TABLES for line in self._table(key, self._mapping(key), key)]
        tables += self._storage()
        head += [line for key in list(self.left) for line in self._foreign(key)]
        self.done.text = "\n".join([*head, *lines, *tables]) + "\n"
        return self.done

    def launch(self) -> Converted:
        words = ["cml-runner", "launch"]
        for key, value in self.left.items():
            if key in SECRET:
                self._warn(f"{key}: {SECRET[key]}", key)
            elif key not in FLAGS:
                self._warn(f"{key} is left out: launch has no such option", key)
            elif _unknown(value):
                self._warn(f"{key} is left out: only Terraform knows {_told(value)}", key)
            else:
                words += _arguments(FLAGS[key], value)
        self.done.text = join(words) + "\n"
        return self.done

    def _warn(self, message: str, *words: str) -> None:
        self.done.warnings.append(f"{self.file}, line {self.resource.line(*words)}: {message}")

    def _entry(self, values: dict[str, Any], key: str, *above: str) -> Iterator[str]:
        """Write KEY = VALUE, or a comment in its place."""
        value = values.pop(key, None)
        name = key if re.fullmatch(r"[\w-]+", key) else _quoted(key)
        if value is None or (value == "" and "environment" not in above):
            return
        if _unknown(value):
            self._warn(f"{key}: only Terraform knows {_told(value)}; it's a comment now", key)
            yield from _comment(f"{name} = {_told(value)}")
        else:
            yield f"{name} = {_toml(value, text=bool(above))}"

    def _script(self, value: Any, file: str) -> Iterator[str]:
        """Write it here if it's short; what is unknown in it stays as it is."""
        if isinstance(value, File):
            yield f"script = {_quoted(value.path)}"
        elif isinstance(value, Unknown) and not value.template:
            yield from self._entry({"script": value}, "script")
        elif value is not None:
            text = value.text if isinstance(value, Unknown) else str(value)
            for one in value.expressions if isinstance(value, Unknown) else ():
                self._warn(f"only Terraform knows ${{{one}}}: it stays in the script", one)
            if not text.startswith("#!") and "\n" not in text:
                text = f"#!/bin/sh\n{text}\n"  # else it would be the name of a file
            long = text.count("\n") > LONG
            self.done.script = text if long else ""
            yield f"script = {_quoted(file) if long else _long(text)}"

    def _mapping(self, key: str) -> Any:
        """Take a mapping, or what is meant to be one."""
        value = self.left.pop(key, None)
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    def _table(self, title: str, values: Any, *above: str) -> Iterator[str]:
        if isinstance(values, dict) and values:
            lines = [line for key in list(values) for line in self._entry(values, key, *above)]
            yield from ("", f"[{title}]", *lines)
        elif values:
            yield from self._entry({title: values}, title)

    def _storage(self) -> Iterator[str]:
        """Write the block; a `workdir` block or a `directory` is what older versions had."""
        block = self._mapping("storage") or {}
        older = self._mapping("workdir")
        if isinstance(older, dict):
            names = {"input": "workdir", "output": "output"}
            block = {names.get(key, key): one for key, one in older.items()} | block
        if directory := self.left.pop("directory", None):
            block = {"workdir": directory} | block
        options = block.pop("container_opts", None)
        known = [line for key in STORAGE for line in self._entry(block, key)]
        for key in block:
            self._warn(f"storage.{key} is unknown: it's left out", "storage", key)
        if known:
            yield from ("", "[storage]", *known)
        yield from self._table("storage.container_opts", options, "container_opts")

    def _foreign(self, key: str) -> Iterator[str]:
        self._warn(f"{key} has no counterpart in a task: it's a comment now", key)
        yield from _comment(f"{key} = {_told(self.left[key])}")


def _arguments(flag: str, value: Any) -> list[str]:
    match value:
        case bool():
            return [flag] if value else []
        case dict():
            return [word for key, one in value.items() for word in (flag, f"{key}={one}")]
        case list():
            return [word for one in value for word in (flag, str(one))]
        case "":
            return []
    return [flag, str(value)]


def _unknown(value: Any) -> bool:
    match value:
        case Unknown() | File():
            return True
        case dict():
            return any(map(_unknown, value.values()))
        case list():
            return any(map(_unknown, value))
    return False


def _told(value: Any) -> str:
    """Say a value as Terraform has it."""
    match value:
        case Unknown():
            return _quoted(value.text) if value.template else value.text
        case File():
            return f"${{file({_quoted(value.path)})}}"
        case dict():
            return "{" + ", ".join(f"{key} = {_told(one)}" for key, one in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_told, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in text.splitlines()]


def _toml(value: Any, *, text: bool) -> str:
    """Write a value; in tables of texts everything is text."""
    match value:
        case bool():
            return _quoted(str(value).lower()) if text else str(value).lower()
        case int() | float():
            return _quoted(str(value)) if text else str(value)
        case list():
            return "[" + ", ".join(_quoted(str(one)) for one in value) + "]"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _long(text: str) -> str:
    """Write lines as lines, where that says the same."""
    plain = text.replace("\n", "").replace("\t", "").isprintable()
    if plain and "'''" not in text and not text.endswith("'"):
        return f"'''\n{text}'''"
    return _quoted(text)
