"""The three rules of the house, read off the imports: scripts -> prefix -> minigpt; the command line is imported by
scripts alone; no two modules import each other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ["train", "translate", "evaluate"]
FILES = [ROOT / f"{name}.py" for name in SCRIPTS] + [*ROOT.glob("minigpt/**/*.py"), *ROOT.glob("prefix/**/*.py")]
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
COMMANDS = ("main", "parse_arguments")  # the __main__ part of a module that is a command, too


def imports(name, but_of_commands=False):
    """The modules of the project that a module imports, anywhere in it or, on request, outside its __main__ part."""
    nodes, found = [ast.parse(NAMES[name].read_text(encoding="utf-8"))], set()
    while nodes:
        node = nodes.pop()
        is_command = isinstance(node, ast.FunctionDef) and node.name in COMMANDS
        if but_of_commands and (is_command or isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are written in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        nodes += ast.iter_child_nodes(node)
    return {module for module in found if module in NAMES and module != name}


def test_imports_run_from_scripts_to_prefix_to_minigpt():
    floor = {"minigpt": 0, "prefix": 1} | dict.fromkeys(SCRIPTS, 2)
    for name in NAMES:
        for other in imports(name):
            assert floor[other.split(".")[0]] <= floor[name.split(".")[0]], f"{name} imports {other}"
            assert other not in SCRIPTS, f"{name} imports the script {other}"


def test_nothing_but_the_scripts_imports_the_command_line():
    for name in set(NAMES) - set(SCRIPTS):
        assert "prefix.cli" not in imports(name, but_of_commands=True), f"{name} imports prefix.cli"


def test_no_two_modules_import_each_other_even_in_a_roundabout_way():
    arrows = {name: imports(name) - {"minigpt", "prefix"} for name in NAMES}
    done = set()
    while ready := {name for name in arrows if name not in done and arrows[name] <= done}:
        done |= ready
    assert done == set(arrows), f"in a circle: {sorted(set(arrows) - done)}"
