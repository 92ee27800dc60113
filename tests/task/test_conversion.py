"""What was written for terraform-provider-iterative means the same to our own options."""

from __future__ import annotations

import builtins
import json
import os
import shlex
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.errors import ConfigurationError, MissingDependency
from cml_runner.launch import options as launching
from cml_runner.task import conversion, terraform
from cml_runner.task.options import Options, Order, read

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Cli

HEAD = 'provider "iterative" {}\n'
WHOLE = """\
variable "size" {
  default = "l+t4"
}
locals { team = "vision" }
resource "iterative_task" "train" {
  cloud       = "az"  # or aws
  region      = "eu-west"
  machine     = var.size
  image       = "nvidia"
  disk_size   = 4 * 25
  spot        = 0.25
  parallelism = 3
  timeout     = 24*60*60
  name        = "train-${local.team}"
  permission_set = null
  tags        = { "a b" = local.team, c : true }
  environment = {
    GREETING = "Hello, \\"you\\"\\t\\u00e9 $${x}",
    "MY_*"   = ""
    N        = 3
  }
  storage {
    workdir = "${path.root}/data"
    output  = "results"
    exclude = ["raw", "- *.tmp"]
    container = "mine/there"
    container_opts = { account = "me" }
  }
  script = <<-END
    #!/bin/bash

    echo "$GREETING" \\n $${HOME} ''${path.root}
      indented %%{x}
  END
}
output "logs" { value = try(join("\\n", iterative_task.train.logs), "") }
"""
SCRIPT = """\
#!/bin/bash

echo "$GREETING" \\n ${HOME} ''.
  indented %{x}
"""


def resources(text: str, name: str = "main.tf") -> list[terraform.Resource]:
    return conversion.choose(name, terraform.read(name, text))


def converted(directory: Path, text: str, name: str = "main.tf") -> conversion.Converted:
    """Convert the only task of a file, as the command does."""
    [one] = resources(text, name)
    done = conversion.task(one, name, "task.sh")
    (directory / "task.toml").write_text(done.text)
    if done.script:
        (directory / "task.sh").write_text(done.script)
    return done


def order(directory: Path, **more: Any) -> Order:
    return read(Options(**more), {"MY_A": "1", "OTHER": "2"}, directory)


def one(*lines: str) -> str:
    inside = "\n".join(('cloud = "local"', 'script = "#!/bin/sh"', *lines))
    return f'resource "iterative_task" "a" {{\n{inside}\n}}\n'


def check(found: Order, directory: Path) -> None:
    assert (found.cloud, found.region, found.name) == ("azure", "eu-west", "train-vision")
    machine = found.machine
    assert (machine.types, machine.image, machine.disk) == (("l+t4",), "nvidia", 100)
    assert (machine.spot, machine.spot_price, machine.permissions) == (True, 0.25, "")
    assert (found.count, found.timeout) == (3, 86400)
    assert found.tags == {"a b": "vision", "c": "true"}
    assert found.environment == {"GREETING": 'Hello, "you"\té ${x}', "MY_A": "1", "N": "3"}
    assert (found.workdir, found.output) == (directory / "data", "results")
    assert (found.container, found.container_options) == ("mine/there", {"account": "me"})
    paths = (b"raw", b"a.tmp", b"kept")
    assert [found.rules.exclude(one, directory=False) for one in paths] == [True, True, False]
    assert found.script == SCRIPT


