"""A checkout in; how far a pair travels through its code, and how much of it one must guess, out.

`python benchmarks/shape.py [CHECKOUT]`, where a checkout is a folder with cwpo_dist/ and tests/.

Hops and files are counted while a run goes on, in a process of its own that imports the checkout:
prepare of one pair; then tokens, weigh and the data set of align in the world of tests/world.py;
then one step of its loss in plain torch. A hop is a function of cwpo_dist that was called and that
was handed, or gave back, a pair: a text or id of one, a row of tokens, or a tensor; each function
counts once, and comprehensions and lambdas belong to the function around them. Not run, so not
counted: annotate and reference (the world has their outputs), Ray, and what starts a training.

Everything else is read from the source of cwpo_dist, without running it:
- row accesses: `row["x"]` and `row.get("x")` where `row` is a name of ROWS, but for the files of
  RECORDS, where rows get their types, and of STRANGERS, which read what people bring;
- Any: each time that the name stands in an annotation of an argument, a result or a variable;
- places that list stages: a literal, an import or a class body that holds three stages by name;
- words for a part of the rows: names of functions, arguments and attributes that hold one of
  WORDS, but for those of OF_COLUMNS;
- complex functions: above 10 by ruff's C901, its exceptions too, and by radon where it is on PATH.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROWS = {"row", "pair", "record", "reject", "prompt", "item", "entry", "scored", "r", "p"}
RECORDS = {"records.py", "stored.py"}
STRANGERS = {
    *("arrow_rows.py", "columns.py", "csv_files.py", "data_sets.py", "first_rows.py", "formats.py"),
    *(
        "json_files.py",
        "judged_rows.py",
        "judging.py",
        "layout.py",
        "locate.py",
        "messages.py",
        "parsing.py",
    ),
    *("readers.py", "unread.py", "verdicts.py", "written.py"),
}
STAGES = {
    *("prepare", "tokens", "fit", "annotate", "implicit", "weigh", "sft", "reference", "generate"),
    *("align", "evaluate"),
}
WORDS = (
    *("keep", "selected", "wanted", "only", "watched", "held_out", "few", "mine", "subset"),
    "sample",
)
OF_COLUMNS = {"keep_columns"}  # the setting is named after `keep`, but it names columns, not rows
MARK = "zebra"  # in the text of the pair that is followed through prepare
DEEP = 3  # how far into an argument a pair is looked for
MOST = 10  # complexity


class Hops:
    """A profiler: the functions of a package that hold a pair.

    Attributes:
        found: (file, function) of each.
    """

    def __init__(self, package: Path, marks: tuple[str, ...]) -> None:
        self._package, self._marks = f"{package}{os.sep}", marks
        self.found: set[tuple[str, str]] = set()

    def __call__(self, frame: Any, event: str, result: Any) -> None:
        """As `sys.setprofile` calls it."""
        code = frame.f_code
        if event not in {"call", "return"} or not code.co_filename.startswith(self._package):
            return
        function = code.co_qualname.partition(".<locals>.<")[0]
        place = (code.co_filename.removeprefix(self._package), function)
        if place in self.found or code.co_name.startswith("<"):
            return
        handed = frame.f_locals.values() if event == "call" else (result,)
        if any(self._holds(value, DEEP) for value in list(handed)):
            self.found.add(place)

    def _holds(self, value: Any, deep: int) -> bool:
        kind = type(value)
        if kind in {str, bytes}:
            text = value if kind is str else value.decode("utf-8", "replace")
            return any(mark in text for mark in self._marks)
        if kind.__name__ in {"Tensor", "Row", "RowBatch"}:
            return True
        if deep == 0:
            return False
        if kind.__module__ == "pyarrow.lib" and hasattr(value, "to_pylist"):
            return self._holds(value.to_pylist(), DEEP)
        if isinstance(value, dict):
            return any(self._holds(v, deep - 1) for pair in list(value.items())[:9] for v in pair)
        if isinstance(value, list | tuple | set):
            return any(self._holds(v, deep - 1) for v in list(value)[:9])
        if kind.__module__.startswith("cwpo_dist.") and hasattr(value, "__dict__"):
            return any(self._holds(v, deep - 1) for v in vars(value).values())
        return False


def trace(checkout: Path) -> dict[str, list[str]]:
    """Follows a pair through the checkout that is on `sys.path`: its functions by file."""
    from cwpo_dist.config import PrepareConfig
    from cwpo_dist.stages import align, prepare, tokens, weigh
    from cwpo_dist.storage import Store
    from cwpo_dist.training.loop import gradients

    plain_loop, worlds = (importlib.import_module(name) for name in ("plain_loop", "world"))
    stages: Any = prepare  # what is replaced below has other types there
    stages.run_tasks = lambda task, count, num_cpus: [task(index) for index in range(count)]
    stages._check_placement = lambda num_cpus: None
    specs: list[Any] = []
    trained: Any = align
    trained.train = specs.append
    hops = Hops(checkout / "cwpo_dist", (MARK, "unlabelled-", "prompt unlabelled"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pairs.jsonl"
        pairs = ({"prompt": f"{MARK} {i}", "chosen": f"yes {i}", "rejected": "no"} for i in (1, 2))
        source.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
        world = worlds.World(Path(folder), ["cw"])
        world.score()
        world.log_probs("reference", None, worlds.reference)
        engine = plain_loop.make_engine()

        def followed() -> None:
            settings = PrepareConfig.model_validate({"sources": [{"path": str(source)}]})
            prepare.prepare(Store(f"{folder}/prepared"), settings, seed=0)
            for stage, role in ((tokens, "tokens"), (weigh, "weigh"), (align, "align")):
                node = world.node(role)
                if hasattr(stage, "STAGE"):
                    stage.STAGE.make(world.context, node)
                else:  # a checkout of before stages had records
                    stage.run(world.context.of(node), node)
            task = specs[0].make_task(world.encoder)
            gradients(task, engine, plain_loop.make_run(), 0, [0])

        sys.setprofile(hops)
        try:
            followed()
        finally:
            sys.setprofile(None)
    by_file: dict[str, list[str]] = {}
    for file, function in sorted(hops.found):
        by_file.setdefault(file, []).append(function)
    return by_file


def traced(checkout: Path) -> dict[str, list[str]]:
    """The same in a process that imports the checkout."""
    paths = os.pathsep.join(map(str, (checkout, checkout / "tests")))
    found = subprocess.run(
        [sys.executable, __file__, "--trace", str(checkout)],
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        cwd=checkout,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    by_file: dict[str, list[str]] = json.loads(found.stdout.splitlines()[-1])
    return by_file


def row_accesses(tree: ast.AST) -> int:
    """Reads of a row by a string key."""
    count = 0
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id=row), slice=ast.Constant(value=str())):
                count += row in ROWS
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=row), attr="get"),
                args=[ast.Constant(value=str()), *_],
            ):
                count += row in ROWS
    return count


def any_annotations(tree: ast.AST) -> int:
    """How often `Any` stands in an annotation."""
    annotations: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            annotations.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            annotations.append(node.returns)
    names = (name for found in annotations if found is not None for name in ast.walk(found))
    return sum(isinstance(name, ast.Name) and name.id == "Any" for name in names)


def _named(node: ast.AST) -> list[Any]:
    """What a literal, an import or a class body holds by name."""
    match node:
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return [item.value for item in items if isinstance(item, ast.Constant)]
        case ast.Dict(keys=keys):
            return [key.value for key in keys if isinstance(key, ast.Constant)]
        case ast.ImportFrom(names=names):
            return [name.name for name in names]
        case ast.ClassDef(body=body):
            fields = (item.target for item in body if isinstance(item, ast.AnnAssign))
            return [field.id for field in fields if isinstance(field, ast.Name)]
    return []


def stage_lists(tree: ast.AST) -> int:
    """Literals, imports and class bodies that hold three stages by name."""
    return sum(len(STAGES.intersection(_named(node))) >= 3 for node in ast.walk(tree))


def _names(tree: ast.AST) -> Iterator[str]:
    """Names that the source gives to functions, arguments and attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.ClassDef(body=body):
                fields = (item.target for item in body if isinstance(item, ast.AnnAssign))
                yield from (field.id for field in fields if isinstance(field, ast.Name))


