"""What a function does and holds, or which weights a model has, as a hash that is the same in every process."""

from __future__ import annotations

import builtins
import copyreg
import dis
import enum
import hashlib
import importlib.util
import logging
import os
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

_INSTALLED = tuple(
    os.path.realpath(path) + os.sep
    for path in {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_PACKAGE = __name__.partition(".")[0]
# Made for a class by Python, not written by its author.
_OF_CLASSES = {"__dict__", "__weakref__", "__module__", "__doc__", "__qualname__", "__annotations__", "__annotate__"}
_OF_CLASSES |= {"__annotations_cache__", "__firstlineno__", "__static_attributes__", "_abc_impl"}
_SCALARS = (type(None), bool, int, float, complex, str, bytes, bytearray, type(Ellipsis), type(NotImplemented))

# Values that are hashed of each tensor of a model, evenly spread.
_VALUES_A_TENSOR = 64
# Modules whose objects order threads, and hold nothing that a score could depend on.
_OF_THREADS = ("_thread", "threading", "asyncio.locks")
# What `functools.lru_cache` makes of a function.
_CACHED = type(cache(lambda: None))


def model_fingerprint(model: torch.nn.Module) -> str:
    """
    A hash of the weights' names, shapes, dtypes and some values of each: tells another checkpoint in the same folder
    from this one without reading all of it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        if not tensor.is_meta:
            values = tensor.detach().flatten()
            digest.update(repr(values[:: max(1, len(values) // _VALUES_A_TENSOR)].float().cpu().tolist()).encode())
    return digest.hexdigest()[:16]


class UnknownStateError(ValueError):
    """Something holds what cannot be compared between processes."""


def code_fingerprint(function: Any) -> str:
    """
    A hash of what a function, or an object that is called as one, does and holds.

    It covers the code, its constants, defaults, closure, partial arguments and the object's state, and what it uses
    of modules of the user's own: functions, classes, data and objects. Modules of the user's own that it imports, and
    that these import, count by their files; what it reaches in installed packages counts by name alone. Comments,
    names of variables and positions in a file do not count, but in those files; another release of Python does.

    Args:
        function (`Callable`):
            The function.

    Raises:
        [`UnknownStateError`]: if it holds something whose state cannot be read (a lock, a connection, an open file);
        names that.
    """
    try:
        return _Digest(function).of(function).hex()[:16]
    except UnknownStateError:
        raise
    except Exception as error:  # of somebody's object
        raise UnknownStateError(f"something that cannot be read ({type(error).__name__}: {error})") from error


@cache
def _is_written_here(module: str | None) -> bool:
    """Whether a module is the user's: neither of Python, nor of an installed package, nor ours."""
    if not module or module in sys.builtin_module_names or module.partition(".")[0] == _PACKAGE:
        return False
    path = getattr(sys.modules.get(module), "__file__", None)
    return path is None or not os.path.realpath(path).startswith(_INSTALLED)


@cache
def _own_file(module: str) -> str | None:
    """The file of a module, if it is the user's."""
    try:
        origin = getattr(importlib.util.find_spec(module), "origin", None)
    except (ImportError, ValueError, AttributeError):  # it is made in memory, no package, or not there
        return None
    if not origin or not os.path.isfile(origin) or os.path.realpath(origin).startswith(_INSTALLED):
        return None
    return None if module.partition(".")[0] == _PACKAGE else origin


def _add_sources(module: str, names: Iterable[str], found: dict[str, bytes]) -> None:
    """
    Add the file of a module of the user's own, and of those that it imports.

    Args:
        names (iterable of `str`):
            What is asked of the module: each may be a submodule.
        found (`dict[str, bytes]`):
            Gets the files by module.
    """
    file = _own_file(module)
    if file is None:
        return
    for name in names:
        _add_sources(f"{module}.{name}", (), found)
    if module in found:
        return
    found[module] = Path(file).read_bytes()
    if file.endswith(".py"):
        package = module if os.path.basename(file) == "__init__.py" else module.rpartition(".")[0]
        _add_imported(compile(found[module], file, "exec"), package, found)


def _add_imported(code: types.CodeType, package: str, found: dict[str, bytes]) -> None:
    """Add what code of a package imports, see [`_add_sources`]."""
    names = set(_names(code))
    for name in sorted(set(_imported_names(code))):
        # A name may be one of the package's: the code says so in another place.
        for module in (name, f"{package}.{name}".rstrip(".")):
            if module:
                _add_sources(module, sorted(names), found)


def _join(kind: str, *parts: bytes) -> bytes:
    return hashlib.sha256(kind.encode() + b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


class _Digest:
    """Hashes of values, each of its kind and of the hashes of what it holds."""

    def __init__(self, root: Any):
        self.root = root
        # Of what is being hashed (`None`: it holds itself) or was; the values are kept so that no id is used twice.
        self.known: dict[int, tuple[Any, bytes | None]] = {}

    def of(self, value: Any) -> bytes:
        if type(value) in _SCALARS:
            return _join(type(value).__name__, repr(value).encode("utf-8", "surrogatepass"))
        if id(value) in self.known:
            return self.known[id(value)][1] or _join("itself")
        self.known[id(value)] = value, None
        try:
            found = self._of(value)
        except BaseException:
            del self.known[id(value)]
            raise
        self.known[id(value)] = value, found
        return found

    def _of(self, value: Any) -> bytes:
        if isinstance(value, types.CodeType):
            return self._of_code(value)
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, types.MethodType):
            return _join("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, partial):
            return _join("partial", *map(self.of, (value.func, value.args, value.keywords)))
        if isinstance(value, type):
            return self._of_class(value)
        if isinstance(value, types.ModuleType):
            return _join("module", value.__name__.encode())
        if isinstance(value, logging.Logger):
            return _join("logger", value.name.encode())
        if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            owner = value.__self__
            owner = b"" if owner is None or isinstance(owner, types.ModuleType) else self.of(owner)
            return _join("builtin", f"{value.__module__}.{value.__qualname__}".encode(), owner)
        if isinstance(value, torch.nn.Module):
            return _join("model", self.of(type(value)), model_fingerprint(value).encode())
        if isinstance(value, torch.Tensor):
            stored = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return _join("tensor", f"{value.dtype} {tuple(value.shape)}".encode(), stored.numpy().tobytes())
        return self._of_container(value)

    def _of_container(self, value: Any) -> bytes:
        if type(value) in (list, tuple):
            return _join(type(value).__name__, *map(self.of, value))
        if type(value) in (set, frozenset):
            return _join(type(value).__name__, *sorted(map(self.of, value)))
        if type(value) in (dict, types.MappingProxyType):
            return _join("dict", *sorted(self.of(key) + self.of(item) for key, item in value.items()))
        if isinstance(value, enum.Enum):
            return _join("member", self.of(type(value)), value.name.encode())
        if isinstance(value, (staticmethod, classmethod)):
            return _join(type(value).__name__, self.of(value.__func__))
        if isinstance(value, property):
            return _join("property", *map(self.of, (value.fget, value.fset, value.fdel)))
        if isinstance(value, cached_property):
            return _join("cached_property", self.of(value.func))
        return self._of_object(value)

    def _of_object(self, value: Any) -> bytes:
        """An object by its class and its state, as pickle would take them."""
        if isinstance(value, _CACHED):
            return _join("wrapper", self.of(value.__wrapped__))
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise UnknownStateError(f"an object of {kind}, whose state cannot be compared ({error})") from error
        if isinstance(reduced, str):
            return _join("global", f"{type(value).__module__}.{reduced}".encode())
        made_by, arguments, *rest = reduced
        state = [list(part) if isinstance(part, Iterator) else part for part in rest]
        return _join("object", self.of(type(value)), self.of(made_by), self.of(arguments), self.of(state))

    def _of_function(self, function: types.FunctionType) -> bytes:
        is_own = _is_written_here(function.__module__)
        if not is_own and function is not self.root and function.__qualname__.isidentifier():
            return _join("named", f"{function.__module__}.{function.__qualname__}".encode())
        held = [function.__defaults__, function.__kwdefaults__, vars(function)]
        cells = [self._of_cell(cell) for cell in function.__closure__ or ()]
        used = self._used_globals(function) if is_own else []
        return _join("function", self.of(function.__code__), *map(self.of, held), *cells, *used)

    def _of_cell(self, cell: types.CellType) -> bytes:
        try:
            return self.of(cell.cell_contents)
        except ValueError as error:
            if isinstance(error, UnknownStateError):
                raise
            return _join("empty")

    def _of_code(self, code: types.CodeType) -> bytes:
        numbers = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        # The names of arguments matter, since they are given by name.
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        # The functions and comprehensions in it are constants.
        held = (numbers, arguments, code.co_consts, code.co_names, getattr(code, "co_exceptiontable", b""))
        return _join("code", code.co_code, *map(self.of, held))

    def _used_globals(self, function: types.FunctionType) -> list[bytes]:
        sources: dict[str, bytes] = {}
        _add_imported(function.__code__, function.__globals__.get("__package__") or "", sources)
        names = sorted(set(_names(function.__code__)))
        for name in set(_global_names(function.__code__)) & function.__globals__.keys():
            if isinstance(function.__globals__[name], types.ModuleType):
                _add_sources(function.__globals__[name].__name__, names, sources)
        found = [_join("source", name.encode(), sources[name]) for name in sorted(sources)]
        for name in sorted(set(_global_names(function.__code__))):
            if name not in function.__globals__:
                found.append(_join("absent", name.encode(), bytes(hasattr(builtins, name))))
                continue
            value = function.__globals__[name]
            if type(value).__module__ in _OF_THREADS:
                found.append(_join("global", name.encode(), type(value).__qualname__.encode()))
                continue
            try:
                found.append(_join("global", name.encode(), self.of(value)))
            except Exception as error:  # of somebody's object
                raise UnknownStateError(f"the global {name!r} ({error})") from error
        return found

    def _of_class(self, cls: type) -> bytes:
        if not _is_written_here(cls.__module__):
            return _join("class", f"{cls.__module__}.{cls.__qualname__}".encode())
        parts = [cls.__qualname__.encode(), *map(self.of, cls.__bases__)]
        for name, value in sorted(vars(cls).items()):
            if name in _OF_CLASSES or isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType)):
                continue
            try:
                parts.append(_join("attribute", name.encode(), self.of(value)))
            except Exception as error:
                raise UnknownStateError(f"{cls.__qualname__}.{name} ({error})") from error
        return _join("class", *parts)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code and those of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _argument_names(code: types.CodeType, *operations: str) -> Iterator[str]:
    for part in _codes(code):
        for instruction in dis.get_instructions(part):
            if instruction.opname in operations:
                yield instruction.argval


def _imported_names(code: types.CodeType) -> Iterator[str]:
    return _argument_names(code, "IMPORT_NAME")


def _global_names(code: types.CodeType) -> Iterator[str]:
    return _argument_names(code, "LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")


def _names(code: types.CodeType) -> Iterator[str]:
    for part in _codes(code):
        yield from part.co_names
