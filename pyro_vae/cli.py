"""The command line: `pyro-vae COMMAND`, one typed function for each command."""

from __future__ import annotations

__all__ = ["main"]

import contextlib
import difflib
import inspect
import itertools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, Namespace
from tqdm import tqdm

from pyro_vae import checkpoints, commands, reports, runs
from pyro_vae.distributed import Ranks, joined, restarted
from pyro_vae.parts import KINDS, Part, find, named
from pyro_vae.progress import Stopped

COMMANDS: dict[str, Callable[..., None]] = {
    "train": commands.train,
    "evaluate": reports.evaluate,
    "compare": reports.compare,
    "sample": runs.sample,
    "reconstruct": runs.reconstruct,
    "interpolate": runs.interpolate,
    "manifold": runs.manifold,
    "encode": runs.encode,
    "data": commands.data,
}
# What a constructor gets by its parameter's name, and so takes no option for.
_GIVEN = {"latent", "shape", "encoder", "decoder", "posterior", "data", "params", "lr"}
_GIVEN |= {"optimizer"}
_POSITIONAL = {"run", "runs", "name"}
_TOGETHER = {"train", "evaluate"}  # what several processes can do
_ALLOW = "Module of your own, one for each --allow, that"
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a word",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "Iterable": "a list such as [1,2]",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (failed), 2 (misuse), 130, 143 (stopped).

    Args:
        arguments: What follows the program's name; that of the process by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path and os.getcwd() not in sys.path:
        # So that my_file.MyPrior is found, but no file here stands in for an installed module.
        sys.path.append(os.getcwd())
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
        with joined() as ranks, _silent(not ranks.first), _plain_warnings():
            if ranks.size > 1 and name not in _TOGETHER:
                raise ValueError(f"'{name}' is done by one process; run it without torchrun")
            command(**_parsed(name, command, _again(given[1:], ranks)))
    except KeyboardInterrupt as stopped:
        return _failed(130, str(stopped) or "stopped; what was finished, if anything, is kept")
    except Stopped as stopped:
        return _failed(143, str(stopped))
    except (ValueError, TypeError, ImportError, *_MISUSE) as error:
        return _failed(2, error)
    except Exception as error:  # a failure while running, or a mistake in the user's own classes
        return _failed(1, error)
    return 0


_MISUSE = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError)
_EXPECTED = (*_MISUSE, ValueError, TypeError, ImportError, OSError, RuntimeError, ArithmeticError)


def _failed(status: int, error: str | Exception) -> int:
    if isinstance(error, Exception) and os.environ.get("PYRO_VAE_TRACEBACK"):
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        place = f" '{error.filename}'" if error.filename else ""
        message = f"cannot read or write{place}: {error.strerror}"
    elif not isinstance(error, (str, *_EXPECTED)):
        message = f"{type(error).__name__}: {message}; PYRO_VAE_TRACEBACK=1 shows where"
    if not (_rank() and status in (130, 143)):  # which the first process says for all
        _say(message)
    return status


def _say(message: str) -> None:
    """Put one line on stderr, above a progress bar that may be there."""
    who = f"pyro-vae (process {_rank()})" if _rank() else "pyro-vae"
    tqdm.write(f"{who}: {' '.join(message.split())}", file=sys.stderr)


def _rank() -> int:
    """Number of this process among those of torchrun, of which an error has no group any more."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """Print nothing, where another process does."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Let warnings be sentences as errors are, without the place in the code that warns."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(str(message))
        yield


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
            "`pyro-vae COMMAND --help` lists a command's options. `python -m pyro_vae` is the",
            "same as `pyro-vae`. Exit status: 0, 1 (failed), 2 (misuse), 130 and 143 (stopped by",
            "Ctrl-C, by SIGTERM). PYRO_VAE_TRACEBACK=1 prints the full trace of an error.",
        ]
    )


class _Parser(ArgumentParser):
    """A parser whose help lists the classes that `find` takes, and not all that are loaded."""

    def format_help(self, *formatter: Any) -> str:
        """Return the help without what jsonargparse adds about classes."""
        return re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", super().format_help(*formatter))


