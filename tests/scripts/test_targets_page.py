"""The measured parts of docs/targets.md: numbers are the files', and a stale page is noticed."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import targets_page
from performance import load

NETWORK = "network, held out"


def codec(name: str, size: float, kl: float | None, error: float = 0.5, ids: float = 64.0) -> dict:
    sizes = {"bytes_per_token": size, "kl_nats": kl, "gradient_error": error, "entries": ids}
    return {"name": name, **sizes}


def at_error(size: float, error: float, ids: float, *, kl: float = 0.25) -> dict:
    ours = {"bytes_per_token": size, "kl_nats": kl, "gradient_error": error, "entries": ids}
    its = {"its_kl_nats": 0.375, "its_bytes_per_token": 346.0, "its_gradient_error": 0.0625}
    return ours | its


def frontier(even: float) -> dict:
    """A teacher on which an even tail takes so many bytes."""
    codecs = [
        codec("top-64", 274.0, 0.5), codec("set-64", 178.25, 0.500004),
        codec("adaptive 0.005", even + 10, 0.125), codec("sampled, 50 draws", 40.0, None),
        codec("DistillKit", 346.0, 0.375, 0.0625, 128.0),
    ]  # fmt: skip
    near = {"DistillKit": at_error(even, 0.03125, 77.0)}
    return {"places": 8, "entropy_nats": 2.5, "codecs": codecs, "adaptive_at_the_error_of": near}


@pytest.fixture
def found() -> dict:
    demo = [codec("adaptive 0.005", 4.75, 0.00005), codec("DistillKit budget", 129.0, 0.00001)]
    few = {"places": 8, "entropy_nats": 0.125, "codecs": demo}
    many = {"demo teacher": few, "n-gram model, held-out text": frontier(41.5)}
    return {
        **load("target-codecs"), "frontiers": {**many, NETWORK: frontier(99.5)},
        "ranking": {"bytes_a_file": 1_234, "bytes_per_token": 0.5, "counted_labels": 98_765},
    }  # fmt: skip


def with_prior(found: dict) -> dict:
    for name, size in (("n-gram model, held-out text", 9.25), (NETWORK, 21.5)):
        of = found["frontiers"][name]
        of["codecs"] += [codec("prior 0.03", 17.0, 0.3125), codec("prior 0.01", 33.0, 0.1875)]
        of["adaptive_prior_at_the_error_of"] = {"DistillKit": at_error(size, 0.09375, 7.0)}
        others = {"DistillKit": {"kl_nats": 0.2, "gradient_error": 0.0321}}
        of["others_beside_a_prior"] = others | {"top-64": {"kl_nats": 0.4, "gradient_error": 0.5}}
    return found


def section(found: dict) -> str:
    """The section without the ends of its lines."""
    text = targets_page.measured(found, load("codec-teacher"), load("teacher-packing"))
    return " ".join(text.split())


def test_an_even_tail_holds_the_bar_where_its_bytes_are_within_it(found):
    text = section(found)
    assert "| DistillKit recommended, 346 bytes | even | **41.5** | 99.5 |" in text
    assert "it holds on n-gram held-out text (41.5); **it is missed** on network held out" in text
    assert "is larger than DistillKit's on 0 of 2 teachers." in text
    assert "1,234 bytes in each file are 0.50 per token" in text and "98,765 trained" in text
    assert "takes 4.8 bytes for a KL of 0.000050" in text and "takes 129 for 0.000010." in text


def test_a_prior_that_was_not_measured_is_said_to_be_missing(found):
    assert "is not in the file of results: not measured." in section(found)
    assert "If others shared" not in section(found)
    assert "| not measured |" in targets_page.overview(found)


def test_a_prior_stands_beside_the_even_tail(found):
    text = section(with_prior(found))
    assert "| DistillKit recommended, 346 bytes | prior | **9.2** | **21.5** |" in text
    assert 'With `tail = "prior"` it holds on all of them: n-gram held-out text (9.2) and' in text
    assert "on 2 of 2 teachers: n-gram held-out text (0.0938 against 0.0625) and network" in text
    assert "Fewer ids are named, 7 where DistillKit names 128" in text
    assert "is estimated: from 200 draws" in text and "not measured" not in text
    assert "| 9 to 22 at DistillKit's error |" in targets_page.overview(found)


def test_others_are_shown_with_the_same_tail(found):
    text = section(with_prior(found))
    assert "| DistillKit recommended | 346 | 0.3750, 0.2000 | 0.3750, 0.2000 |" in text
    assert "| DistillKit recommended, gradient's error | 346 | 0.0625, 0.0321 |" in text
    assert "setting would go from 0.3750 to 0.2000 on network held out. In the table" in text
    assert (
        "| adaptive, `tail` prior, as low a KL | in brackets | 0.1875 (33) | 0.1875 (33) |" in text
    )


def test_an_error_that_is_not_reached_holds_no_bar(found):
    missed = at_error(30.0, 0.03125, 256.0, kl=0.5)
    found["frontiers"][NETWORK]["adaptive_at_the_error_of"] = {"DistillKit": missed}
    text = section(found)
    assert "| even | **41.5** | not reached |" in text
    assert "**it is missed** on network held out (not reached)" in text


def test_a_stale_page_is_noticed_and_mended(found, tmp_path, monkeypatch, capsys):
    page = tmp_path / "targets.md"
    page.write_text(targets_page.PAGE.read_text())
    monkeypatch.setattr(targets_page, "PAGE", page)
    targets_page.main([])
    assert targets_page.main(["--check"]) == 0
    page.write_text(page.read_text().replace("178.25 for K = 64", "178.5 for K = 64"))
    assert targets_page.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().out and "178.5 for" in page.read_text()
    files = {"target-codecs": with_prior(found)}
    monkeypatch.setattr(targets_page, "load", lambda name: files.get(name) or load(name))
    assert targets_page.main([]) == 0 and targets_page.main(["--check"]) == 0
    assert "| 9 to 22 at DistillKit's error |" in page.read_text()
    assert "## How the small codecs work" in page.read_text()


def test_a_page_without_its_markers_is_refused():
    with pytest.raises(SystemExit, match="wants the markers of measured once"):
        targets_page.filled("# Targets\n", {"measured": "text"})
