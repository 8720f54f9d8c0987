"""Command-line runner: every error is one line on stderr and an exit code; `--debug` adds the traceback."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fastav.core.errors import FastavError, UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` with one line and the nearest match.

    Attributes:
        words: The arguments after the verb, for verbs whose options depend on them.
    """

    words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` instead of printing the usage and exiting."""
        options = [word for action in self._actions for word in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        near = did_you_mean(unknown[1].split("=")[0], options) if unknown else ""
        choice = re.search(r"invalid choice: '?([^' ]+)'? \(choose from (.*)\)", message)
        if choice:
            near = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
            message = message[: choice.start()] + f'"{choice[1]}" is unknown'
        raise UserError(f"{self.prog}: {message}{near} (see {self.prog} --help)")


def run(verb: str, module_name: str, argv: Sequence[str]) -> int:
    """Runs one verb.

    The verb's module defines `add_arguments(parser)` and `main(args) -> int`. If it also sets `OVERRIDES = True`,
    options such as `--optim.lr 1e-4` are collected in `args.overrides` as recipe keys.

    Args:
        verb: Name of the verb on the command line.
        module_name: Module of the verb; imported by this call.
        argv: Arguments after the verb.

    Returns:
        The exit code: 0 for success, 2 for a user error, 3 for too many broken clips, 75 if a signal stopped the run
        after a checkpoint, 130 for Ctrl-C, 1 for any other failure. Launchers replace exit codes by their own, so the
        code is also written to `$FASTAV_EXIT_CODES/rank_<RANK>` if that variable names a folder.
    """
    code = _run(verb, module_name, argv)
    if folder := os.environ.get("FASTAV_EXIT_CODES"):
        with contextlib.suppress(OSError):  # a full disk must not hide the exit code
            Path(folder, f"rank_{os.environ.get('RANK', '0')}").write_text(f"{code}\n")
    return code


def _run(verb: str, module_name: str, argv: Sequence[str]) -> int:
    words = [word for word in argv if word != "--debug"]
    debug = len(words) != len(argv)
    try:
        module = importlib.import_module(module_name)
        parser = Parser(
            prog=f"fastav {verb}", description=module.__doc__, formatter_class=argparse.RawTextHelpFormatter
        )
        parser.words = words
        module.add_arguments(parser)
        overrides: list[str] = []
        if getattr(module, "OVERRIDES", False):
            parser.epilog = "Every recipe key is also an option: --optim.lr 1e-4 (see `fastav recipe explain`)."
            words, overrides = split_overrides(words, lambda word: word != "--help")
        args = parser.parse_args(words)
        args.overrides = overrides
        return int(module.main(args))
    except FastavError as error:
        if debug:
            traceback.print_exc()
        print(f"fastav: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fastav: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        return 1
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"fastav: {where}cannot write: {error.strerror}", file=sys.stderr)
        return 1


def split_overrides(words: Sequence[str], is_key: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Separates recipe overrides (`--key value`, `--key=value`) from a verb's own arguments.

    Args:
        words: All arguments after the verb.
        is_key: Returns True if an option, such as `--optim.lr`, is a recipe key.

    Returns:
        The verb's own arguments, and the overrides.
    """
    kept: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or not is_key(word):
            kept.append(word)
            continue
        overrides.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return kept, overrides
