import doctest
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_tour_happens_as_told(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    failed, attempted = doctest.testfile(
        str(REPOSITORY / "docs" / "tour.md"), module_relative=False
    )
    assert failed == 0
    assert attempted > 40
