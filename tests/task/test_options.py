from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.errors import ConfigurationError
from cml_runner.model import Identifier
from cml_runner.task.options import Options, Order, read

if TYPE_CHECKING:
    from pathlib import Path

HERE = {"MY_A": "1", "MY_B": "2", "OTHER": "3"}


def order(directory: Path, **more: Any) -> Order:
    given = {"cloud": "local", "command": ("true",), **more}
    return read(Options(**given), HERE, directory)


def test_defaults_are_those_of_the_predecessor(tmp_path: Path) -> None:
    found = order(tmp_path)
    assert (found.region, found.count, found.timeout) == ("us-west", 1, 24 * 3600)
    assert (found.machine.types, found.machine.disk, found.machine.spot) == (("m",), 0, False)
    assert found.workdir == tmp_path
    assert found.output == ""
    assert Identifier.parse(found.name) == found.id
    assert found.id != order(tmp_path).id
    assert order(tmp_path, name="a").id == order(tmp_path / "..", name="a").id


@pytest.mark.parametrize(
    ("spot", "asked", "price"), [("-1", False, -1), ("0", True, -1), ("0.25", True, 0.25)]
)
def test_spot(tmp_path: Path, spot: str, asked: bool, price: float) -> None:
    machine = order(tmp_path, spot=spot).machine
    assert (machine.spot, machine.spot_price) == (asked, price)


def test_environment(tmp_path: Path) -> None:
    found = order(tmp_path, environment=("A=b=c", "EMPTY=", "MY_*", "OTHER", "MISSING"))
    assert found.environment == {
        "A": "b=c",
        "EMPTY": "",
        "MY_A": "1",
        "MY_B": "2",
        "OTHER": "3",
    }


def test_scripts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("echo file")
    assert order(tmp_path, command=("echo", "two words")).script.endswith("exec echo 'two words'\n")
    assert order(tmp_path, command=(), script="file").script == "echo file"
    assert order(tmp_path, command=(), script="#!/bin/sh").script == "#!/bin/sh"
    assert order(tmp_path, command=(), script="a\nb").script == "a\nb"


def test_every_mistake_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as error:
        read(
            Options(
                cloud="mars",
                spot="cheap",
                parallelism="0",
                timeout="never",
                disk_size="big",
                environment=("A-B=c",),
                workdir="nowhere",
                output="../out",
                exclude=("- {{.*}}",),
                tags=("team",),
                machine_index="index",
            ),
            {},
            tmp_path,
        )
    words = "cloud spot parallelism timeout disk-size environment workdir output exclude tags"
    for word in (*words.split(), "machine-index", "script"):
        assert [one for one in error.value.mistakes if one.startswith(f"--{word}")], word


FULL = """
cloud = "local"
machine = "l"
disk-size = 50
spot = 0
parallelism = 2
timeout = 3600
script = '''
#!/bin/sh
true'''
name = "filed"
[environment]
A = "b"
"MY_*" = ""
[storage]
workdir = "sub"
output = "out"
exclude = ["a", "b"]
container = "mine"
container_opts = {region = "eu-west-1"}
[tags]
team = "ml"
"""


@pytest.mark.parametrize("name", ["task.toml", "pyproject.toml"])
def test_a_file(tmp_path: Path, name: str) -> None:
    text = FULL
    if name == "pyproject.toml":
        text = "[tool.cml-runner.task]" + FULL.replace("\n[", "\n[tool.cml-runner.task.")
    (tmp_path / name).write_text(text)
    (tmp_path / "sub").mkdir()
    found = read(Options(parallelism="3"), HERE, tmp_path)
    assert (found.machine.types, found.machine.disk, found.machine.spot) == (("l",), 50, True)
    assert (found.count, found.timeout, found.name) == (3, 3600, "filed")
    assert found.environment == {"A": "b", "MY_A": "1", "MY_B": "2"}
    assert (found.workdir, found.output) == (tmp_path / "sub", "out")
    assert found.rules.exclude(b"b", directory=False)
    assert found.tags == {"team": "ml"}
    assert found.container == f"mine/{found.id.short}"
    assert found.container_options == {"region": "eu-west-1"}
    assert found.script.strip().endswith("true")


def test_a_file_with_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "task.toml"
    file.write_text("cluod = 1\n[storage]\ncontainre = 2\n")
    with pytest.raises(ConfigurationError) as error:
        order(tmp_path)
    assert len(error.value.mistakes) == 2
    file.write_text("cloud = \n")
    with pytest.raises(ConfigurationError, match=r"task\.toml"):
        order(tmp_path)


def test_a_pyproject_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.other]\nx = 1\n")
    assert order(tmp_path).count == 1


def test_every_option_is_a_flag() -> None:
    from cml_runner.cli.task import run_

    flags = {one.name for one in run_.params} - {"log", "detach", "as_json"}
    assert flags == {one.name for one in fields(Options)}
