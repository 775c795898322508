import errno
import os
import subprocess
import sys
import time

import pytest

from vpmoe.cli import check, main
from vpmoe.errors import ConfigError

HEAVY = ("torch", "transformers", "megatron", "matplotlib", "numpy", "pyarrow")


def _vpmoe(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "vpmoe", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def _said(capsys, *words):
    code = main.run(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_is_quick_and_leaves_the_heavy_packages_alone():
    program = (
        "import sys\n"
        "from vpmoe.cli.main import run\n"
        "run(['--help'])\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - begin)
        assert done.stderr == "[]\n"
    print(f"vpmoe --help: {min(seconds):.2f} s")
    assert min(seconds) < 0.5
    for verb in main.ORDER:
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize("verb", [[verb] for verb in main.ORDER] + [["data", "build"]])
def test_every_verb_explains_itself(capsys, verb):
    code, out, err = _said(capsys, *verb, "--help")
    assert code == 0
    assert out.startswith(f"Usage: vpmoe {' '.join(verb)}")
    assert err == ""


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["chek"], "vpmoe has no command 'chek'", "did you mean check?"),
        (["data", "biuld"], "vpmoe data has no command 'biuld'", "did you mean build?"),
        (["data"], "missing command", "commands: build, show, verify"),
        (["check", "a.toml", "--jsn"], "vpmoe check has no option --jsn", "did you mean --json?"),
        (["--wat"], "vpmoe has no option --wat", "see: vpmoe --help"),
        (["count"], "vpmoe count needs CONFIG", "usage: vpmoe count [OPTIONS]"),
        (["check", "a=1", "b.toml"], "'b.toml' stands after 'a=1'", "files come first"),
        (["check", "a=1"], "no config file given", "e.g. configs/models/tiny.toml"),
        (["data", "show", "d", "--example", "x"], "invalid value for '--example'", "see: vpmoe"),
    ],
)
def test_wrong_usage_is_one_error_one_hint_and_exit_code_2(capsys, words, error, hint):
    code, out, err = _said(capsys, *words)
    lines = err.splitlines()
    assert (code, out, len(lines)) == (2, "", 2)
    assert lines[0].startswith(f"error: {error}")
    assert lines[1].startswith(f"hint: {hint}")


def test_no_words_print_the_help_as_wrong_usage(capsys):
    code, out, _ = _said(capsys)
    assert (code, out.splitlines()[0]) == (2, "Usage: vpmoe [OPTIONS] COMMAND [ARGS]...")


def _failing(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(check, "split_words", fail)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x.bin"),
            1,
            "error: /data/x.bin: no space left on device\nhint: free some space, or write",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data"),
            1,
            "error: /data: permission denied\nhint: check the permissions",
        ),
        (
            ZeroDivisionError("no\nway"),
            1,
            "error: vpmoe itself failed: ZeroDivisionError: no way\n",
        ),
        (
            ConfigError([("one", "do a"), ("two", ""), ("three", "do c")]),
            1,
            "error: one\nhint: do a\nerror: two\nerror: three\nhint: do c\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_every_error_ends_in_words(capsys, monkeypatch, error, code, said):
    _failing(monkeypatch, error)
    got, out, err = _said(capsys, "check", "a.toml")
    assert (got, out) == (code, "")
    assert err.startswith(said)
    assert "Traceback" not in err


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch):
    _failing(monkeypatch, ZeroDivisionError("no way"))
    for words in (["--debug", "check", "a.toml"], ["check", "a.toml", "--debug"]):
        with pytest.raises(ZeroDivisionError):
            main.run(words)


def test_no_color_codes_unless_stderr_is_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert _said(capsys, "chek")[2].startswith("\033[1;31merror:\033[0m ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert _said(capsys, "chek")[2].startswith("error: ")


def test_a_reader_that_leaves_early_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "vpmoe", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert done.stderr == ""


def test_module_and_script_are_the_same_program():
    assert _vpmoe("--version").stdout == "vpmoe 0.1.0\n"
    assert _vpmoe("chek").returncode == 2
