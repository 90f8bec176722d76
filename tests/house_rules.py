"""The house rules as functions over syntax trees: each takes source files and returns its offenders, one line each.

`tests/test_house_rules.py` runs every rule over the repository and over a small snippet that breaks it. What a room may
import is in `tests/room_imports.py`; the budgets are at the top, and a change to them says why.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.room_imports import MAY_IMPORT, MAY_IMPORT_LATE, MODULE_MAY_IMPORT, SLOW_PACKAGES, START_MODULE

DISTRIBUTED_ROOM = "megatron3d/comm/"
DISTRIBUTED_MODULES = {"megatron3d/checkpoint/ranks.py", "megatron3d/checkpoint/store.py"}
CUDA_MODULE = "megatron3d/comm/device.py"
ENVIRONMENT_MODULE = "megatron3d/comm/launch.py"
# Other frameworks, which the benchmarks run beside ours: they use torch.distributed and torch.cuda by themselves, and
# learn from environment variables which rank they are.
PEERS_FOLDER = "tools/bench/peers/"
# The one tool of several files: its harness, and how each peer does the work.
BENCHMARKS = "tools.bench."

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_FUNCTION_P90_LINES = 40
MAX_POSITIONAL_ARGUMENTS = 6
# A function that takes a whole run may depend on anything in it. Left are those that build a model or a plan, compare,
# store or print runs, and with the given and draft runs those that parse, check and derive.
MAX_FUNCTIONS_OF_RESOLVED_RUNS, MAX_FUNCTIONS_OF_ANY_RUNS = 39, 60
MIN_TYPED_SHARE = 0.95
MIN_VALUE_MESSAGE_SHARE = 0.80
MAX_ATTR_PROBES_PER_KLINE = 0.5

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the repository root with forward slashes, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the tree; walked once, as most rules look at every node."""
        return list(ast.walk(self.tree))

    @cached_property
    def module(self) -> str:
        """Its import name, such as `megatron3d.pipeline.run`; scripts and tools have their path as one."""
        name = self.path.removeprefix("kernels/").removesuffix(".py").removesuffix("/__init__")
        return name.replace("/", ".")

    @cached_property
    def room(self) -> str:
        """The row of MAY_IMPORT that governs this file."""
        return room_of(self.module)

    def functions(self) -> Iterator[FunctionNode]:
        """Every function and method, nested ones too."""
        return (node for node in self.nodes if isinstance(node, FunctionNode))


Rule = Callable[[list[Source]], list[str]]


def read_sources(root: Path) -> list[Source]:
    """The files the rules are for: the package, the kernels, the tools and the training scripts."""
    paths = [p for folder in ("megatron3d", "kernels", "tools") for p in (root / folder).rglob("*.py")]
    paths += [*root.glob("pretrain_*.py"), *root.glob("setup.py")]
    return [Source(p.relative_to(root).as_posix(), p.read_text()) for p in sorted(paths)]


def room_of(module: str) -> str:
    """The room of one of our modules: `megatron3d.pipeline.run` -> `pipeline`."""
    parts = module.split(".")
    if parts[0] == "megatron3d_kernels":
        return "kernels"
    if parts[0] != "megatron3d":
        return "scripts"
    return parts[1] if len(parts) > 1 else "megatron3d"


# --- Imports ----------------------------------------------------------------------------------------------------------


