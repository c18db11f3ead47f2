"""What every command shares: user errors in one sentence, configs from plain mappings, progress bars.

A command's module calls `run(main)`. What the user did wrong ends with one sentence and exit code 2; a bug
keeps its traceback.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

from flashvsr.base.heap import keep_memory

T = TypeVar("T")

# Without a terminal a progress bar is a log: one line in this many seconds.
SECONDS_PER_LINE = 10.0


class UserError(ValueError):
    """What a user did wrong: one sentence with the offending value and what to do."""


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and leave the process with its exit code.

    `main` takes the arguments after the program's name (default: `sys.argv[1:]`) and returns an exit code
    or None. UserError and OSError end in one line on stderr and code 2, Ctrl-C in one line and 130; any
    other exception is a bug and keeps its traceback. SIGTERM keeps its default action. Memory that is freed
    stays with the process (`keep_memory`).
    """
    keep_memory()
    try:
        code = main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted: {stop or 'the same command continues or starts again'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): say nothing, not even when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except (UserError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


def sentence(error: Exception) -> str:
    """What an error says, without the traceback that a worker of torch's DataLoader wraps it in."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    text = str(error).strip() or type(error).__name__
    if text.startswith("Caught "):
        # A DataLoader worker wraps the error in its own traceback; the last line is the sentence.
        text = text.splitlines()[-1].split(": ", 1)[-1]
    return text


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make the dataclass `cls` from a plain mapping, nested dataclasses included.

    Lists become tuples where a tuple is wanted, integers become floats; nothing else is converted.
    `where` is the dotted name of the mapping itself. An unknown key, a missing value, a wrong type or a
    value the dataclass refuses raises UserError with the full dotted key.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'the config'} must be a group of keys, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {_dotted(where, key)!r}; {_nearest(str(key), fields)}")
    hints = typing.get_type_hints(cls)
    made = {}
    for name, field in fields.items():
        if name in values:
            made[name] = _convert(hints[name], values[name], _dotted(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"missing key {_dotted(where, name)!r}; set it to {_type_name(hints[name])}")
    try:
        return cls(**made)
    except ValueError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


def _dotted(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known) or 'none'}"


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is not None:
        return str(hint).replace("typing.", "")
    return getattr(hint, "__name__", str(hint))


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type, or UserError naming `key`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(hint, args, value, key)
    if origin is Literal:
        # `1 == True` in Python: the type must agree too.
        if any(type(option) is type(value) and option == value for option in args):
            return value
        close = difflib.get_close_matches(str(value), [str(option) for option in args], n=1)
        hint_text = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{key}={value!r} must be {_type_name(hint)}{hint_text}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, key)
    kind = origin or hint
    if kind is tuple:
        return _convert_tuple(hint, args, value, key)
    if kind in (list, Sequence) and isinstance(value, (list, tuple)):
        items = [_convert(args[0] if args else Any, item, f"{key}[{i}]") for i, item in enumerate(value)]
        return items if kind is list else tuple(items)
    if kind in (dict, Mapping) and isinstance(value, Mapping):
        of_key, of_value = args or (Any, Any)
        return {_convert(of_key, k, key): _convert(of_value, v, f"{key}.{k}") for k, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if type(value) is kind or (kind is not int and isinstance(kind, type) and isinstance(value, kind)):
        return value
    raise UserError(f"{key}={value!r} must be {_type_name(hint)}, not {type(value).__name__}")


def _convert_union(hint: Any, options: tuple, value: Any, key: str) -> Any:
    if value is None and type(None) in options:
        return None
    exact = [option for option in options if isinstance(option, type) and type(value) is option]
    real = [option for option in (exact or options) if option is not type(None)]
    if len(real) == 1:
        try:
            return _convert(real[0], value, key)
        except UserError as error:
            # Inside a nested dataclass the inner sentence says more than the outer one.
            if isinstance(value, (Mapping, list, tuple)):
                raise
            raise UserError(str(error).replace(_type_name(real[0]), _type_name(hint), 1)) from None
    for option in real:
        try:
            return _convert(option, value, key)
        except UserError:
            continue
    raise UserError(f"{key}={value!r} must be {_type_name(hint)}, not {type(value).__name__}")


def _convert_tuple(hint: Any, args: tuple, value: Any, key: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{key}={value!r} must be a list for {_type_name(hint)}, not {type(value).__name__}")
    if not args:
        return tuple(value)
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise UserError(f"{key}={value!r} must have {len(args)} entries, not {len(value)}")
    return tuple(_convert(a, v, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


class Progress:
    """A progress bar with time left, on stderr; without a terminal, a line every ten seconds.

    `total` may be None when unknown. `quiet` shows nothing. Use as a context manager.
    """

    def __init__(self, total: int | None, label: str, unit: str = "it", quiet: bool = False) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done = 0
        self._info: dict[str, Any] = {}
        self._bar = None
        self._lines = not quiet and not sys.stderr.isatty()
        self._begun = self._last = time.monotonic()
        if not quiet and not self._lines:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit=unit, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def update(self, n: int = 1, **info: Any) -> None:
        """`n` more are done; `info` is shown beside the bar (floats with four digits)."""
        self.done += n
        self._info.update(info)
        if self._bar is not None:
            if info:
                self._bar.set_postfix({k: _short(v) for k, v in self._info.items()}, refresh=False)
            self._bar.update(n)
        elif self._lines and time.monotonic() - self._last >= SECONDS_PER_LINE:
            self._last = time.monotonic()
            self._line()

    def _line(self, end: str = "") -> None:
        seconds = time.monotonic() - self._begun
        parts = [f"{self.label}: {self.done}{f'/{self.total}' if self.total else ''} {self.unit}"]
        if self.done and seconds > 0:
            parts.append(f"{self.done / seconds:.3g} {self.unit}/s")
        parts.append(f"{clock(seconds)} gone")
        if not end and self.total and self.done:
            parts.append(f"{clock(seconds / self.done * max(self.total - self.done, 0))} left")
        parts += [f"{k}={_short(v)}" for k, v in self._info.items()]
        print(", ".join(parts) + end, file=sys.stderr, flush=True)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._lines:
            self._line(", done" if kind is None else ", stopped")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    """mm:ss, or h:mm:ss from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
