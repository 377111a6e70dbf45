"""What the commands share: their help, how they end, and how they print.

The help of a command shows its own flags; --helpfull shows those of the libraries besides.

An expected error (a flag or value that is refused, a file that is not there, a disk that is full) is told in a sentence
on the standard error, and the exit code is 1; --traceback shows where it arose. Any other error keeps its traceback.
Where the reader of the output goes away (`| head -1`), the command ends without a word, with the exit code that a shell
gives for that, 141.
"""

import codecs
import dis
import functools
import inspect
import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from absl import app, flags

TRACEBACK = "traceback"
flags.DEFINE_bool(TRACEBACK, False, "show where an expected error arose, not its message alone")

_HELP = ("--help", "-help", "-h", "--helpshort")
CLOSED_OUTPUT = 141  # 128 + SIGPIPE.

_AS_THEY_ARE = "vir_jax.as_they_are"


def run(main: Callable[[list[str]], int | None], *, required: Sequence[str] = ()) -> None:
    """Run a command: parse the flags, call `main` with the other arguments, exit with the code that it returns.

    Args:
      main: its module's docstring is what the help begins with.
      required: flags that have to be given.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_AS_THEY_ARE)
    if any(argument in _HELP for argument in sys.argv[1:]):
        write_line("\n".join(help_lines(main.__module__, required)))
        return
    try:
        app.run(functools.partial(_run, main), flags_parser=functools.partial(_parse_flags, required))
    except Exception as error:
        if not is_foreseen(error):
            raise
        _end(error)


def _run(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    try:
        return main(argv)
    except app.UsageError as error:  # absl would print all of the help.
        _end(error)


def write_line(line: str, file: TextIO | None = None) -> None:
    """Print a line at once; leave the program where nobody reads any more."""
    try:
        print(line, file=file, flush=True)
    except BrokenPipeError:
        # Python flushes the stream once more as it ends: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())
        sys.exit(CLOSED_OUTPUT)


def help_lines(module: str, required: Sequence[str] = ()) -> Iterator[str]:
    """Yield what --help prints: a command's docstring and flags, then those that it shares with others.

    Args:
      module: of the command.
      required: flags that have to be given.
    """
    yield inspect.cleandoc(sys.modules[module].__doc__ or "")
    yield "\nflags:"
    defined = flags.FLAGS.flags_by_module_dict()
    own = [flag for name in (module, sys.argv[0]) for flag in defined.get(name, ())]
    shared = [
        flag for name in defined if name != module and name.startswith("vir_jax.") for flag in defined[name]
    ]
    for flag in [*sorted(own, key=lambda flag: flag.name not in required), *shared]:
        yield textwrap.fill(_described(flag, required), 110, initial_indent="  ", subsequent_indent="      ")
    yield "\n--helpfull shows the flags of the libraries, too."


def _described(flag: flags.Flag[Any], required: Sequence[str]) -> str:
    if flag.name in required:
        return f"--{flag.name}: {flag.help} (required)"
    if flag.boolean:
        return f"--[no]{flag.name}: {flag.help}"
    default = "" if flag.default in (None, []) else f" (default: {str(flag.default_as_str).strip(chr(39))})"
    return f"--{flag.name}: {flag.help}{default}"


def is_foreseen(error: BaseException) -> bool:
    """Return whether the message of an error says all that a user needs.

    So it is where the system refuses something (no such file, no space left), and where the project's own code raised
    the error on purpose. A ValueError from the depths of a library is none of these.
    """
    if isinstance(error, OSError):
        return True
    trace = _origin(error)
    if trace is None or not _is_ours(trace):
        return False
    # A `raise`, not an operation that failed.
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _origin(error: BaseException) -> TracebackType | None:
    """Return the innermost entry of an error's traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _is_ours(trace: TracebackType) -> bool:
    return trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("vir_jax", "__main__")


def _parse_flags(required: Sequence[str], arguments: list[str]) -> list[str]:
    try:
        others = flags.FLAGS(arguments)
        missing = [f"--{name}" for name in required if flags.FLAGS[name].value is None]
        if missing:
            raise app.UsageError(f"{' and '.join(missing)} must be given; --help shows all flags")
        return others
    except (app.UsageError, flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        _end(error)


def _end(error: BaseException) -> NoReturn:
    """Tell an error in a sentence, or, if asked to, with its traceback; exit with 1."""
    # A flag before this one may be what is wrong.
    if flags.FLAGS[TRACEBACK].value or f"--{TRACEBACK}" in sys.argv:
        raise error
    print(f"{Path(sys.argv[0]).name}: {_sentence(error)}", file=sys.stderr)
    sys.exit(1)


def _sentence(error: BaseException) -> str:
    """Return what an error says, without what libraries wrap around it."""
    text, wrapped, _ = str(error).partition("Error whilst parsing config file")
    if wrapped:  # by ml_collections, with a traceback
        while error.__context__ is not None:
            error = error.__context__
        return f"{text}{error}"
    if isinstance(error, AttributeError) and error.args and isinstance(error.args[0], KeyError):
        said = " ".join(str(error.args[0].args[0]).split())  # of a config, by ml_collections
        return said if said.startswith("no field") else f"no field {said}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    trace = _origin(error)
    return text if trace is not None and _is_ours(trace) else " ".join(text.split())


def _as_they_are(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode names that are no text by their bytes, and what the encoding lacks as \\uXXXX."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(_AS_THEY_ARE, _as_they_are)