def _parsed(name: str, command: Callable[..., None], given: list[str]) -> dict[str, Any]:
    """The command's arguments; `SystemExit` after ``--help``."""
    parser = _Parser(
        prog=f"pyro-vae {name}",
        description=_documented(command)[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    renamed = list[str]()
    if command is commands.train:
        given = _first([*_resumed(given), *given], "config")
        _check_configs(given)
        _check_classes(given)
        parser.add_argument("--config", action="config", help="Repeat a run from its config.yaml.")
        parser.add_argument(
            "--allow", action="append", default=[], help=f"{_ALLOW} --config may import."
        )
        renamed = [kind for kind in KINDS if _renamed(kind, given)]
        given = _first(_first(given, *renamed), "config")
    _add(parser, command, renamed)
    try:
        parsed: Namespace = parser.parse_args(given)
        for kind in renamed:
            parsed[kind] = _alone(kind, given)
    except ArgumentError as error:
        raise ValueError(_worded(str(error), name, command)) from error
    return _collected(parsed, command)


def _renamed(kind: str, given: list[str]) -> bool:
    """Whether a class is named that is not the configuration's."""
    names = [_class(value) for value in _values(given, kind)]
    if not names or names[-1] in (None, "null"):
        return False
    contents = [yaml.safe_load(Path(path).read_text()) for path in _values(given, "config")]
    before = [Part.of(each[kind]).name for each in contents if each.get(kind)]
    return not before or find(names[-1], kind) is not find(before[-1], kind)


def _class(value: str) -> str | None:
    """The class that an option's value names, also within a mapping."""
    if re.fullmatch(r"[\w.]+", value):
        return value
    with contextlib.suppress(yaml.YAMLError, TypeError, KeyError, ValueError):
        return Part.of(yaml.safe_load(value)).name
    return None


def _alone(kind: str, given: list[str]) -> Any:
    """A class and its options as they are given, without those of the class in its place before.

    Where both take an option of one name, the parser would hand its value on: AdamW would have
    the weight decay of Adam.
    """
    own, _ = _divided(given, lambda option: option.partition(".")[0] == kind)
    parser = _Parser(exit_on_error=False, allow_abbrev=False)
    _add_class(parser, kind, default=None)
    return parser.parse_args(own)[kind]


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


def _add(
    parser: ArgumentParser, target: Callable[..., Any], renamed: Collection[str] = ()
) -> None:
    """Add the parameters of a function, or the fields of a dataclass, by their types.

    Those `renamed` have no class by default, since another one is given.
    """
    hints, said = get_type_hints(target), _documented(target)[1]
    for key, parameter in inspect.signature(target).parameters.items():
        hint, default = hints[key], parameter.default
        option = f"--{key.replace('_', '-')}"
        text: dict[str, Any] = {"help": said[key]}
        if key in KINDS:
            path = None
            if default and key not in renamed:
                path = {"class_path": _path(default.name, key)}
            names = ", ".join(named(key))
            said_too = f"{said[key]} One of {names}, or the import path of your own class."
            _add_class(parser, key, default=path, metavar="CLASS", help=said_too)
        elif is_dataclass(hint):
            _add(parser, cast("Any", hint), renamed)
        elif key in _POSITIONAL:
            many_of_them = get_origin(hint) is Sequence
            count = "+" if many_of_them else None if default is parameter.empty else "?"
            parser.add_argument(key, type=str, nargs=count, **text)
        elif hint is bool:
            parser.add_argument(
                option, action=ActionYesNo(no_prefix="no-"), default=default, **text
            )
        elif get_origin(hint) is Sequence:
            kind = get_args(hint)[0]
            many: dict[str, Any] = {"action": "append"} if kind is str else {"nargs": "*"}
            parser.add_argument(option, type=kind, default=list(default), **many, **text)
        else:
            parser.add_argument(option, type=hint, default=default, **text)


def _add_class(parser: ArgumentParser, kind: str, **how: Any) -> None:
    """Add an option that names a class of a kind, whose own options follow."""
    parser.add_subclass_arguments(
        KINDS[kind][0], kind, as_group=False, skip=_GIVEN, instantiate=False, **how
    )


def _path(name: str, kind: str) -> str:
    found = find(name, kind)
    return f"{found.__module__}.{found.__qualname__}"


def _again(given: list[str], ranks: Ranks) -> list[str]:
    """Options that go on with the run, where torchrun has started its processes again."""
    out, resume = _values(given, "out"), _values(given, "resume")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not (out or resume):
        raise ValueError("give --out under --max-restarts, which names the run to go on with")
    if not restarted() or not out:
        return given
    begun = commands.begun_here(Path(out[-1]))  # as the first process sees it
    if not any(ranks.send(bytes([begun]))):
        return given
    # What the user has named is in the configuration now, and as much to be trusted as before.
    named = [name.rpartition(".")[0] for kind in KINDS for name in _values(given, kind)]
    allowed = [word for module in named if module for word in ("--allow", module)]
    return [*_without(given, ("out", "config")), *allowed, "--resume", out[-1]]


def _without(given: list[str], options: Sequence[str]) -> list[str]:
    """Leave out some options with their values."""
    return _divided(given, lambda option: option in options)[1]


def _divided(given: list[str], chosen: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """The words of options whose names are chosen, with their values, and all others."""
    own, others, taken = list[str](), list[str](), False
    for word in given:
        if word.startswith("--"):
            taken = chosen(word.partition("=")[0].removeprefix("--"))
        (own if taken else others).append(word)
    return own, others


def _resumed(given: list[str]) -> list[str]:
    """The configuration of the run that is to be gone on with, as an option."""
    if not (runs := _values(given, "resume")):
        return []
    path = Path(runs[-1]) / "config.yaml"
    if _values(given, "config"):
        raise ValueError("--resume takes the configuration of its run; leave out --config")
    if checkpoints.of_python(runs[-1]):
        raise FileNotFoundError(
            f"'{runs[-1]}' was trained from Python; go on with it there, by "
            f"fit(..., run='{runs[-1]}', resume=True)"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"'{runs[-1]}' is no run to go on with: there is no file '{path.name}' in it"
        )
    return ["--config", str(path)]


def _first(given: list[str], *options: str) -> list[str]:
    """Put some options with their value first.

    A configuration, so that others count more wherever they stand; a class, so that its options
    may stand before it.
    """
    first, rest, words = list[str](), list[str](), iter(given)
    for word in words:
        name, sign, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in options:
            rest.append(word)
        else:
            first += [word] if sign else [word, *itertools.islice(words, 1)]
    return [*first, *rest]


def _check_configs(given: list[str]) -> None:
    """Refuse a configuration that names what is not allowed, before the parser follows it."""
    allowed, entries = _values(given, "allow"), [*_hints(commands.train), "allow"]
    for path in map(Path, _values(given, "config")):
        if not path.is_file():
            raise FileNotFoundError(f"there is no configuration file '{path}'")
        try:
            text = path.read_text()
            checkpoints.check_header(text, path)
            content = {**yaml.safe_load(text)}
            for key in ("out", "resume"):
                if content.get(key) is not None:
                    raise ValueError(f"it says where to write; take out '{key}' and give --{key}")
            if unknown := [str(key) for key in content if key not in entries]:
                raise ValueError(f"it has an entry '{unknown[0]}'{_near(unknown[0], entries)}")
            parts = {kind: Part.of(content[kind]) for kind in KINDS if content.get(kind)}
        except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"'{path}' is no configuration of a run: {error}") from error
        for kind, part in parts.items():
            _check_part(part, kind, allowed, path)


def _check_part(part: Part, kind: str, allowed: Sequence[str], path: Path) -> None:
    """Refuse a class that is not allowed, and text that the parser would take for one.

    Where an option takes more than text, the parser imports what reads like an import path,
    opens a file of that name and reads a mapping for a class.
    """
    found: Any = find(str(part.name), kind, allow=allowed)
    hints: dict[str, Any] = {}
    with contextlib.suppress(NameError):  # a type that is imported for type checkers only
        hints = get_type_hints(found.__init__)
    for key, value in part.options.items():
        if isinstance(value, str) and hints.get(key) in (str, str | None):
            continue
        for text in _texts(value):
            if re.fullmatch(r"\w+(\.\w+)+", text):
                find(text, kind, allow=allowed)
            elif not re.fullmatch(r"[\w+-]+", text) or (path.parent / text).exists():
                raise ValueError(
                    f"'{path}' gives the {kind} as {key} '{text}', no plain word; take it out"
                )


def _texts(value: Any) -> Iterator[str]:
    """Every piece of text within plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple, set)):
        each = value.values() if isinstance(value, Mapping) else value
        yield from itertools.chain.from_iterable(map(_texts, each))


def _check_classes(given: list[str]) -> None:
    for kind in KINDS:
        for name in _values(given, kind):
            if re.fullmatch(r"[\w.]*", name) and name != "null":
                find(name, kind)


def _values(given: list[str], option: str) -> list[str]:
    """What is given for ``--option``, as far as the next option."""
    values, taking = list[str](), False
    for word in given:
        name, sign, value = word.partition("=")
        if word.startswith("--"):
            taking = name == f"--{option}"
            values += [value] if taking and sign else []
        elif taking:
            values.append(word)
    return values


def _worded(error: str, name: str, command: Callable[..., None]) -> str:
    """One sentence for what the parser says in several lines."""
    hints = _hints(command)
    keys = re.findall(r'[Kk]ey "([\w.]+)"', error)
    if found := re.search(r"unrecognized arguments: (\S+)", error):
        options = [f"--{key.replace('_', '-')}" for key in hints if key not in _POSITIONAL]
        near = difflib.get_close_matches(found[1], [*options, "--config"], n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"see `pyro-vae {name} --help`"
        return f"'{name}' has no option '{found[1]}'; {hint}"
    if keys and keys[0] in KINDS:
        return _part_worded(error, keys)
    if found := re.search(r"arguments are required: (\w+)", error):
        one = "the folder of a run" if found[1] == "run" else "the folders of runs"
        return f"'{name}' needs {found[1].upper()}: {one}, written by train"
    if found := re.search(r"argument (\S+): expected", error):
        return f"{found[1]} needs a value"
    if found := re.search(r"argument --(\S+)/--\S+: ignored", error):
        return f"--{found[1]} takes no value; there is --no-{found[1]} for the contrary"
    if keys and keys[0] in hints:
        option = f"--{keys[0].replace('_', '-')}"
        return f"{option} takes {_kind(hints[keys[0]])}, not '{_refused(error)}'"
    return " ".join(error.split())


def _refused(error: str) -> str:
    """The value that the parser refuses, in its innermost complaint."""
    found = re.search(r"(?:Got|Given) value: (.*)", error)
    return found[1] if found else ""


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Types of the options of a command, those of its dataclasses among them."""
    hints: dict[str, Any] = {}
    for key, hint in get_type_hints(target).items():
        if is_dataclass(hint) and hint is not Part:
            hints |= _hints(cast("Any", hint))
        elif key != "return":
            hints[key] = hint
    return hints


def _part_worded(error: str, keys: Sequence[str]) -> str:
    kind, option = keys[0], f"--{'.'.join(keys)}"
    if found := re.search(r"Parameter '(\w+)' from '([\w.]+)\.__init__' does not", error):
        return f"parameter '{found[1]}' of {found[2]} must have a type, such as int, to be given"
    interface, named = KINDS[kind][0], re.findall(r"class_path '([\w.]+)'", error)
    if not named:
        return f"--{kind} takes the name of a class or its import path, not '{_refused(error)}'"
    if named[-1].endswith(f".{interface.__name__}"):
        return f"give the {kind} by --{kind} before its options"
    part = find(named[-1], kind)
    if found := re.search(r"Option '(\w+)' is not accepted", error):
        takes = [key for key in inspect.signature(part).parameters if key not in _GIVEN]
        known = f"it takes {', '.join(takes)}" if takes else "it takes none"
        return f"{kind} {part.__name__} takes no option '{found[1]}'; {known}"
    if found := re.search(r"arguments are required: (\w+)", error):
        return f"{kind} {part.__name__} needs {found[1]}: give it by {option}.{found[1]}"
    reason, value = error.rpartition('key "')[2], _refused(error)
    if "NestedArg" in value:
        return f"give the class of {option} before its options"
    if len(keys) > 1 and f"<class '{interface.__module__}.{interface.__name__}'>" in reason:
        try:
            find(value, kind)
        except (ValueError, TypeError) as unknown:
            return str(unknown)
    types = re.findall(r"<class '(?:\w+\.)*(\w+)'>", reason)
    words = [_WORDS[name] for name in types if name in _WORDS]
    return f"{option} takes {words[0]}, not '{value}'" if words else " ".join(error.split())


def _kind(hint: Any) -> str:
    """A type in words."""
    choices = [each for each in (get_args(hint) or (hint,)) if each is not type(None)]
    if get_origin(hint) is Literal or get_origin(choices[0]) is Literal:
        names = get_args(choices[0]) or choices
        return f"one of {', '.join(names)}"
    return _WORDS.get(choices[0].__name__, str(choices[0]))


def _near(word: str, words: Any) -> str:
    match = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean '{match[0]}'?" if match else f"; there are {', '.join(words)}"
