"""A task's life in the pods of a cluster: its data are in a volume, and survive."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab.aws import AWS, REGION
from tests.lab.pod_identity import Identities
from tests.lab.prepare import ROOT
from tests.lab.test_kubernetes_scenes import COLLECTED, PATIENCE, changed, logs, wait

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.lab.town import Country, Town

pytestmark = pytest.mark.lab

PLACE = ("--cloud", "kubernetes", "--cloud-region", "us-west")
POD = ("--machine", "0.4-500", "--image", "lab.example/system:1")
LAST = 40
SCRIPT = f"""\
#!/bin/bash
# How far it is stands in a small file and, five million times, in a large one.
trap 'echo "told at $i"; exit 1' TERM
i=$(cat counter 2>/dev/null || echo 0)
echo "begin at $i, epoch $CML_EPOCH"
ls -A
while [ $i -lt {LAST} ]; do
  i=$((i + 1))
  yes $i | head -c 5000000 >large.new && mv large.new large
  echo $i >counter
  echo $i >not-kept
  echo "now $i"
  sleep 0.5
done
exit 3
"""


@pytest.fixture
def town(country: Country, tmp_path: Path) -> Iterator[Town]:
    with country.town(tmp_path) as found:
        yield found


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    place = tmp_path / "work"
    (place / "empty").mkdir(parents=True)
    (place / "script").write_text(SCRIPT)
    (place / "ünïcode and space\n").write_text("x")
    (place / "not-sent").write_text("secret")
    return place


def run(
    town: Town,
    workdir: Path,
    *more: str,
    script: str = "script",
    environment: Mapping[str, str] | None = None,
) -> str:
    name = ("--name", "count", "--detach", "--workdir", str(workdir))
    rules = ("--exclude", "not-sent", "--exclude", "not-kept", "--disk-size", "1")
    what = () if "--" in more else ("--script", str(workdir / script))
    command = ("task", "run", "--cloud", "kubernetes", *POD, *name, *rules, *what, *more)
    done = town.cli(*command, environment=environment)
    assert done.returncode == 0, done.stderr + logs(town)
    return done.stdout.strip()


def ask(
    town: Town,
    verb: str,
    *more: str,
    environment: Mapping[str, str] | None = None,
    checkout: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    words = ("task", verb, "count", *PLACE, *more)
    done = town.cli(*words, environment=environment, checkout=checkout)
    assert done.returncode == 0, done.stderr + logs(town)
    return done


def said(town: Town) -> str:
    return "\n".join(town.log(one["metadata"]["name"]) for one in town.ask("GET", "pods")["items"])


def told(town: Town) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ask(town, "show", "--output", "json").stdout)
    return found


def whole(directory: Path) -> None:
    assert (directory / "counter").read_text() == f"{LAST}\n"
    assert set((directory / "large").read_text().split()[:-1]) == {str(LAST)}
    assert not (directory / "not-kept").exists()


def test_evicted_in_the_middle(town: Town, workdir: Path) -> None:
    identifier = run(town, workdir)
    wait(town, lambda: "now 5\n" in said(town), "it to count")
    assert "not-sent" not in said(town)
    assert "ünïcode and space" in said(town)
    (first,) = town.pods()
    ask_ = town.cli("interrupt", identifier, "--cloud", "kubernetes", "--after", "30s")
    assert ask_.returncode == 0, ask_.stderr
    gone = first["metadata"]["name"]
    wait(town, lambda: [one["metadata"]["name"] for one in town.pods()] != [gone], "its end")
    wait(town, lambda: "epoch 2" in said(town), "another pod to go on")
    (begin,) = re.findall(r"begin at (\d+), epoch 2", said(town))
    assert int(begin) >= 5
    done = town.cli("task", "logs", "-f", "count", *PLACE)
    assert done.returncode == 3, done.stderr + logs(town)
    wait(town, lambda: told(town)["expires"] is None, "the Job to be over")
    found = told(town)
    assert found["status"] == {"failed": 1}
    assert [(one["code"], one["epoch"]) for one in found["machines"]] == [(3, 2)]
    both = ask(town, "logs").stdout
    assert "told at" in both, "what the first pod has said isn't lost with it"
    assert len(re.findall(r"begin at \d+, epoch \d", both)) == 2
    ask(town, "destroy")
    whole(workdir)
    wait(town, lambda: not town.left(), "the end of all", COLLECTED)


def test_results_outlive_the_pods_and_come_down_elsewhere(
    town: Town, workdir: Path, tmp_path: Path
) -> None:
    script = "mkdir -p out/$CML_RANK; echo $CML_RANK of $CML_WORLD_SIZE >out/$CML_RANK/me; ls -A"
    identifier = run(
        town, workdir, "--parallelism", "2", "--output", "out", "--", "sh", "-c", script
    )
    wait(town, lambda: town.ask("GET", "pods")["items"] and not town.pods(), "the end")
    (claim,) = town.ask("GET", "persistentvolumeclaims")["items"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    wait(town, lambda: told(town)["expires"] is None, "the Job to be over")
    for one in town.ask("GET", "pods")["items"]:  # as when their nodes go
        town.ask("DELETE", f"pods/{one['metadata']['name']}")
    assert told(town)["status"] == {"succeeded": 2}
    assert "script" in ask(town, "logs").stdout
    secrets = [one["metadata"]["name"] for one in town.ask("GET", "secrets")["items"]]
    assert identifier not in secrets
    elsewhere = tmp_path / "elsewhere"
    done = town.cli("task", "destroy", identifier, *PLACE, "--to", str(elsewhere))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert (elsewhere / "out" / str(rank) / "me").read_text() == f"{rank} of 2\n"
    assert not (elsewhere / "script").exists()
    wait(town, lambda: not town.left(), "the end of all", COLLECTED)


def test_stopped_and_started(town: Town, workdir: Path, tmp_path: Path) -> None:
    run(town, workdir)
    wait(town, lambda: "now 5\n" in said(town), "it to count")
    ask(town, "pull", "--to", str(tmp_path / "meanwhile"))
    ask(town, "stop")
    assert town.pods() == []
    assert told(town)["status"] == {"stopped": 1}
    assert "told at" in ask(town, "logs").stdout
    ask(town, "pull", "--to", str(tmp_path / "stopped"))
    count = int((tmp_path / "stopped" / "counter").read_text())
    assert count >= 5
    wait(town, lambda: not town.pods(), "who moved the data to be gone", 10)
    newer = changed(tmp_path / "newer", "supervise/script/data.py", "restored %d", "fetched %d")
    ask(town, "start", checkout=newer)
    wait(town, lambda: f"begin at {count}, epoch 2" in said(town), "it to go on", PATIENCE)
    assert "fetched " in said(town), "it runs the program of who starts it"
    done = town.cli("task", "logs", "-f", "count", *PLACE)
    assert done.returncode == 3, done.stderr + logs(town)
    ask(town, "destroy")
    whole(workdir)
    wait(town, lambda: not town.left(), "the end of all", COLLECTED)


def test_a_claim_that_nobody_meets_leaves_nothing(town: Town, workdir: Path) -> None:
    command = ("task", "run", "--cloud", "kubernetes", *POD, "--workdir", str(workdir))
    done = town.cli(*command, "--image", "images.lab.example/nothing:1", "--", "true")
    assert done.returncode != 0
    assert "nothing:1" in done.stderr
    wait(town, lambda: not town.left(), "the end of all", COLLECTED)


def test_data_in_a_bucket_that_pods_may_use(town: Town, workdir: Path) -> None:
    use = {
        "Effect": "Allow",
        "Action": ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"],
        "Resource": ["arn:aws:s3:::theirs", "arn:aws:s3:::theirs/*"],
    }
    policy = {"Version": "2012-10-17", "Statement": [use]}
    where = ("--storage-container", "s3://theirs/some/where", "--permission-set", "trainer")
    with AWS() as aws, Identities(town, aws, "trainer", policy):
        client = aws._client("s3", REGION)
        place = {"LocationConstraint": REGION}
        client.create_bucket(Bucket="theirs", CreateBucketConfiguration=place)
        keys = aws.environment(aws.add_user(policy))
        own = {name: keys[name] for name in keys if "KEY" in name or "SESSION" in name}
        more = (*where, "--storage-container-opts", f"region={REGION}")
        run(town, workdir, *more, environment=own)
        wait(town, lambda: "now 5\n" in said(town), "it to count")
        assert not town.ask("GET", "persistentvolumeclaims")["items"]
        (first,) = town.pods()
        town.ask("DELETE", f"pods/{first['metadata']['name']}")
        wait(town, lambda: "epoch 2" in said(town), "another pod to go on")
        done = town.cli("task", "logs", "-f", "count", *PLACE, environment=own)
        assert done.returncode == 3, done.stderr + logs(town)
        found = client.list_objects_v2(Bucket="theirs")["Contents"]
        assert all(one["Key"].startswith("some/where/") for one in found)
        ask(town, "destroy", environment=own)
        whole(workdir)
        assert "Contents" not in client.list_objects_v2(Bucket="theirs")
        wait(town, lambda: not town.left(), "the end of all", COLLECTED)
