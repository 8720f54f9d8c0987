"""What a person sees of a mistake: one line, an exit code, no traceback."""

from __future__ import annotations

import errno
import subprocess
import sys
import types

import pytest

from fastav import __main__ as entry
from fastav.core.command_runner import run
from fastav.core.errors import FastavError, MediaError, Stopped, TooManyBroken, UserError, did_you_mean


@pytest.fixture
def verb(monkeypatch):
    """A module with the shape of a verb; returns a function that runs it with a given main."""

    def call(main, words=(), overrides=False):
        module = types.ModuleType("fake_verb", "A verb for tests.")
        module.OVERRIDES = overrides
        module.add_arguments = lambda parser: (
            parser.add_argument("where", nargs="?"),
            parser.add_argument("--size", type=int),
        )
        module.main = main
        monkeypatch.setitem(sys.modules, "fake_verb", module)
        return run("fake", "fake_verb", words)

    return call


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("wrong key"), 2),
        (TooManyBroken("7 of 9"), 3),
        (Stopped("SIGTERM"), 75),
        (FastavError("disk full"), 1),
    ],
)
def test_each_error_is_one_line_with_its_exit_code(verb, capsys, error, code):
    def main(args):
        raise error

    assert verb(main) == code
    printed = capsys.readouterr().err
    assert printed == f"fastav: {error}\n"


def test_a_full_disk_anywhere_is_one_line(verb, capsys):
    def main(args):
        raise OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")

    assert verb(main) == 1
    assert capsys.readouterr().err == "fastav: run/metrics.jsonl: cannot write: No space left on device\n"


def test_debug_shows_the_traceback_too(verb, capsys):
    def main(args):
        raise UserError("wrong key")

    assert verb(main, ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_programming_error_is_not_hidden(verb):
    def main(args):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        verb(main)


def test_a_misspelt_flag_names_the_nearest(verb, capsys):
    assert verb(lambda args: 0, ["--siez", "3"]) == 2
    assert 'did you mean "--size"?' in capsys.readouterr().err


def test_a_wrong_type_of_a_flag_is_named(verb, capsys):
    assert verb(lambda args: 0, ["--size", "big"]) == 2
    printed = capsys.readouterr().err
    assert "--size" in printed
    assert "'big'" in printed
    assert printed.count("\n") == 1


def test_overrides_are_kept_apart_from_the_verbs_own_words(verb):
    seen = {}

    def main(args):
        seen.update(vars(args))
        return 0

    assert verb(main, ["place", "--optim.lr", "1e-4", "--model.fusion.kind=late"], overrides=True) == 0
    assert seen["where"] == "place"
    assert seen["overrides"] == ["--optim.lr", "1e-4", "--model.fusion.kind=late"]


def test_the_main_entry_lists_verbs_and_names_the_nearest(capsys):
    assert entry.main([]) == 2
    assert entry.main(["--help"]) == 0
    assert "synth" in capsys.readouterr().out
    assert entry.main(["trian"]) == 2
    assert 'did you mean "train"?' in capsys.readouterr().err
    assert entry.main(["--version"]) == 0


def test_as_a_process_the_mistake_is_one_line_on_stderr():
    done = subprocess.run(
        [sys.executable, "-m", "fastav", "recipe", "show", "no_such.toml"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fastav: no_such.toml: no such recipe")
    assert done.stderr.count("\n") == 1


def test_did_you_mean_lists_few_options_and_stays_silent_over_many():
    assert did_you_mean("lrr", ["lr", "betas"]) == '; did you mean "lr"?'
    assert did_you_mean("zzz", ["b", "a"]) == "; known: a, b"
    assert did_you_mean("zzz", map(str, range(100))) == ""


def test_media_error_is_one_line_even_when_the_reason_is_not():
    error = MediaError("a.mp4", "moov atom\n not found", "probe")
    assert str(error) == "a.mp4: probe: moov atom not found"


def test_every_public_name_is_there_and_help_does_not_wait_for_torch():
    import fastav

    for name in fastav.__all__:
        assert getattr(fastav, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute"):
        _ = fastav.AVModle
    script = "import sys, fastav.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60).returncode == 0
