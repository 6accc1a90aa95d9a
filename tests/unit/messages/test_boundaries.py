"""Rules over the package's source: who names keys, and who keeps state."""

import ast
from collections.abc import Iterator
from pathlib import Path

import flower_split
from flower_split.messages import keys

ROOT = Path(flower_split.__file__).parent

# Names of Flower's that are ordinary words elsewhere, and the columns of metrics.jsonl.
_WORDS = {"arrays", "metrics", "config", "train_loss", "eval_loss"}


def sources(*, without: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith((without, "proto/")):
            yield name, ast.parse(path.read_text())


def named_keys() -> set[str]:
    found = {value for value in vars(keys).values() if isinstance(value, str)}
    return {v for n, v in vars(keys).items() if n.isupper() and isinstance(v, str)} & found - _WORDS


def test_nobody_outside_messages_names_a_key_or_imports_the_keys() -> None:
    forbidden, found = named_keys(), []
    assert {"flower-split.trunk-token", "num-tokens", "proximal-mu"} <= forbidden
    for name, module in sources(without="messages/"):
        for node in ast.walk(module):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node.value in forbidden or node.value.startswith(keys.PREFIX):
                    found.append(f"{name}:{node.lineno} names {node.value!r}")
            if isinstance(node, ast.ImportFrom):
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                if any(item.startswith("flower_split.messages.keys") for item in whole):
                    found.append(f"{name}:{node.lineno} imports messages.keys")
    assert not found, "\n".join(found)


def test_no_global_statement_and_no_module_level_container_outside_runtime() -> None:
    found = []
    for name, module in sources(without="runtime/"):
        found += [
            f"{name}:{node.lineno} says global"
            for node in ast.walk(module)
            if isinstance(node, ast.Global)
        ]
        changing = _changed_names(module)
        for node in module.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AnnAssign) else []
            for target in targets:
                if isinstance(target, ast.Name) and target.id in changing:
                    found.append(f"{name}:{node.lineno} {target.id} is changed in a function")
    assert not found, "\n".join(found)


_CHANGES = {"append", "add", "update", "setdefault", "pop", "clear", "extend", "remove", "insert"}


def _changed_names(module: ast.Module) -> set[str]:
    """Names of the module that some function changes: ``x[k] = v``, ``del x[k]``, ``x.append()``."""
    changed: set[str] = set()
    for function in ast.walk(module):
        if not isinstance(function, ast.FunctionDef):
            continue
        local = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                local.add(node.id)
        for node in ast.walk(function):
            target: ast.expr | None = None
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                target = node.value
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                target = node.func.value if node.func.attr in _CHANGES else None
            if isinstance(target, ast.Name) and target.id not in local:
                changed.add(target.id)
    return changed