def imported_modules(source: Source, known: set[str]) -> Iterator[tuple[ast.stmt, str]]:
    """Every module a file imports, with its statement; `from a import b` means a.b where that is in `known`."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node, full if full in known else node.module


def forbidden_imports(sources: list[Source]) -> list[str]:
    """Imports against the arrows of MAY_IMPORT, and anybody importing a script or a tool."""
    known = {source.module for source in sources}
    scripts = {source.module for source in sources if source.room == "scripts"}
    offenders = []
    for source in sources:
        allowed = MAY_IMPORT.get(source.room)
        if allowed is None and source.module != "megatron3d":
            offenders.append(f"{source.path}: room '{source.room}' has no row in MAY_IMPORT")
            continue
        allowed = {source.room, *(allowed or ()), *MODULE_MAY_IMPORT.get(source.module, ())}
        for node, name in imported_modules(source, known):
            if name in scripts and not (name.startswith(BENCHMARKS) and source.module.startswith(BENCHMARKS)):
                offenders.append(f"{source.path}:{node.lineno}: imports the script {name}")
            elif name.split(".")[0] in ("megatron3d", "megatron3d_kernels") and room_of(name) not in allowed:
                offenders.append(f"{source.path}:{node.lineno}: {source.room} may not import {name}")
    return list(dict.fromkeys(offenders))


def pipeline_values_that_act(sources: list[Source]) -> list[str]:
    """Files of pipeline/ other than run.py that import torch: schedules are decided before a tensor exists."""
    return [
        f"{source.path}:{node.lineno}: imports {name}, but only pipeline/run.py acts"
        for source in sources
        if source.room == "pipeline" and source.path != "megatron3d/pipeline/run.py"
        for node, name in imported_modules(source, set())
        if name.split(".")[0] == "torch"
    ]


def import_cycles(sources: list[Source]) -> list[str]:
    """Cycles among our modules, each shown once as a chain."""
    known = {source.module for source in sources}
    graph = {s.module: sorted({n for _, n in imported_modules(s, known)} & known - {s.module}) for s in sources}
    found: dict[frozenset[str], str] = {}
    finished: set[str] = set()

    def follow(module: str, chain: list[str]) -> None:
        if module in chain:
            cycle = chain[chain.index(module) :]
            found.setdefault(frozenset(cycle), " -> ".join([*cycle, module]))
        elif module not in finished:
            for target in graph[module]:
                follow(target, [*chain, module])
            finished.add(module)

    for module in graph:
        follow(module, [])
    return sorted(found.values())


def private_imports(sources: list[Source]) -> list[str]:
    """`from module import _name` from one of our modules: what starts with an underscore belongs to its file."""
    return [
        f"{source.path}:{node.lineno}: imports the private {node.module}.{alias.name}"
        for source in sources
        for node in source.nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron3d")
        for alias in node.names
        if alias.name.startswith("_")
    ]


def imports_out_of_place(sources: list[Source]) -> list[str]:
    """Relative imports, and imports inside functions of anything but optional packages.

    The `main` of a script may import late: it answers mistakes in the options before torch is imported. So may the
    modules in `MAY_IMPORT_LATE`.
    """
    offenders = []
    for source in sources:
        relative = (n for n in source.nodes if isinstance(n, ast.ImportFrom) and n.level > 0)
        offenders += [f"{source.path}:{node.lineno}: relative import" for node in relative]
        for function in source.functions():
            if source.room == "scripts" and function.name == "main":
                continue
            may = MAY_IMPORT_LATE.get(source.module, set())
            for node in ast.walk(function):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                always_there = [n for n in names if n.split(".")[0] in _ALWAYS_THERE and n not in may]
                offenders += [f"{source.path}:{node.lineno}: {n} is imported inside a function" for n in always_there]
    return sorted(set(offenders))


_ALWAYS_THERE = {"megatron3d", "megatron3d_kernels", "torch", "numpy"}


def slow_imports_at_the_start(sources: list[Source]) -> list[str]:
    """Packages of SLOW_PACKAGES that a training run imports before its first step."""
    by_name = {source.module: source for source in sources}
    todo, reached, offenders = [START_MODULE], {START_MODULE}, []
    while todo:
        source = by_name.get(todo.pop())
        if source is None:
            continue
        for node, name in imported_modules(source, set(by_name)):
            if node not in source.tree.body:
                continue  # within a function, or for types alone
            if any(name == slow or name.startswith(slow + ".") for slow in SLOW_PACKAGES):
                offenders.append(f"{source.path}:{node.lineno}: {name} slows the start of every run")
            elif name not in reached:
                reached.add(name)
                todo.append(name)
    return offenders


def missing_future_annotations(sources: list[Source]) -> list[str]:
    """Files without `from __future__ import annotations`; empty files need none."""
    wanted = "from __future__ import annotations"
    return [s.path for s in sources if s.tree.body and wanted not in s.text and not _only_docstring(s)]


def _only_docstring(source: Source) -> bool:
    return len(source.tree.body) == 1 and ast.get_docstring(source.tree) is not None


def class_names_defined_twice(sources: list[Source]) -> list[str]:
    """Public classes of the package that share a name: a reader who meets one must not think of another."""
    found: dict[str, list[str]] = {}
    for source in sources:
        if source.module.startswith("megatron3d."):
            for node in source.tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(source.path)
    return [f"{' and '.join(paths)} both define {name}" for name, paths in sorted(found.items()) if len(paths) > 1]


# --- What is named in one place only ----------------------------------------------------------------------------------


def dotted_names(source: Source) -> Iterator[tuple[int, str]]:
    """Every dotted name a file uses or imports, with its line: `torch.cuda.synchronize`, `os.environ` ..."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            parts = [node.attr]
            base: ast.expr = node.value
            while isinstance(base, ast.Attribute):
                parts.append(base.attr)
                base = base.value
            if isinstance(base, ast.Name):
                yield node.lineno, ".".join([base.id, *reversed(parts)])


