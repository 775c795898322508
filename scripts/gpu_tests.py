"""Keep the last result of the GPU tests, file by file, for docs/performance.md.

make test-gpu                                      runs them and calls this
python scripts/gpu_tests.py reports/gpu-tests.xml  keeps what a JUnit report says
"""

import json
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "gpu-tests.json"
OUTCOMES = ("passed", "failed", "skipped")


def outcomes(report: Path) -> dict[str, Counter[str]]:
    """How many tests of each file passed, failed or were skipped."""
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module = str(case.get("classname", "")).split(".")
        while module and not (REPOSITORY / Path(*module)).with_suffix(".py").exists():
            module.pop()  # a class of tests
        name = f"{'/'.join(module)}.py" if module else str(case.get("classname"))
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        found.setdefault(name, Counter())["skipped" if "skipped" in kinds else outcome] += 1
    return found


def keep(report: Path, seconds: float) -> dict[str, Any]:
    """Write the results with the device they are of; what is said of it."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("no GPU: nothing was tested that could be kept")
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(seconds, 1),
    }
    files = [
        {"file": name, **{kind: counts[kind] for kind in OUTCOMES}}
        for name, counts in sorted(outcomes(report).items())
    ]
    RESULTS.write_text(json.dumps({**about, "files": files}, indent=1) + "\n", encoding="utf-8")
    return {**about, "files": files}


def gpu_tests(found: dict[str, Any], table: Callable[[list[str], list[list[Any]]], str]) -> str:
    """The section of docs/performance.md."""
    rows = [[one["file"], *(one[kind] for kind in OUTCOMES)] for one in found["files"]]
    sums = [sum(one[kind] for one in found["files"]) for kind in OUTCOMES]
    listed = {one["file"] for one in found["files"]}
    missing = sorted(marked() - listed)
    lines = [
        "## GPU tests",
        f"`make test-gpu`, {found['device']}, torch {found['torch']}, {found['date']}: "
        f"{found['seconds']:.0f} s. Values and gradients against float64 references, among "
        "others, by file:",
        table(["file", *OUTCOMES], [*rows, ["all", *sums]]),
    ]
    if missing:
        lines.append(f"With tests of which none was there then: {', '.join(missing)}.")
    return "\n\n".join(lines)


def marked() -> set[str]:
    """Files of tests that mark some for a GPU themselves."""
    return {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.gpu\b", path.read_text(encoding="utf-8"))
    }


def main() -> None:
    """Keep a report's results."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    report = Path(sys.argv[1])
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    found = keep(report, sum(float(suite.get("time", 0)) for suite in suites))
    failed = sum(one["failed"] for one in found["files"])
    print(f"{RESULTS.relative_to(REPOSITORY)} written, {failed} failed")


if __name__ == "__main__":
    main()