def test_a_whole_task(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    done = converted(tmp_path, WHOLE)
    assert done.warnings == ['main.tf, line 8: var.size is taken to be "l+t4", its default']
    check(order(tmp_path), tmp_path)


def test_a_whole_task_in_json(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    task = {
        "cloud": "az",
        "region": "eu-west",
        "machine": "${var.size}",
        "image": "nvidia",
        "disk_size": 100,
        "spot": 0.25,
        "parallelism": 3,
        "timeout": "${24*60*60}",
        "name": "train-${local.team}",
        "tags": {"a b": "${local.team}", "c": True},
        "environment": {"GREETING": 'Hello, "you"\té $${x}', "MY_*": "", "N": 3},
        "storage": [
            {
                "workdir": "${path.root}/data",
                "output": "results",
                "exclude": ["raw", "- *.tmp"],
                "container": "mine/there",
                "container_opts": {"account": "me"},
            }
        ],
        "script": SCRIPT.replace("${", "$${").replace("%{", "%%{"),
    }
    whole = {
        "variable": {"size": {"default": "l+t4"}},
        "locals": {"team": "vision"},
        "resource": {"iterative_task": {"train": task}},
    }
    done = converted(tmp_path, json.dumps(whole, indent=1), "main.tf.json")
    assert done.warnings == ['main.tf.json, line 15: var.size is taken to be "l+t4", its default']
    check(order(tmp_path), tmp_path)


def test_the_plan_is_the_expected_one(tmp_path: Path) -> None:
    """From Terraform's file to what the cloud would be asked for."""
    converted(tmp_path, one('machine = "m"', "spot = 0", "parallelism = 2", "disk_size = -1"))
    found = order(tmp_path, cloud="aws", name="bert")
    same = order(tmp_path / "..", cloud="aws", name="bert", spot="0", script="#!", machine="m")
    assert found.machine == same.machine
    assert (found.id, found.count) == (same.id, 2)
    assert found.machine.disk == 0


@pytest.mark.parametrize("cloud", ["k8s", "az", "aws", "gcp"])
def test_clouds_have_our_names(tmp_path: Path, cloud: str) -> None:
    converted(tmp_path, one().replace('"local"', f'"{cloud}"'))
    names = {"k8s": "kubernetes", "az": "azure"}
    assert order(tmp_path).cloud == names.get(cloud, cloud)


@pytest.mark.parametrize(
    ("line", "comment"),
    [
        ("machine = var.size", "# machine = ${var.size}"),
        ('name = "a-${random_id.b.hex}"', '# name = "a-${random_id.b.hex}"'),
        ("timeout = var.hours * 3600", "# timeout = ${var.hours * 3600}"),
        ('image = file("x")', '# image = ${file("x")}'),
        ("count = 2", "# count = 2"),
        ('environment = { A = var.a, B = "b" }', "# A = ${var.a}"),
        ("environment = merge(a, b)", "# environment = ${merge(a, b)}"),
        ("storage {\nexclude = [var.x]\n}", "# exclude = [${var.x}]"),
    ],
)
def test_what_only_terraform_knows(tmp_path: Path, line: str, comment: str) -> None:
    done = converted(tmp_path, HEAD + one(line))
    assert comment in done.text.splitlines()
    [warning] = done.warnings
    assert warning.startswith(f"main.tf, line {5 + line.count(chr(10)) // 2}: ")
    assert order(tmp_path).cloud == "local"


def test_what_is_unknown_in_a_script_stays_there(tmp_path: Path) -> None:
    script = 'script = <<END\n#!/bin/sh\necho ${upper("}")} ${1 + 1}\n EN\nEND'
    done = converted(tmp_path, one().replace('script = "#!/bin/sh"', script))
    assert order(tmp_path).script == '#!/bin/sh\necho ${upper("}")} 2\n EN\n'
    assert done.warnings == ['main.tf, line 5: only Terraform knows ${upper("}")}: '
                             "it stays in the script"]  # fmt: skip


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/sh\necho '''a''' \\n\n",
        "#!/bin/sh\n\techo 'é'\x7f\x01\n",
        "#!/bin/sh\r\necho\r\n",
        "#!/bin/sh\necho 'a'",
        '#!/bin/sh\necho """\\',
        "#!/bin/sh\n" + "echo\n" * 100,
    ],
)
def test_every_script_arrives_as_it_was(tmp_path: Path, script: str) -> None:
    body = {"cloud": "local", "script": script.replace("${", "$${")}
    whole = {"resource": {"iterative_task": {"a": [body]}}}
    done = converted(tmp_path, json.dumps(whole), "a.tf.json")
    assert order(tmp_path).script == script
    assert bool(done.script) == (script.count("\n") > 30)


