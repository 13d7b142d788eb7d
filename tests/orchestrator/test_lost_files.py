"""Files that cannot be written, or disappear, while a sweep runs: told as they are, and nothing is promised falsely."""

import re
import shutil

import pytest

from tests.support.commands import ONE_TRIAL, SweepCommand, wait_for
from tests.support.storage import running_trial

pytestmark = pytest.mark.ray


def test_a_trials_folder_removed_in_mid_run_and_a_report_that_cannot_be_written_are_told(tmp_path, text_folder):
    storage = tmp_path / "runs"
    report = storage / "sweeps" / "mine" / "report"
    report.parent.mkdir(parents=True)
    report.write_text("a file where the report's folder would be")
    flags = ("--name", "mine", "--data", str(text_folder), "--steps", "2000", "--max-failures", "0")
    process = SweepCommand(storage, "convergence", *ONE_TRIAL, *flags).start()
    record = wait_for(lambda: running_trial(storage, 2), process, "step 2")
    shutil.rmtree(record.journal.path.parent)

    output, _ = process.communicate(timeout=400)

    assert process.returncode == 1, output
    words = " ".join(output.split())
    assert "failed: full 1024: " in words and "was removed while it trained" in words
    assert "note: the report could not be written" in words
    assert not re.search(r"^report: ", output, re.M) and "Traceback" not in output
    assert report.read_text() == "a file where the report's folder would be"
