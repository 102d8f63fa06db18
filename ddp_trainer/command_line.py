"""Parses a command line into a checked configuration, and turns the errors of a command into its exit status.

tyro generates the flags from the fields and docstrings of a configuration. A mistake in a command line raises
InputError with a one-line message, which `run_command` prints.
"""

import argparse
import contextlib
import dataclasses
import errno
import io
import re
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import tyro

from data_prep.errors import ExplainedError, InputError, printable
from data_prep.files import DISK_FULL
from data_prep.machine_limits import lacks_memory
from data_prep.streams import forgiving_output, output_error
from ddp_trainer.config import DEFAULT_WIDTHS, TrainConfig
from ddp_trainer.distributed.launch import prints_errors
from ddp_trainer.recipes import RECIPES

Section = TypeVar("Section")
DISK_ERRORS = {*DISK_FULL, errno.EROFS, errno.EIO}
# What to do if there is not enough memory: for any command, and for a command that trains.
FREE_MEMORY = "close other programs, or raise the memory limit"
SMALLER_STEPS = "use --accumulate auto, or a smaller --batch-size"

_replacing_stderr = threading.Lock()  # held while `parse_flags` replaces sys.stderr, which all threads share


def parse_command_line(argv: Sequence[str], *, prog: str, description: str) -> TrainConfig:
    """The configuration that `[RECIPE] [--flag value ...]` describes.

    Raises InputError for an unknown recipe, an unknown flag or an invalid value. `--help` prints the help text and
    exits with status 0.
    """
    recipe, arguments = take_recipe(argv)
    return parse_flags(TrainConfig, arguments, prog=f"{prog} [RECIPE]", description=description, default=recipe)


def take_recipe(argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The recipe that the first argument names (default: baseline), and the remaining arguments.

    The recipe is adapted to the network that --network selects. Raises InputError for an unknown recipe.
    """
    arguments = list(argv)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "baseline"
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--network", nargs="?")
    network = parser.parse_known_args(arguments)[0].network
    return adapt_to_network(recipe_named(name), network), arguments


def recipe_named(name: str) -> TrainConfig:
    """The recipe called `name`. Raises InputError if there is none."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe '{name}'; choose from {', '.join(RECIPES)}")
    return RECIPES[name]


def adapt_to_network(recipe: TrainConfig, network: str | None, *, original: TrainConfig | None = None) -> TrainConfig:
    """`recipe` without the values that fit only its own network, if --network names another one.

    `network`: the value of --network; None: --network is not given. The result does not contain it yet. With another
    network, --widths and --freeze-late get their defaults. A value that differs from that of `original`, the recipe
    from which `recipe` was derived, is kept.
    """
    if network in (None, recipe.network.network):
        return recipe
    original, network_settings, schedule = original or recipe, recipe.network, recipe.schedule
    if network_settings.widths == original.network.widths:
        network_settings = dataclasses.replace(network_settings, widths=DEFAULT_WIDTHS)
    if schedule.freeze_late == original.schedule.freeze_late:
        schedule = dataclasses.replace(schedule, freeze_late="")
    return dataclasses.replace(recipe, network=network_settings, schedule=schedule)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags: {"batch_size": 64, "compile": True} -> ["--batch-size", "64", "--compile"]."""
    words: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", str(value)]
    return words


def parse_flags(
    section: type[Section],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None = None,
    default: Section | None = None,
) -> Section:
    """An instance of the configuration dataclass `section`, from the flags in `argv` (None: sys.argv[1:]).

    Raises InputError for an unknown flag or an invalid value.
    """
    argv = sys.argv[1:] if argv is None else argv
    _refuse_values_of_switches(section, argv)
    report = io.StringIO()
    try:
        with _replacing_stderr, contextlib.redirect_stderr(report):
            parsed = tyro.cli(
                section,
                args=argv,
                default=default,
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
            assert parsed is not None
            return parsed
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{_one_line(report.getvalue())} (--help lists the flags)") from None


def stderr() -> TextIO:
    """sys.stderr, even if another thread calls `parse_flags` at the same time."""
    with _replacing_stderr:
        return sys.stderr


def _refuse_values_of_switches(section: type, argv: Sequence[str]) -> None:
    """Raises InputError if an on/off flag has a value, as in `--sync-bn=True`.

    tyro would reject such a value, too, but its message does not say what to write instead.
    """
    switches = set(_switches(section))
    for word, after in zip(argv, [*argv, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("_", "-").removeprefix("no-")
        if not equals and after.lower() in ("true", "false"):
            value = after
        if flag.startswith("--") and name in switches and value:
            is_on = (value.lower() not in ("false", "no", "off", "0")) != flag.startswith("--no-")
            given = f"{flag}={value}" if equals else f"{flag} {value}"
            raise InputError(f"{flag} takes no value, got {given}; write --{'' if is_on else 'no-'}{name}")


def _switches(section: type) -> Iterator[str]:
    """Names of the on/off flags of a configuration and its sections, such as sync-bn."""
    for field in dataclasses.fields(section):
        kind: Any = field.type
        if kind is bool:
            yield field.name.replace("_", "-")
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _switches(kind)


def _one_line(report: str) -> str:
    """The first message of tyro's error report, as one line. The report has several lines, a frame and a title."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", report)
    plain = re.sub(r"\A.*\n *-{9,} *$|-{9,}", " ", plain, flags=re.MULTILINE)  # the frame, if stdout is not UTF-8
    text = " ".join(re.sub(r"^╭.*$|[─-╿]", " ", plain, flags=re.MULTILINE).split())
    text = re.split(" For full helptext| Argument helptext", text)[0]
    text = re.sub(r" Perhaps you meant: (--[\w-]+).*", r"; did you mean \1?", text)
    return text.removesuffix(".") or "the command line cannot be parsed"