def test_scripts_that_are_files_or_commands(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("echo run")
    converted(tmp_path, one().replace('"#!/bin/sh"', 'file("${path.module}/run.sh")'))
    assert order(tmp_path).script == "echo run"
    converted(tmp_path, one().replace('"#!/bin/sh"', '"date"'))
    assert order(tmp_path).script == "#!/bin/sh\ndate\n"


def test_blocks_of_older_versions(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    converted(tmp_path, one('workdir {\ninput = "in"\noutput = "out"\n}'))
    assert (order(tmp_path).workdir, order(tmp_path).output) == (tmp_path / "in", "out")
    converted(tmp_path, one('directory = "in"'))
    assert order(tmp_path).workdir == tmp_path / "in"


def test_a_runner_becomes_a_command_line() -> None:
    text = """\
resource "iterative_cml_runner" "r" {
  token = "very secret"
  repo = "https://github.com/o/r"
  driver = "github"
  labels = "a,b"
  idle_timeout = 600
  cloud = "az"
  instance_type = "m"
  instance_gpu = ""
  instance_hdd_size = 50
  spot = true
  spot_price = 0.1
  single = false
  metadata = { team = "a b" }
  docker_volumes = ["/x:/x", "/y:/y"]
  name = var.name
  ami = "x"
}
"""
    [one] = resources(text)
    done = conversion.launch(one, "main.tf")
    words = shlex.split(done.text)
    assert words[:2] == ["cml-runner", "launch"]
    from cml_runner.cli.launch import launch_

    values = launch_.make_context("launch", words[2:]).params
    values.pop("output")
    asked = launching.Options(**values)
    assert (asked.repo, asked.labels, asked.idle_timeout) == (
        "https://github.com/o/r",
        "a,b",
        "600",
    )
    assert (asked.cloud, asked.cloud_type, asked.cloud_hdd_size) == ("azure", "m", "50")
    assert (asked.cloud_spot, asked.cloud_spot_price, asked.single) == (True, "0.1", False)
    assert asked.cloud_metadata == ("team=a b",)
    assert asked.docker_volumes == ("/x:/x", "/y:/y")
    assert "secret" not in done.text + "".join(done.warnings)
    assert [text.partition(":")[0] for text in done.warnings] == [
        "main.tf, line 2", "main.tf, line 16", "main.tf, line 17",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no resource at all"),
        ('resource "aws_instance" "a" {}', "aws_instance"),
        ('resource "iterative_machine" "a" {}', "iterative_machine"),
        ("a = 1\nb = {", "line 2"),
    ],
)
def test_what_is_none(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        resources(text)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_json_that_is_none(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"main\.tf\.json"):
        resources(text, "main.tf.json")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "hcl2":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match=r"\[import\]"):
        terraform.read("main.tf", "")
    assert terraform.read("main.tf.json", "{}") == []


def test_the_command(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main.tf").write_text(one('name = "a"') + one().replace('"a"', '"b"'))
    assert "which one of a, b" in cli.run("task", "import", "main.tf", code=2).err
    assert "a, b" in cli.run("task", "import", "main.tf", "--resource", "c", code=4).err
    assert cli.run("task", "import", "nowhere.tf", code=4)
    cli.run("task", "import", "main.tf", "--all")
    assert {"a.toml", "b.toml"} <= set(os.listdir())
    assert "a.toml" in cli.run("task", "import", "main.tf", "--all", code=5).err
    said = cli.run("task", "import", "main.tf", "--resource", "a", "--output-file", "-").out
    assert said == (tmp_path / "a.toml").read_text()
    said = cli.run("task", "import", "main.tf", "--resource", "b", "--output", "json").out
    assert json.loads(said)["file"] == "task.toml"
    assert cli.run("task", "run", "--workdir", "nowhere", code=2).err.count("--") == 1
