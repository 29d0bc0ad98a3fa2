"""The command line: `pyro-vae COMMAND`, one typed function for each command."""

from __future__ import annotations

__all__ = ["main"]

import difflib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, Namespace

from pyro_vae import commands
from pyro_vae.parts import KINDS, Part, find

COMMANDS: dict[str, Callable[..., None]] = {
    "train": commands.train,
    "evaluate": commands.evaluate,
    "sample": commands.sample,
    "reconstruct": commands.reconstruct,
    "interpolate": commands.interpolate,
    "manifold": commands.manifold,
    "encode": commands.encode,
    "data": commands.data,
}
# What a constructor gets by its parameter's name, and so takes no option for.
_GIVEN = {"latent", "shape", "encoder", "decoder", "posterior", "data", "params", "lr"}
_GIVEN |= {"optimizer"}
_WORDS = {int: "a whole number", float: "a number", str: "a word"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (failed) or 2 (misuse).

    Args:
        arguments: What follows the program's name; that of the process by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that my_file.MyPrior is found
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if given[0] == "--version":
        print(f"pyro-vae {version('pyro-vae')}")
        return 0
    name = given[0]
    try:
        command = COMMANDS.get(name)
        if command is None:
            raise ValueError(f"unknown command '{name}'{_near(name, COMMANDS)}")
        command(**_parsed(name, command, given[1:]))
    except KeyboardInterrupt:
        return _failed(1, "stopped; what was finished is kept")
    except (ValueError, TypeError, LookupError, ImportError, *_MISUSE) as error:
        return _failed(2, error)
    except (OSError, RuntimeError, ArithmeticError, MemoryError, EOFError) as error:
        return _failed(1, error)
    return 0


_MISUSE = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError)


def _failed(status: int, error: str | Exception) -> int:
    if isinstance(error, Exception) and os.environ.get("PYRO_VAE_TRACEBACK"):
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    print(f"pyro-vae: {' '.join(message.split())}", file=sys.stderr)
    return status


def _overview() -> str:
    lines = [
        "usage: pyro-vae COMMAND [OPTION ...]",
        "",
        "Variational autoencoders as probabilistic programs in Pyro.",
        "",
        "commands:",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:12} {parse_docstring(command.__doc__ or '').short_description}")
    return "\n".join(
        [
            *lines,
            "",
            "`pyro-vae COMMAND --help` lists a command's options. Exit status: 0, 1 (failed),",
            "2 (misuse). PYRO_VAE_TRACEBACK=1 prints the full trace of an error.",
        ]
    )


def _parsed(name: str, command: Callable[..., None], given: list[str]) -> dict[str, Any]:
    """The command's arguments; `SystemExit` after ``--help``."""
    parser = ArgumentParser(
        prog=f"pyro-vae {name}", description=_documented(command)[0], exit_on_error=False
    )
    given = _config_first(given)
    if command is commands.train:
        _check_config(given)
        parser.add_argument("--config", action="config", help="Repeat a run from its config.yaml.")
        parser.add_argument(
            "--allow", nargs="*", default=[], help="Modules of your own that --config may import."
        )
    _add(parser, command)
    try:
        parsed: Namespace = parser.parse_args(given)
    except ArgumentError as error:
        raise ValueError(_worded(str(error), name, command, given)) from error
    return _collected(parsed, command)


def _collected(parsed: Namespace, target: Callable[..., Any]) -> dict[str, Any]:
    """What was parsed for each parameter of a function or a dataclass."""
    hints = get_type_hints(target)
    values: dict[str, Any] = {}
    for key in inspect.signature(target).parameters:
        if is_dataclass(hints[key]) and hints[key] is not Part:
            values[key] = hints[key](**_collected(parsed, hints[key]))
        else:
            value = parsed[key]
            values[key] = Part.of(value.as_dict()) if isinstance(value, Namespace) else value
    return values


def _documented(target: Any) -> tuple[str, dict[str, str]]:
    """First line of a docstring, and what it says of each parameter or attribute."""
    documentation = parse_docstring(target.__doc__ or "")
    said = {
        each.arg_name: " ".join(str(each.description).split()) for each in documentation.params
    }
    return documentation.short_description or "", said


