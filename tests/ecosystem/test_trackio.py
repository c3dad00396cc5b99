"""trackio keeps the curves of a run in one run of its own, in files on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pha.data import TokenStore
from pha.runs import RunFolder
from tests.train.conftest import arguments

READ = """
import json, trackio
[run] = trackio.Api().runs("pha")
rows = [row for row in trackio.sqlite_storage.SQLiteStorage.get_logs("pha", run.name)]
print(json.dumps({"name": run.name, "config": run.config, "steps": [r["step"] for r in rows]}))
"""


def test_a_run_that_was_stopped_stays_one_run(store: TokenStore, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    kept = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    words = arguments(store, run__trackers="[trackio]", run__steps=40)
    out = tmp_path / "mine"
    command = [sys.executable, "-m", "pha", "train", "pha-tiny.text", *words, "--out", str(out)]
    first = subprocess.Popen(command, env=kept)
    run = RunFolder(out)
    while len(run.read_metrics().train) < 5:
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    first.wait()
    assert run.checkpoint_steps()
    subprocess.run(command, env=kept, check=True)
    done = subprocess.run([sys.executable, "-c", READ], env=kept, check=True, capture_output=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["name"] == "mine"
    assert found["config"]["optimizer.learning_rate"] == 3e-3
    assert set(range(1, 41)) <= set(found["steps"])
