"""The README's commands are run, in a folder of their own and with budgets of seconds."""

import io
import re
import shlex
from pathlib import Path

import pytest

from vpmoe.cli import main
from vpmoe.data.problems import generate, write_problems

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>.*?) -->\n)?```bash\n(?P<lines>.*?)```", re.DOTALL)
CHEAP = {
    "train": "budget.steps=2 batch.seq_len=128 batch.global_batch_size=2 batch.micro_batch_size=2"
    " student.num_layers=4 valid.documents=2 threads=1",
    "eval": "documents=2 prompts=2 sampling.max_new_tokens=4 unigram=false",
    "chat": "--max-new-tokens 4",
}
BLOCKS = [(match["needs"], match["lines"]) for match in BLOCK.finditer(README)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the repository's configs and a parquet file in SYNTH's schema."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    write_problems(folder / "synth.parquet", generate(600, seed=3))
    return folder


def _title(block):
    return block[1].splitlines()[0]


@pytest.mark.parametrize("block", BLOCKS, ids=_title)
def test_commands_do_what_the_readme_says(block, desk, capsys, monkeypatch):
    needs, lines = block
    if needs:
        pytest.skip(f"needs {needs}")
    monkeypatch.chdir(desk)
    for line in lines.strip().splitlines():
        said, _, command = line.rpartition(" | ")
        words = shlex.split(command.replace("$SYNTH", str(desk / "synth.parquet")))
        assert words[0] == "vpmoe"
        text = shlex.split(said)[1] if said else ""
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{text}\n"))
        code = main.run([*words[1:], *CHEAP.get(words[1], "").split()])
        assert (line, code, capsys.readouterr().err) == (line, 0, "")


def test_the_readme_is_short_and_starts_quickly():
    lines = README.splitlines()
    assert len(lines) < 150
    assert lines.index("make demo") < 30


def test_every_link_and_path_exists():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    paths = re.findall(r"`((?:configs|docs|examples|scripts)/[\w./-]*)`", README)
    missing = [name for name in links + paths if not (REPOSITORY / name).exists()]
    assert missing == []


def test_every_verb_is_named():
    assert [verb for verb in main.ORDER if f"vpmoe {verb}" not in README] == []
