"""The studies: data sets, runner, statistics and report."""

import json
import logging
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import data, position_encodings, runs
from experiments.plan import FULL, QUICK, VARIANTS, Run, planned
from experiments.results import Results
from runtime.options import UserError

FAKE_RUN = """
import pathlib, signal, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with open(folder / "started", "a") as file:
    file.write("x")
end = time.monotonic() + seconds
while time.monotonic() < end:
    time.sleep(0.01)
print("last line")
if len(sys.argv) == 3:
    (folder / "finished.json").write_text("{}")
"""


@pytest.fixture
def fake_job(tmp_path):
    """Maker of a run that sleeps: fake_job("a", 0.1); with fails=True it ends without being finished."""

    def make(key: str, seconds: float, fails: bool = False) -> runs.Job:
        folder = tmp_path / key
        extra = ["fails"] if fails else []
        return runs.Job(key, folder, [sys.executable, "-c", FAKE_RUN, str(folder), str(seconds), *extra])

    return make


@pytest.fixture
def logger():
    return logging.getLogger("test_experiments")


def test_jobs_run_in_parallel_and_each_is_recorded_once(fake_job, logger):
    jobs, recorded = [fake_job(str(index), 0.3) for index in range(4)], []
    assert runs.run_all(jobs, 4, lambda job: recorded.append(job.key), logger)
    assert sorted(recorded) == ["0", "1", "2", "3"]
    seconds = json.loads((jobs[0].folder / runs.CPU_SECONDS).read_text())["cpu_seconds"]
    assert 0 < seconds < 30


def test_processor_time_adds_up_over_interruptions(fake_job, logger):
    job = fake_job("a", 0)
    job.folder.mkdir()
    (job.folder / runs.CPU_SECONDS).write_text('{"cpu_seconds": 1000.0}')
    assert runs.run_all([job], 1, lambda job: None, logger)
    assert 1000 < json.loads((job.folder / runs.CPU_SECONDS).read_text())["cpu_seconds"] < 1030


def test_a_failed_run_stops_the_others_and_names_its_output(fake_job, logger):
    slow, failing = fake_job("slow", 600), fake_job("failing", 0.5, fails=True)
    with pytest.raises(UserError) as error:
        runs.run_all([slow, failing], 2, lambda job: pytest.fail("nothing finished"), logger)
    assert str(error.value) == (
        f"run failing ended with status 0: last line; its output is in {str(failing.log)!r}, "
        "repeat the command to go on"
    )
    assert slow.process.returncode == 0 and not slow.finished  # it was asked to stop, and has gone


def test_a_signal_stops_the_runs_and_reports_that_not_all_are_done(fake_job, logger):
    job, waiting = fake_job("slow", 600), fake_job("waiting", 600)

    def interrupt():
        while not (job.folder / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert not runs.run_all([job, waiting], 1, lambda job: pytest.fail("nothing finished"), logger)
    assert job.process.returncode is not None and waiting.process is None
