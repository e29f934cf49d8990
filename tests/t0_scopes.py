"""Handlers may be begun by hand, with a deadline that is entered late: whoever opens a scope in one says so first.

``services/deadline`` has the reason. A scope that opens untold would lose the operation its deadline.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "benchfs_fuse"
#: Where the code is that handlers reach before they have waited for anything.
REACHED = (
    "fuse.py",
    "rpc/client.py",
    *(
        f"services/{name}.py"
        for name in ("file_locks", "files", "jobs", "namespace", "parallel", "remote_chunks", "space", "write_behind")
    ),
)
OPENING = {
    "CancelScope",
    "move_on_after",
    "move_on_at",
    "fail_after",
    "fail_at",
    "open_nursery",
    "sleep",
    "sleep_until",
}
#: What runs in tasks of its own, before there are any handlers, or behind something that was waited for.
BEHIND = {
    "fuse.py": {"_drop_later", "_let_go"},
    "rpc/client.py": {
        *("_send", "keep", "_locate", "_connect", "_beat", "say_goodbye", "run", "open_links", "_ask"),
    },
    "services/files.py": {"run", "open_files"},
    "services/file_locks.py": {"open_locks"},
    "services/jobs.py": {"run", "persist"},
}


def untold(tree: ast.Module, behind: set[str]) -> Iterator[str]:
    """Name the lines of functions that open a scope without ``before_waiting()`` in the line before."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or function.name in behind:
            continue
        for node in ast.walk(function):
            for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
                if isinstance(body, list):
                    for before, statement in zip([None, *body], body, strict=False):
                        if opens(statement) and not (before is not None and ast.unparse(before) == "before_waiting()"):
                            yield f"{function.name}, line {statement.lineno}"


def opens(statement: ast.stmt) -> bool:
    """Tell whether a statement itself, not one within it, calls what opens a scope."""
    if isinstance(statement, ast.With | ast.AsyncWith):
        own: list[ast.AST] = [item.context_expr for item in statement.items]
    elif hasattr(statement, "body"):
        own = []
    else:
        own = [statement]
    calls = (node for part in own for node in ast.walk(part) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Attribute) and call.func.attr in OPENING for call in calls)


def test_handlers_say_so_before_they_open_a_scope() -> None:
    found = {
        name: lines
        for name in REACHED
        if (lines := sorted(set(untold(ast.parse((SOURCE / name).read_text()), BEHIND.get(name, set())))))
    }
    assert found == {}


def test_one_that_does_not_is_found() -> None:
    source = (
        "async def told():\n    before_waiting()\n    with trio.move_on_after(1):\n        await x()\n"
        "async def silent():\n    if y:\n        with trio.CancelScope():\n            await x()\n"
        "async def nursery():\n    before_waiting()\n    await x()\n"
        "    async with trio.open_nursery() as z:\n        pass\n"
        "async def elsewhere():\n    await trio.sleep(1)\n"
    )
    assert list(untold(ast.parse(source), {"elsewhere"})) == ["silent, line 7", "nursery, line 12"]