def _named_outside(sources: list[Source], names: tuple[str, ...], allowed: Callable[[str], bool]) -> list[str]:
    offenders = []
    for source in sources:
        if not allowed(source.path):
            for line, name in dotted_names(source):
                hit = next((n for n in names if name == n or name.startswith(n + ".")), None)
                offenders += [f"{source.path}:{line}: names {hit}"] if hit else []
    return list(dict.fromkeys(offenders))


def distributed_outside_comm(sources: list[Source]) -> list[str]:
    """torch.distributed anywhere but in comm/, checkpoint/ranks.py, checkpoint/store.py, and the benchmarks' peers."""
    return _named_outside(
        sources,
        ("torch.distributed",),
        lambda p: p.startswith((DISTRIBUTED_ROOM, PEERS_FOLDER)) or p in DISTRIBUTED_MODULES,
    )


def cuda_outside_its_module(sources: list[Source]) -> list[str]:
    """torch.cuda anywhere but in the one module that knows devices, and the benchmarks' peers."""
    return _named_outside(sources, ("torch.cuda",), lambda p: p == CUDA_MODULE or p.startswith(PEERS_FOLDER))


def environment_outside_launch(sources: list[Source]) -> list[str]:
    """The process environment anywhere but in comm/launch.py, and where the benchmarks start their peers."""
    names = ("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv")
    return _named_outside(sources, names, lambda p: p in (ENVIRONMENT_MODULE, PEERS_FOLDER + "start.py"))


def fsync_outside_storage(sources: list[Source]) -> list[str]:
    """os.fsync anywhere but in storage/, which knows the order of fsync and rename; benchmarks may time it."""
    return _named_outside(sources, ("os.fsync",), lambda p: p.startswith(("megatron3d/storage/", "tools/bench/")))


# --- State, errors, unfinished work -----------------------------------------------------------------------------------


def global_statements(sources: list[Source]) -> list[str]:
    """Uses of `global`."""
    return [f"{s.path}:{n.lineno}: global {', '.join(n.names)}" for s, n in _nodes(sources, ast.Global)]


def swallowed_errors(sources: list[Source]) -> list[str]:
    """Bare `except:`, and handlers of Exception or BaseException that neither raise nor use what they caught."""
    offenders = []
    for source, handler in _nodes(sources, ast.ExceptHandler):
        if handler.type is None:
            offenders.append(f"{source.path}:{handler.lineno}: bare except")
        elif {"Exception", "BaseException"} & {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)}:
            inside = [node for statement in handler.body for node in ast.walk(statement)]
            used = any(isinstance(n, ast.Name) and n.id == handler.name for n in inside)
            if not used and not any(isinstance(n, ast.Raise) for n in inside):
                offenders.append(f"{source.path}:{handler.lineno}: catches everything and goes on")
    return offenders


