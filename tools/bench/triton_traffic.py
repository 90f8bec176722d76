"""Which of its tensors a Triton kernel reads and which it writes, found in its source.

A pointer is read where `tl.load` or an atomic takes it, and written where `tl.store` or an atomic does; so a kernel
that works in place both reads and writes its tensor. A branch on a compile-time constant counts where the launch takes
it. What a kernel loads twice counts once, since it mostly lies in a cache the second time.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor

_READS, _WRITES, _BOTH = {"load"}, {"store"}, "atomic_"
Accesses = dict[str, set[str]]


def bytes_moved(kernel: Any, arguments: tuple[object, ...], constants: Mapping[str, object]) -> int:
    """Bytes that one launch reads and writes: each tensor once for its loads and once for its stores."""
    given = dict(zip(kernel.arg_names, arguments)) | dict(constants)
    accesses = _accesses(kernel, {name: value for name, value in given.items() if not isinstance(value, Tensor)})
    return sum(size_of(one) * len(accesses.get(name, ())) for name, one in given.items() if isinstance(one, Tensor))


def bytes_in_place(kernel: Any, arguments: tuple[object, ...], constants: Mapping[str, object]) -> int:
    """Bytes of the tensors that one launch both reads and writes, once: the part of `bytes_moved` that a count of
    tensors instead of accesses leaves out."""
    given = dict(zip(kernel.arg_names, arguments)) | dict(constants)
    accesses = _accesses(kernel, {name: value for name, value in given.items() if not isinstance(value, Tensor)})
    tensors = {name: one for name, one in given.items() if isinstance(one, Tensor)}
    read = {id(one) for name, one in tensors.items() if "read" in accesses.get(name, ())}
    written = {id(one): one for name, one in tensors.items() if "write" in accesses.get(name, ())}
    return sum(size_of(one) for key, one in written.items() if key in read)


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; those of a broadcast dimension lie in one place."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else 1
    return elements * tensor.element_size()


def _accesses(kernel: Any, known: Mapping[str, object]) -> Accesses:
    """How the kernel, whose arguments other than tensors are `known`, uses each of its pointers: "read", "write"."""
    found: Accesses = {}
    pointers = {name: {name} for name in kernel.arg_names if name not in known}
    for statement in _taken(_body(kernel.fn), known):
        _follow(statement, kernel.fn, pointers, found, known)
    return found


@cache
def _body(function: Any) -> list[ast.stmt]:
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef), f"{function} is no function"
    return definition.body


def _taken(body: list[ast.stmt], known: Mapping[str, object]) -> Iterator[ast.stmt]:
    """The plain statements of a body, in order, without the branches that constants rule out; a loop's body once."""
    for statement in body:
        if isinstance(statement, ast.If):
            outcome = _value(statement.test, known)
            if outcome is not False:
                yield from _taken(statement.body, known)
            if outcome is not True:
                yield from _taken(statement.orelse, known)
        elif isinstance(statement, (ast.For, ast.While)):
            yield from _taken(statement.body, known)
        else:
            yield statement


def _value(test: ast.expr, known: Mapping[str, object]) -> bool | None:
    """Whether a condition on compile-time constants holds; None if it is on anything else."""
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    if not names <= set(known) or any(isinstance(node, ast.Call) for node in ast.walk(test)):
        return None
    return bool(eval(compile(ast.Expression(test), "<condition of a kernel>", "eval"), {}, dict(known)))


def _follow(
    statement: ast.stmt, function: Any, pointers: dict[str, set[str]], found: Accesses, known: Mapping[str, object]
) -> None:
    """Note what a statement loads and stores, and which names it makes pointers."""
    for call in (node for node in ast.walk(statement) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        ways = {"read"} if name in _READS else {"write"} if name in _WRITES else set()
        ways = {"read", "write"} if name.startswith(_BOTH) else ways
        if ways:
            for pointer in _bases(call.args[0], pointers):
                found.setdefault(pointer, set()).update(ways)
        elif isinstance(call.func, ast.Name):
            _follow_into(call, function, pointers, found, known)
    if isinstance(statement, (ast.Assign, ast.AugAssign)):
        bases = _bases(statement.value, pointers)
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            if isinstance(target, ast.Name) and bases:
                pointers[target.id] = bases | (pointers.get(target.id, set()))


def _follow_into(
    call: ast.Call, function: Any, pointers: dict[str, set[str]], found: Accesses, known: Mapping[str, object]
) -> None:
    """The same of a kernel's own helper that is given pointers."""
    assert isinstance(call.func, ast.Name)
    helper = inspect.unwrap(function).__globals__.get(call.func.id)
    if not hasattr(helper, "arg_names"):
        return
    given = dict(zip(helper.arg_names, call.args)) | {one.arg: one.value for one in call.keywords if one.arg}
    inner = {name: _bases(value, pointers) for name, value in given.items()}
    constants = {n: known[v.id] for n, v in given.items() if isinstance(v, ast.Name) and v.id in known}
    for statement in _taken(_body(helper.fn), constants):
        _follow(statement, helper.fn, inner, found, constants)


def _bases(expression: ast.expr, pointers: Mapping[str, set[str]]) -> set[str]:
    """The arguments to which an address belongs; numbers that are loaded, and dtypes of pointers, are no addresses."""
    if isinstance(expression, (ast.Call, ast.Attribute)):
        return set()
    if isinstance(expression, ast.Name):
        return set(pointers.get(expression.id, ()))
    return {
        base
        for child in ast.iter_child_nodes(expression)
        if isinstance(child, ast.expr)
        for base in _bases(child, pointers)
    }
