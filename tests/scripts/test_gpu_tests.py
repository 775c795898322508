"""The list of GPU tests: counted by file from a JUnit report."""

import pytest
from scripts.gpu_tests import gpu_tests, keep, outcomes

REPORT = """<testsuites><testsuite time="3.5">
<testcase classname="tests.kernels.test_router" name="a"/>
<testcase classname="tests.kernels.test_router" name="b"><failure message="no"/></testcase>
<testcase classname="tests.kernels.test_router.TestClass" name="c"><error message="no"/></testcase>
<testcase classname="tests.train.test_gpu" name="d"><skipped message="one GPU"/></testcase>
</testsuite></testsuites>"""


def test_every_outcome_is_counted_with_its_file(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    found = outcomes(report)
    assert dict(found["tests/kernels/test_router.py"]) == {"passed": 1, "failed": 2}
    assert dict(found["tests/train/test_gpu.py"]) == {"skipped": 1}


def test_the_page_has_sums_and_names_what_was_not_there():
    one = {"file": "tests/kernels/test_router.py", "passed": 4, "failed": 1, "skipped": 0}
    two = {"file": "tests/train/test_gpu.py", "passed": 2, "failed": 0, "skipped": 3}
    about = {"device": "a GPU", "torch": "2", "date": "today", "seconds": 9.0}
    rows = []
    text = gpu_tests({**about, "files": [one, two]}, lambda head, lines: rows.extend(lines) or "T")
    assert rows[-1] == ["all", 6, 1, 3]
    assert "a GPU" in text and "tests/kernels/test_fused.py" in text
    assert "test_router.py," not in text


def test_nothing_is_kept_where_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "report.xml").write_text(REPORT)
    with pytest.raises(SystemExit, match="no GPU"):
        keep(tmp_path / "report.xml", 1.0)