def unfinished_marks(sources: list[Source]) -> list[str]:
    """Words by which authors say that something is not finished."""
    # The rule must name what it forbids; nothing is unfinished here, and no other file may have these words.
    mark = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    return [
        f"{source.path}:{number}: {found.group()}"
        for source in sources
        for number, line in enumerate(source.text.splitlines(), 1)
        if (found := mark.search(line))
    ]


def unsafe_loading(sources: list[Source]) -> list[str]:
    """Formats that execute what they load: pickle and its kin, torch.load without weights_only, allow_pickle."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    offenders = [
        f"{source.path}:{node.lineno}: imports {name}"
        for source in sources
        for node, name in imported_modules(source, set())
        if name.split(".")[0] in modules
    ]
    for source, call in _nodes(sources, ast.Call):
        given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        if ast.unparse(call.func) == "torch.load" and given.get("weights_only") is not True:
            offenders.append(f"{source.path}:{call.lineno}: torch.load without weights_only=True")
        if given.get("allow_pickle"):
            offenders.append(f"{source.path}:{call.lineno}: allow_pickle=True")
    return offenders


def _nodes(sources: list[Source], kind: type[ast.AST]) -> Iterator[tuple[Source, ast.AST]]:
    return ((source, node) for source in sources for node in source.nodes if isinstance(node, kind))


# --- Budgets ----------------------------------------------------------------------------------------------------------


def long_files(sources: list[Source]) -> list[str]:
    """Files over MAX_FILE_LINES."""
    counts = ((s.path, len(s.text.splitlines())) for s in sources)
    return [f"{path}: {count} lines, over {MAX_FILE_LINES}" for path, count in counts if count > MAX_FILE_LINES]


def long_functions(sources: list[Source]) -> list[str]:
    """Functions over MAX_FUNCTION_LINES, docstring included."""
    return [
        f"{source.path}:{function.lineno}: {function.name} has {length(function)} lines, over {MAX_FUNCTION_LINES}"
        for source in sources
        for function in source.functions()
        if length(function) > MAX_FUNCTION_LINES
    ]


def functions_too_long_on_the_whole(sources: list[Source]) -> list[str]:
    """The longest tenth of all functions, if it does not lie under MAX_FUNCTION_P90_LINES."""
    lengths = sorted((length(f), f"{s.path}:{f.lineno}: {f.name}") for s in sources for f in s.functions())
    if not lengths or (p90 := lengths[int(0.9 * (len(lengths) - 1))][0]) < MAX_FUNCTION_P90_LINES:
        return []
    longest = [f"{where} has {lines} lines" for lines, where in reversed(lengths) if lines >= MAX_FUNCTION_P90_LINES]
    return [f"nine in ten functions must be under {MAX_FUNCTION_P90_LINES} lines; p90 is {p90}", *longest]


def length(function: FunctionNode) -> int:
    """Lines of a function from `def` to its end."""
    return function.end_lineno - function.lineno + 1


def too_many_arguments(sources: list[Source]) -> list[str]:
    """Functions that take more than MAX_POSITIONAL_ARGUMENTS by position, self, cls and ctx aside."""
    offenders = []
    for source in sources:
        for function in source.functions():
            names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
            count = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
            if count > MAX_POSITIONAL_ARGUMENTS and not _is_triton_kernel(function):
                offenders.append(f"{source.path}:{function.lineno}: {function.name} takes {count} by position")
    return offenders


def functions_of_whole_runs(sources: list[Source]) -> list[str]:
    """Few functions take a whole run; the others take the sections they need."""
    package = [source for source in sources if source.path.startswith("megatron3d/")]
    found = []
    for names, most in (
        ({"RunConfig"}, MAX_FUNCTIONS_OF_RESOLVED_RUNS),
        ({"RunConfig", "DraftRun", "GivenRun"}, MAX_FUNCTIONS_OF_ANY_RUNS),
    ):
        takers = [f"{s.path}:{f.lineno}: {f.name}" for s in package for f in s.functions() if _takes(f, names)]
        if len(takers) > most:
            found.append(f"{len(takers)} functions take {' or '.join(sorted(names))}, over {most}: {', '.join(takers)}")
    return found


def _takes(function: FunctionNode, names: set[str]) -> bool:
    arguments = [node.annotation for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    within = [node for annotation in arguments if annotation is not None for node in ast.walk(annotation)]
    return any(isinstance(node, ast.Name) and node.id in names for node in within)


def _is_triton_kernel(function: FunctionNode) -> bool:
    """Kernels take one pointer, stride and size each; Triton has no dataclasses."""
    decorators = (ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list)
    return any(decorator.split(".")[-1] in ("jit", "autotune", "heuristics") for decorator in decorators)


def missing_docstrings(sources: list[Source]) -> list[str]:
    """Modules (unless empty), public classes and public functions and methods without a docstring."""
    offenders = []
    for source in sources:
        if source.tree.body and ast.get_docstring(source.tree) is None:
            offenders.append(f"{source.path}:1: module")
        for name, node in _public_definitions(source.tree.body):
            if ast.get_docstring(node) is None:
                offenders.append(f"{source.path}:{node.lineno}: {name}")
    return offenders


def _public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, FunctionNode | ast.ClassDef]]:
    for node in body:
        if isinstance(node, (FunctionNode, ast.ClassDef)) and not node.name.startswith("_") and not _repeats(node):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public_definitions(node.body, f"{prefix}{node.name}.")


def _repeats(node: FunctionNode | ast.ClassDef) -> bool:
    """Overloads and property setters are documented where they are first defined."""
    return any(ast.unparse(d).endswith((".setter", "overload")) for d in node.decorator_list)


def untyped_functions(sources: list[Source]) -> list[str]:
    """Functions with an unannotated argument or result, if fewer than MIN_TYPED_SHARE have all; kernels aside."""
    functions = [(s, f) for s in sources for f in s.functions() if not _is_triton_kernel(f)]
    untyped = [f"{s.path}:{f.lineno}: {f.name}" for s, f in functions if not _is_typed(f)]
    return _under_share(untyped, len(functions), MIN_TYPED_SHARE, "functions are typed")


def _is_typed(function: FunctionNode) -> bool:
    spec = function.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    if arguments and arguments[0].arg in ("self", "cls"):
        arguments = arguments[1:]
    return function.returns is not None and all(a.annotation is not None for a in arguments)


def messages_without_a_value(sources: list[Source]) -> list[str]:
    """Raised messages that are a constant string, if fewer than MIN_VALUE_MESSAGE_SHARE name a value."""
    calls = [(s, n.exc) for s, n in _nodes(sources, ast.Raise) if isinstance(n.exc, ast.Call) and n.exc.args]
    calls = [(s, call) for s, call in calls if ast.unparse(call.func) not in ("SystemExit", "StopIteration")]
    constant = [f"{s.path}:{c.lineno}: {ast.unparse(c)[:100]}" for s, c in calls if _is_constant(c)]
    return _under_share(constant, len(calls), MIN_VALUE_MESSAGE_SHARE, "raised messages name a value")


def _is_constant(call: ast.Call) -> bool:
    return all(isinstance(argument, ast.Constant) for argument in call.args)


def _under_share(offenders: list[str], total: int, wanted: float, what: str) -> list[str]:
    share = 1 - len(offenders) / max(1, total)
    return [f"{share:.1%} of {total} {what}, under {wanted:.0%}", *offenders] if share < wanted else []


def attribute_probes(sources: list[Source]) -> list[str]:
    """hasattr, and getattr with a default, if there are MAX_ATTR_PROBES_PER_KLINE or more per 1000 lines."""
    probes = []
    for source, call in _nodes(sources, ast.Call):
        name = ast.unparse(call.func)
        if name == "hasattr" or (name == "getattr" and len(call.args) == 3):
            probes.append(f"{source.path}:{call.lineno}: {ast.unparse(call)[:100]}")
    klines = max(1.0, sum(len(s.text.splitlines()) for s in sources) / 1000)
    if len(probes) / klines < MAX_ATTR_PROBES_PER_KLINE:
        return []
    return [f"{len(probes) / klines:.2f} per 1000 lines, not under {MAX_ATTR_PROBES_PER_KLINE}", *probes]
