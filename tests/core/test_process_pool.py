"""Jobs in processes: all results, in spite of jobs that kill their process or hang, and never too far ahead."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial

import pytest

from fastav.core.process_pool import run_jobs


def work(mode, job):
    if job == 3 and mode == "dies":
        os._exit(1)
    if job == 3 and mode == "hangs":
        time.sleep(600)
    if job == 3 and mode == "raises":
        raise ValueError("three")
    return job * job


@pytest.mark.parametrize("mode", ["works", "dies", "hangs"])
def test_every_job_has_an_outcome(mode):
    done = sorted(run_jobs(range(8), partial(work, mode), 2, patience_s=4.0), key=lambda d: d.number)
    assert [d.job for d in done] == [d.number for d in done] == list(range(8))
    bad = mode != "works"
    assert [d.result for d in done] == [None if bad and i == 3 else i * i for i in range(8)]
    assert [d.died for d in done] == [bad and i == 3 for i in range(8)]


def test_what_a_job_raises_ends_it_all():
    with pytest.raises(ValueError, match="three"):
        list(run_jobs(range(8), partial(work, "raises"), 1))


def wait_for(folder, job):
    while job == 0 and not (folder / "go").exists():
        time.sleep(0.01)
    (folder / f"begun-{job}").touch()
    return job


def test_jobs_are_not_begun_too_far_ahead(tmp_path):
    seen = []
    for done in run_jobs(range(30), partial(wait_for, tmp_path), 2, ahead=5):
        seen.append(done.number)
        if len(seen) == 4:
            time.sleep(0.3)
            assert not [p for p in tmp_path.glob("begun-*") if int(p.name[6:]) > 6]
            (tmp_path / "go").touch()
    assert sorted(seen) == list(range(30))


_UNGUARDED = """
import os
import subprocess
import sys
from fastav.core.process_pool import run_jobs
print([done.result for done in run_jobs([1, 2], abs, 1)])
"""


def test_a_script_that_does_not_guard_its_code_is_told(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(_UNGUARDED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]