def words(trees: dict[Path, ast.AST]) -> Counter[str]:
    """How many names hold each word for a part of the rows."""
    found_names = (name for tree in trees.values() for name in _names(tree))
    names = [f"_{name}_" for name in found_names if name not in OF_COLUMNS]
    found = Counter({word: sum(f"_{word}_" in name for name in names) for word in WORDS})
    return +found


def complex_functions(checkout: Path) -> dict[str, int | None]:
    """Functions above MOST by each tool; None for one that is not there."""
    package, counts = str(checkout / "cwpo_dist"), dict[str, int | None]()
    ruff = [str(Path(sys.executable).with_name("ruff")), "check", "--isolated", "--select=C901"]
    more = [f"--config=lint.mccabe.max-complexity={MOST}", "--ignore-noqa", "--exit-zero"]
    found = subprocess.run(
        [*ruff, *more, "--output-format=json", package], capture_output=True, check=True
    )
    counts["ruff"] = len(json.loads(found.stdout))
    radon = shutil.which("radon")
    counts["radon"] = None
    if radon is not None:
        found = subprocess.run([radon, "cc", "-j", package], capture_output=True, check=True)
        blocks = {
            (file, block["name"], block["lineno"]): block["complexity"]
            for file, blocks in json.loads(found.stdout).items()
            for block in blocks
            if block["type"] in {"function", "method"}
        }
        counts["radon"] = sum(complexity > MOST for complexity in blocks.values())
    return counts


def shape(checkout: Path) -> dict[str, str]:
    """Each figure by its name."""
    files = sorted((checkout / "cwpo_dist").rglob("*.py"))
    sources = {file: file.read_text() for file in files}
    trees: dict[Path, ast.AST] = {file: ast.parse(text) for file, text in sources.items()}
    ours = [tree for file, tree in trees.items() if file.name not in RECORDS | STRANGERS]
    lines = {file: text.count("\n") for file, text in sources.items()}
    longest = max(files, key=lines.__getitem__)
    by_file, used = traced(checkout), words(trees)
    return {
        "hops from source to loss": str(sum(map(len, by_file.values()))),
        "files from source to loss": str(len(by_file)),
        "row accesses by string key": str(sum(map(row_accesses, ours))),
        "Any in annotations": str(sum(map(any_annotations, trees.values()))),
        "places that list stages": str(sum(map(stage_lists, trees.values()))),
        "words for a part of the rows": f"{len(used)}: "
        + ", ".join(f"{word} {count}" for word, count in used.most_common()),
        **{
            f"functions above {MOST} by {tool}": "not installed" if count is None else str(count)
            for tool, count in complex_functions(checkout).items()
        },
        "longest file": f"{lines[longest]} ({longest.relative_to(checkout)})",
    }


def main() -> None:
    """Prints the table, or what a pair passed through."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--trace", action="store_true", help="only hops, as JSON by file")
    given = parser.parse_args()
    checkout = given.checkout.resolve()
    if given.trace:
        print(json.dumps(trace(checkout)))
        return
    for name, figure in shape(checkout).items():
        print(f"{name:<32}{figure}")


if __name__ == "__main__":
    main()
