"""What a pod knows of itself: it has no access to the cluster, and needs none."""

from __future__ import annotations

import os
import socket
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cml_runner.model import Notice

DIRECTORY = Path("/run/cml-runner")  # a volume of the pod
INDEX = "JOB_COMPLETION_INDEX"  # set by the Job controller
GRACE = "CML_RUNNER_GRACE"  # seconds from a notice to the end, at most
NOTICE = "notice"  # a file that the pod's preStop hook writes: the time, in seconds since 1970
HOME = "CML_RUNNER_POD_DIRECTORY"  # the directory, if it is another
POD = "CML_RUNNER_POD"  # the pod's name; its host name stays when it is replaced
# How often a pod of this number failed, or was taken away; the Job controller's own counts.
COUNTS = {
    "CML_RUNNER_FAILURES": "batch.kubernetes.io/job-index-failure-count",
    "CML_RUNNER_DISRUPTIONS": "batch.kubernetes.io/job-index-ignored-failure-count",
}


def rank() -> int:
    """Which of the Job's pods this is."""
    return int(os.environ.get(INDEX) or 0)


def replaced() -> int:
    """How many pods were in the place of this one."""
    return sum(int(os.environ.get(name) or 0) for name in COUNTS)


def name() -> str:
    """The pod's own name."""
    return os.environ.get(POD) or socket.gethostname()


def notice() -> Notice | None:
    """Tell if the pod has been told to end: it gets SIGTERM then, and some time.

    How much was given this very time isn't told to pods; it is never more than they asked for.
    """
    try:
        text = Path(os.environ.get(HOME) or DIRECTORY, NOTICE).read_text()
    except FileNotFoundError:
        return None
    at = datetime.fromtimestamp(int(text or 0), timezone.utc)
    grace = timedelta(seconds=float(os.environ.get(GRACE) or 0))
    return Notice(reason="the pod is evicted", deadline=at + grace)
