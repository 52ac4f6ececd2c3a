"""Shape comments: run code and compare the comment behind each line with the tensor that the line made."""

import ast
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

SHAPE = r"\((?:[\w/.]+(?:, )?)*\)"


def wrong_shapes(modules: list[ModuleType], sizes: dict[str, int], work: Callable[[], object],
                 own: dict[str, Callable[[dict], dict[str, int]]] | None = None) -> list[str]:
    """What is wrong with the shape comments of these modules while `work` runs.

    sizes    of each letter
    own      name of a function -> its local variables -> letters that have another size in it
    returns  lines whose tensor has another shape, and lines that made no tensor
    """
    sources = {module.__file__: Path(module.__file__).read_text(encoding="utf-8") for module in modules}
    said = {file: comments_of(source) for file, source in sources.items()}
    statements = {file: statements_of(source, said[file]) for file, source in sources.items()}
    checked, wrong = set(), {}

    def place(file: str, number: int) -> str:
        return f"{Path(file).name}:{number}: {sources[file].splitlines()[number - 1].strip()}"

    def compare(frame, number: int, made: list) -> None:
        file, local = frame.f_code.co_filename, frame.f_locals
        here = {**sizes, **(own or {}).get(frame.f_code.co_name, lambda _: {})(local)}
        shapes = said[file][number]
        shapes = shapes * len(made) if len(shapes) == 1 else shapes
        if len(shapes) != len(made):
            wrong[file, number] = f"{len(shapes)} shapes for {len(made)} values"
            return
        for shape, tensor in zip(shapes, made, strict=True):
            if isinstance(tensor, torch.Tensor):
                checked.add((file, number))
                if not fits(tensor.shape, shape, here):
                    wrong[file, number] = f"it is {tuple(tensor.shape)}"

    def trace(frame, event, value):
        file = frame.f_code.co_filename
        if file not in sources or frame.f_code.co_name.startswith("<"):     # a comprehension is no statement
            return None
        waiting: list[ast.stmt] = []

        def inside(frame, event, value):
            line = frame.f_lineno
            if event == "exception":        # what raised has made nothing
                waiting[:] = [node for node in waiting if not covers(node, line)]
                return inside
            for node in [node for node in waiting if event == "return" or not covers(node, line)]:
                waiting.remove(node)
                compare(frame, node.end_lineno, [evaluated(frame, name) for name in names_of(node)])
            for number, node in statements[file].items():
                if covers(node, line) and isinstance(node, ast.Return):
                    if event == "return":
                        compare(frame, number, list(value) if isinstance(value, tuple) else [value])
                elif covers(node, line) and event == "line" and node not in waiting:
                    waiting.append(node)
            return inside
        return inside

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return [*(f"{place(*key)}: {problem}" for key, problem in sorted(wrong.items())),
            *(f"{place(file, number)}: never made" for file in sources for number in said[file]
              if (file, number) not in checked)]


def comments_of(source: str) -> dict[int, list[str]]:
    """Number of a line -> the shapes behind it, without their brackets."""
    found = {number: re.search(rf"\S.* # ({SHAPE}(?:, {SHAPE})*)$", line)
             for number, line in enumerate(source.splitlines(), start=1)}
    return {number: re.findall(r"\(([^()]*)\)", match[1]) for number, match in found.items() if match}


def statements_of(source: str, said: dict[int, list[str]]) -> dict[int, ast.stmt]:
    """Number of a last line with a comment -> the statement that it ends."""
    kinds = ast.Assign | ast.AugAssign | ast.Return | ast.Expr
    return {node.end_lineno: node for node in ast.walk(ast.parse(source))
            if isinstance(node, kinds) and node.end_lineno in said}


def names_of(node: ast.stmt) -> list[str]:
    """Expressions for what a statement made: its targets, what it appended, what it filled. The
    rest of a value, `*others`, is no tensor."""
    if isinstance(node, ast.AugAssign):
        return [ast.unparse(node.target)]
    if isinstance(node, ast.Assign):
        return [ast.unparse(item) for target in node.targets
                for item in (target.elts if isinstance(target, ast.Tuple) else [target])
                if not isinstance(item, ast.Starred)]
    call = node.value
    if isinstance(call.func, ast.Attribute) and call.func.attr == "append":
        return [ast.unparse(call.func.value) + "[-1]"]
    if isinstance(call.func, ast.Attribute) and call.func.attr.endswith("_"):
        return [ast.unparse(call.func.value)]
    return [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "out"]


def covers(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= node.end_lineno


def evaluated(frame, expression: str) -> object:
    return eval(expression, frame.f_globals, frame.f_locals)


def fits(shape: torch.Size, words: str, sizes: dict[str, int]) -> bool:
    """Whether a shape is the one that is said; dots stand for any number of leading dimensions."""
    wanted = [word for word in words.split(", ") if word]
    if wanted[:1] == ["..."]:
        wanted, shape = wanted[1:], shape[len(shape) - len(wanted) + 1:]
    return tuple(shape) == tuple(size_of(word, sizes) for word in wanted)


def size_of(word: str, sizes: dict[str, int]) -> int:
    """`3H` is 3 times H, `BT` B times T, `K/2` half of K."""
    top, _, bottom = word.partition("/")
    top, bottom = (math.prod(int(part) if part.isdigit() else sizes[part]
                             for part in re.findall(r"\d+|[A-Z]", product)) for product in (top, bottom))
    return top // bottom