def run_command(work: Callable[[], int | None], *, launched: bool = False, memory_fix: str = FREE_MEMORY) -> int:
    """Calls `work` and returns the exit status: the result of `work` (None: 0), or the status for an error.

    The status is 2 after InputError. It is 1 after ExplainedError, if a disk cannot be read or written, or if there is
    not enough memory. Each of these errors is printed as one line, which ends with `memory_fix` if memory is lacking.
    Any other error is raised. If `launched` is true, its traceback is printed instead and the status is 1, so that the
    caller can end the process with `exit_process`. KeyboardInterrupt is always raised.

    `launched`: whether a launcher may start the command in several processes. They all find the same mistake in their
    input, so only the first process of each machine prints an InputError.
    """
    with forgiving_output():
        try:
            return work() or 0
        except InputError as error:
            if not launched or prints_errors():
                print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            sys.excepthook = _hide_interrupt
            raise
        except Exception as error:
            problem = str(error) if isinstance(error, ExplainedError) else _machine_problem(error, memory_fix)
            if problem is not None:
                print(f"error: {printable(problem)}", file=sys.stderr, flush=True)
            elif launched:
                traceback.print_exception(error)
            else:
                raise
            return 1


def _hide_interrupt(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """An excepthook that prints no traceback for KeyboardInterrupt.

    Python still ends itself with SIGINT, so Ctrl-C also ends a shell loop around the command.
    """
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def require_output() -> None:
    """Raises ExplainedError if stdout could not be written. Call it at the end of a command that prints its result."""
    error = output_error()
    if error is not None:
        raise ExplainedError(f"cannot write the output: {error.strerror}")


def _machine_problem(error: Exception, memory_fix: str) -> str | None:
    """A line about a disk that cannot be written or about a lack of memory; None for any other error."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS and error.filename:
        failed = "read or write" if error.errno == errno.EIO else "write"
        return f"cannot {failed} {error.filename}: {error.strerror}"
    if lacks_memory(error):
        reason = str(error).partition("\n")[0] or "MemoryError"
        return f"there is not enough memory ({reason}); {memory_fix}"
    return None


def program_name(module: str) -> str:
    """The command that runs `module`, such as `python -m ddp_trainer.train`, for usage lines."""
    return f"{Path(sys.executable).name} -m {module}"
