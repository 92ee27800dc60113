"""What machines get before anything else: the program, an index, authorities, proxies."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec
import pytest

from cml_runner import launch, program, task
from cml_runner.errors import ConfigurationError
from cml_runner.launch import options, provision
from cml_runner.model import Program
from cml_runner.task import options as task_options
from tests.lab.internet import certify

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "https://index.example/simple"
HERE = {"UV_DEFAULT_INDEX": INDEX}


def read(cloud: str = "aws", **more: str | bool) -> provision.Provision:
    return provision.read(provision.Asked(cloud=cloud, **more), HERE)  # type: ignore[arg-type]


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A file with the certificate of a private authority."""
    certify(tmp_path)
    return tmp_path / "ca.pem"


def test_machines_run_our_program_and_use_our_index() -> None:
    found = read().program
    assert found.wheel == program.wheel()
    assert found.sha256 == hashlib.sha256(found.wheel).hexdigest() == program.digest()
    assert found.index == INDEX
    assert read(machine_index="https://other.example").program.index == "https://other.example"
    assert str(found.wheel) not in repr(found)


@pytest.mark.parametrize("cloud", ["", "local"])
def test_this_computer_needs_nothing(cloud: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "wheel", lambda: pytest.fail("it is built"))
    assert read(cloud, machine_proxy="http://proxy:3128") == provision.Provision()


def test_proxies() -> None:
    found = read(machine_proxy="http://me:secret@proxy:3128")
    assert found.proxies["HTTPS_PROXY"] == "http://me:secret@proxy:3128"
    assert "secret" not in repr(found)
    assert "secret" not in str(found.program)
    found = read(machine_proxy="http://proxy:3128")
    assert found.program.proxies["HTTPS_PROXY"] == "http://proxy:3128"


def test_certificates(authority: Path) -> None:
    pem = authority.read_text().strip()
    authority.write_text(f"Our authority\n{pem}\n")
    found = read(machine_ca=str(authority))
    assert found.program.authorities.strip() == pem
    assert pem in found.authorities


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no certificate in PEM"),
        (b"\x30\x82\xff", "no certificate in PEM"),
        (b"-----BEGIN PRIVATE KEY-----\n", "a private key"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "something else"),
    ],
)
def test_what_is_no_certificate(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "ca.pem").write_bytes(content)
    with pytest.raises(ConfigurationError, match=told):
        read(machine_ca=str(tmp_path / "ca.pem"))


def test_every_mistake_is_told() -> None:
    with pytest.raises(ConfigurationError) as error:
        read(
            machine_index="https://me:secret@index/",
            machine_ca="/nonexistent",
            machine_proxy="proxy",
            no_machine_proxy=True,
        )
    told = error.value.mistakes
    assert [one.partition(" ")[0].rstrip(":") for one in told] == [
        "--machine-index",
        "--machine-ca",
        "--machine-proxy",
    ]
    assert "me:secret" not in str(error.value)


def test_launch_and_task_run_read_the_same(authority: Path, tmp_path: Path) -> None:
    given = {
        "machine_index": INDEX,
        "machine_ca": str(authority),
        "machine_proxy": "http://me:secret@proxy:3128",
    }
    one = options.read(
        options.Options(repo="https://github.com/a/b", token="t", cloud="aws", **given),  # type: ignore[arg-type]
        {},
    )
    other = task_options.read(
        task_options.Options(cloud="aws", command=("true",), **given),  # type: ignore[arg-type]
        {},
        tmp_path,
    )
    assert (one.program, one.authorities, one.proxies) == (
        other.program,
        other.authorities,
        other.proxies,
    )
    assert "secret" not in repr(one) + repr(other)
    with pytest.raises(ConfigurationError, match="--machine-proxy"):
        task_options.read(
            task_options.Options(
                cloud="aws", command=("true",), machine_proxy="http://p:1", no_machine_proxy=True
            ),
            HERE,
            tmp_path,
        )


def test_a_file_can_say_that_there_is_no_proxy(tmp_path: Path) -> None:
    here = {**HERE, "HTTPS_PROXY": "http://proxy:3128"}
    command = task_options.Options(cloud="aws", command=("true",))
    assert task_options.read(command, here, tmp_path).proxies
    for text, without in (("true", True), ("false", False)):
        (tmp_path / "task.toml").write_text(f"no-machine-proxy = {text}\n")
        assert bool(task_options.read(command, here, tmp_path).proxies) != without


def test_settings_have_them() -> None:
    given = options.Options(
        repo="https://github.com/a/b", token="t", cloud="aws", machine_proxy="http://p:1"
    )
    order = options.read(given, HERE)

    class Forge:
        url = "https://github.com/a/b"

        @staticmethod
        def packages() -> list[None]:
            return []

    settings = launch.settings(order, Forge())  # type: ignore[arg-type]
    assert settings.proxies == order.proxies
    assert settings.authorities == order.authorities


def test_a_task_is_started_again_with_the_program_of_who_starts_it() -> None:
    found = read(machine_index=INDEX).program
    kept = provision.without_wheel(found)
    assert len(msgspec.json.encode(kept)) < 500
    assert kept.index == INDEX
    assert provision.with_wheel(kept) == found
    assert provision.with_wheel(Program()) == Program()
    assert task.Resume.__annotations__["program"] == "Program"