def _add(parser: ArgumentParser, target: Callable[..., Any]) -> None:
    """Add the parameters of a function, or the fields of a dataclass, by their types."""
    hints, said = get_type_hints(target), _documented(target)[1]
    for key, parameter in inspect.signature(target).parameters.items():
        hint, default = hints[key], parameter.default
        option = f"--{key.replace('_', '-')}"
        text: dict[str, Any] = {"help": said[key]}
        if key in KINDS:
            path = default and {"class_path": _path(default.name, key)}
            said_too = f"{said[key]} A name, or the import path of your own class."
            parser.add_subclass_arguments(
                KINDS[key][0],
                key,
                as_group=False,
                skip=_GIVEN,
                instantiate=False,
                default=path,
                metavar="CLASS",
                help=said_too,
            )
        elif is_dataclass(hint):
            _add(parser, cast("Any", hint))
        elif default is parameter.empty:
            parser.add_argument(key, type=str, **text)
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD and key == "name":
            parser.add_argument(key, type=str, nargs="?", **text)
        elif hint is bool:
            parser.add_argument(
                option, action=ActionYesNo(no_prefix="no-"), default=default, **text
            )
        elif get_origin(hint) is Sequence:
            kind = get_args(hint)[0]
            parser.add_argument(option, nargs="*", type=kind, default=list(default), **text)
        else:
            parser.add_argument(option, type=hint, default=default, **text)


def _path(name: str, kind: str) -> str:
    found = find(name, kind)
    return f"{found.__module__}.{found.__qualname__}"


def _config_first(given: list[str]) -> list[str]:
    """Put ``--config FILE`` first, so that options count more wherever they stand."""
    for index, word in enumerate(given):
        if word == "--config" and index + 1 < len(given):
            return [*given[index : index + 2], *given[:index], *given[index + 2 :]]
        if word.startswith("--config="):
            return [word, *given[:index], *given[index + 1 :]]
    return given


def _check_config(given: list[str]) -> None:
    """Refuse a configuration that names classes of modules that are not allowed."""
    if not given or not given[0].startswith("--config"):
        return
    path = Path(given[0].partition("=")[2] or given[1])
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration '{path}'")
    allowed: list[str] = []
    for index, word in enumerate(given):
        if word == "--allow":
            for module in given[index + 1 :]:
                if module.startswith("--"):
                    break
                allowed.append(module)
    try:
        content = yaml.safe_load(path.read_text())
        parts = {key: content[key] for key in KINDS if content.get(key)}
        names = {key: part["class_path"] for key, part in parts.items()}
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"'{path}' is no configuration of a run: {error}") from error
    for key, name in names.items():
        find(name, key, allow=allowed)


def _worded(error: str, name: str, command: Callable[..., None], given: list[str]) -> str:
    """One sentence for what the parser says in several lines."""
    hints = _hints(command)
    options = [f"--{key.replace('_', '-')}" for key in hints]
    if found := re.search(r"unrecognized arguments: (\S+)", error):
        return f"'{name}' has no option '{found[1]}'{_near(found[1], options)}"
    if found := re.search(r"arguments are required: (\w+)", error):
        return f"'{name}' needs {found[1].upper()}: the folder of a run, written by train"
    if found := re.search(r"argument (\S+): expected", error):
        return f"{found[1]} needs a value"
    key = (re.findall(r'[Kk]ey "([\w.]+)"', error) or [""])[0]
    if key.split(".")[0] in KINDS:
        return _part_worded(error, key.split(".")[0], given)
    if key in hints:
        value = _given(given, key)
        return f"--{key.replace('_', '-')} takes {_kind(hints[key])}, not '{value}'"
    return " ".join(error.split())


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Types of the options of a command, those of its dataclasses among them."""
    hints: dict[str, Any] = {}
    for key, hint in get_type_hints(target).items():
        if is_dataclass(hint) and hint is not Part:
            hints |= _hints(cast("Any", hint))
        elif key != "return":
            hints[key] = hint
    return hints


def _part_worded(error: str, kind: str, given: list[str]) -> str:
    path = _given(given, kind)
    if path is None:
        return f"give the {kind} by --{kind} before its options"
    try:
        part = find(path, kind)
    except (ValueError, TypeError) as unknown:
        return str(unknown)
    takes = [key for key in inspect.signature(part).parameters if key not in _GIVEN]
    if found := re.search(r"Option '(\w+)' is not accepted", error):
        known = f"it takes {', '.join(takes)}" if takes else "it takes none"
        return f"{kind} {path} takes no option '{found[1]}'; {known}"
    return f"{kind} {path} cannot be set up: {' '.join(error.split())}"


def _kind(hint: Any) -> str:
    """A type in words."""
    choices = [each for each in (get_args(hint) or (hint,)) if each is not type(None)]
    if get_origin(hint) is Literal or get_origin(choices[0]) is Literal:
        names = get_args(choices[0]) or choices
        return f"one of {', '.join(names)}"
    return _WORDS.get(choices[0], str(choices[0]))


def _given(given: list[str], key: str) -> str | None:
    option = f"--{key.replace('_', '-')}"
    for index, word in enumerate(given):
        if word == option and index + 1 < len(given):
            return given[index + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


def _near(word: str, words: Any) -> str:
    match = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean '{match[0]}'?" if match else f"; there are {', '.join(words)}"
