"""The environment, from an index on this computer; uv is a stub that writes down its calls."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import cml_runner
from cml_runner.boot import environment
from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Iterator

UV = """#!/bin/sh
echo "$@" >>{calls}
[ "$1" != venv ] || mkdir -p "$5/bin"
[ ! -e {fails} ] || {{ cat {fails}; rm {fails}; exit 2; }}
"""
ARCH = platform.machine()
NAME = f"uv-1.2.3-py3-none-manylinux_2_17_{ARCH}.manylinux2014_{ARCH}.whl"
OTHERS = ("uv-1.2.3-py3-none-macosx_11_0_arm64.whl", "uv-1.2.2-py3-none-any.whl", "uv-1.2.3.tar.gz")


class Index:
    """A simple index with uv alone, in HTML or JSON."""

    def __init__(self, content: bytes) -> None:
        self.content, self.json = content, False
        self.faults: list[int] = []
        self.asked: list[str] = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple/"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append(request.path)
        if self.faults:
            request.send_error(self.faults.pop(0))
            return
        kind, content = "application/octet-stream", self.content
        names = (*OTHERS, NAME)
        if request.path == "/simple/uv/" and self.json:
            kind = "application/vnd.pypi.simple.v1+json"
            files = [{"filename": one, "url": f"../../files/{one}", "hashes": {}} for one in names]
            content = json.dumps({"files": files}).encode()
        elif request.path == "/simple/uv/":
            kind = "text/html; charset=utf-8"
            links = [f'<a\n  HREF="../../files/{one}#sha256=0&amp;x">{one}</a>' for one in names]
            content = "<br>\n".join(links).encode()
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def fails(tmp_path: Path) -> Path:
    """A file with what uv says when it fails the next time."""
    return tmp_path / "fails"


@pytest.fixture
def index(calls: Path, fails: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("uv-1.2.3.data/scripts/uv", UV.format(calls=calls, fails=fails))
        file.writestr("uv-1.2.3.data/scripts/uvx", "no")
    found = Index(content.getvalue())
    digest = hashlib.sha256(found.content).hexdigest()
    locks = {
        "lock.txt": b"six==1.0 --hash=sha256:1\n",
        "uv.txt": f"# for\nuv==1.2.3 \\\n    --hash=sha256:{digest}\n".encode(),
    }
    monkeypatch.setattr(environment, "lock", lambda name="lock.txt": locks[name])
    thread = threading.Thread(target=found.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "opt"


class Clock:
    def __init__(self) -> None:
        self.slept: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.mark.parametrize("json_", [False, True])
def test_uv_comes_from_the_index_and_installs_the_lock(
    index: Index, calls: Path, root: Path, json_: bool
) -> None:
    index.json = json_
    python = environment.install(index.url, root)
    digest = hashlib.sha256(environment.lock()).hexdigest()
    assert python == root / f"env-{digest[:12]}" / "bin" / "python"
    made, filled = calls.read_text().splitlines()
    assert made == f"venv --quiet --python >=3.10 {python.parents[1]}"
    assert filled.startswith(f"pip install --quiet --python {python} --require-hashes")
    assert f"--only-binary :all: --no-deps --default-index {index.url} " in filled
    assert index.asked == ["/simple/uv/", f"/files/{NAME}"]
    assert [one.name for one in root.iterdir()] == [python.parents[1].name]
    environment.install("http://127.0.0.1:9/none", root)  # it is there
    assert len(calls.read_text().splitlines()) == 2


def test_an_environment_that_is_not_complete_is_made_anew(
    index: Index, fails: Path, root: Path
) -> None:
    fails.write_text("hash mismatch for six")
    with pytest.raises(RunnerError, match="hash mismatch for six"):
        environment.install(index.url, root)
    (place,) = root.glob("env-*")
    (place / "rest").touch()
    assert not environment.is_complete(root)
    environment.install(index.url, root)
    assert environment.is_complete(root)
    assert not (place / "rest").exists()


def test_an_index_that_is_away_for_a_moment(index: Index, fails: Path, root: Path) -> None:
    index.faults = [503, 429, 500]
    fails.write_text("error sending request")
    clock = Clock()
    assert environment.install(index.url, root, clock)
    assert clock.slept == [1, 2, 5, 1]


def test_an_index_that_stays_away(
    index: Index, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.VARIABLE, "3.5")
    clock = Clock()
    index.server.server_close()
    with pytest.raises(RunnerError, match=r"GET http://127.0.0.1:.*/simple/uv/: .*refused"):
        environment.install(index.url, root, clock)
    assert clock.slept == [1, 2]


@pytest.mark.parametrize("status", [403, 404])
def test_an_index_without_uv_is_not_asked_again(index: Index, root: Path, status: int) -> None:
    index.faults = [status]
    clock = Clock()
    with pytest.raises(RunnerError, match=str(status)):
        environment.install(index.url, root, clock)
    assert clock.slept == []


def test_another_file_than_the_locks_is_refused(index: Index, root: Path) -> None:
    index.content += b"!"
    clock = Clock()
    with pytest.raises(RunnerError, match=f"{NAME} .* SHA-256 is another"):
        environment.install(index.url, root, clock)
    assert clock.slept == []
    assert not list(root.rglob("uv"))


def test_a_machine_for_which_there_is_no_uv(
    index: Index, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    with pytest.raises(RunnerError, match=r"has no wheel uv-1\.2\.3-.*_sparc64\.whl"):
        environment.install(index.url, root, Clock())


def test_the_wheel_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "programs" / f"{'ab' * 32}.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("cml_runner/__init__.py", "x")
    monkeypatch.setattr(cml_runner, "__file__", str(wheel / "cml_runner" / "__init__.py"))
    place = environment.unpack(tmp_path)
    assert place == tmp_path / "programs" / ("ab" * 32)
    assert (place / "cml_runner" / "__init__.py").read_text() == "x"
    assert environment.unpack(tmp_path) == place
    assert not list(place.parent.glob(".*"))
    monkeypatch.setattr(cml_runner, "__file__", str(place / "cml_runner" / "__init__.py"))
    assert environment.unpack(tmp_path / "elsewhere") == place


def test_the_real_locks_can_be_read() -> None:
    assert b"--hash=sha256:" in environment.lock()
    assert b"uv==" in environment.lock("uv.txt")
    assert Path(cml_runner.__file__).parent.joinpath("boot", "lock.txt").is_file()
