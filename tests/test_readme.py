"""What the READMEs name is there: files, folders and headings, modules, and the options of the commands."""

import re
from pathlib import Path

import pytest

import evaluate
import train
import translate
from prefix import peft
from prefix.evaluation import attention_maps

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "minigpt/README.md", ROOT / "prefix/README.md"]
COMMANDS = {
    "train.py": train,
    "translate.py": translate,
    "evaluate.py": evaluate,
    "-m prefix.peft": peft,
    "-m prefix.evaluation.attention_maps": attention_maps,
}
COMMAND = re.compile(r"python ((?:-m )?[\w./]+)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
TORCHRUN = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr"}

every_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture
def options(monkeypatch, capsys):
    """{command: the names of its options}, as its --help lists them."""
    monkeypatch.setenv("COLUMNS", "500")  # no name is cut at its hyphen
    monkeypatch.setattr("sys.argv", ["command", "--help"])
    listed = {}
    for name, module in COMMANDS.items():
        with pytest.raises(SystemExit):
            module.parse_arguments()
        listed[name] = set(re.findall(r"^ +(?:-h, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    return listed


def commands(text):
    """(command, the rest of its part of the line) for each python that is run in a README."""
    for line in text.splitlines():
        for part in re.split(r"&&|`", line):
            if found := COMMAND.search(part):
                yield found[1], part[found.end() :]


def headings(path):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@every_readme
def test_a_readme_has_at_most_200_lines(readme):
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 200


@every_readme
def test_a_link_of_a_readme_leads_to_a_file_and_its_heading(readme):
    for path, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", readme.read_text(encoding="utf-8")):
        target = readme.parent / path
        assert target.exists(), path
        assert not anchor or anchor in headings(target), f"{path}#{anchor}"


@every_readme
def test_a_module_page_or_folder_that_a_readme_names_exists(readme):
    """A module's name may stand for any folder below. runs/ and what begins with / or $ are the reader's."""
    text = readme.read_text(encoding="utf-8")
    for path in set(re.findall(r"(?<![\w./])[\w./-]+\.(?:py|md)\b", text)):
        there = any((folder / path).exists() for folder in (ROOT, readme.parent))
        assert there or ("/" not in path and [*readme.parent.glob(f"**/{path}")]), path
    for path in set(re.findall(r"(?<![\w./$-])(?:minigpt|prefix|tests)/[\w/]*", text)):
        assert (ROOT / path).exists() or [*ROOT.glob(f"{path}.*")], path


def test_the_first_readme_names_every_module():
    text = READMES[0].read_text(encoding="utf-8")
    for path in [*ROOT.glob("minigpt/*.py"), *ROOT.glob("prefix/*.py"), *ROOT.glob("prefix/data/*.py")]:
        assert path.name == "__init__.py" or path.name in text, path


def test_the_first_readme_says_how_to_train_on_several_gpus_and_machines():
    assert TORCHRUN <= {*OPTION.findall(READMES[0].read_text(encoding="utf-8"))}


@every_readme
def test_a_command_or_an_option_that_a_readme_names_is_there(readme, options):
    text = readme.read_text(encoding="utf-8")
    for name, rest in commands(text):
        if name in options:
            assert {*OPTION.findall(rest)} <= options[name], f"{name}{rest}"
        else:
            module = name.removeprefix("-m ")
            where = f"{module.replace('.', '/')}.py" if name != module else name
            assert module in ("pytest", "venv") or (ROOT / where).exists(), name
    assert {*OPTION.findall(text)} - TORCHRUN <= set().union(*options.values())
