"""The documents hang together: links lead somewhere, the README stays short, and what it repeats is what it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / room / "README.md" for room in ("engine", "ui", "tests")),
    *sorted((ROOT / "assets").glob("*/*.md")),
    ROOT / ".github" / "CONTRIBUTING.md",
]
LINK = re.compile(r"""(?:\]\(|src="|href=")([^)"\s]+)""")


def prose(file):
    """A document without its programs, and without what is quoted as one."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL))


def anchors(file):
    """Headings as GitHub names them in an address."""
    kept = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", kept, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def rows(table):
    """A table in Markdown, as one dictionary a row."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [dict(zip(split[0], line, strict=True)) for line in split[2:]]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(file):
    for link in LINK.findall(prose(file)):
        path, _, anchor = link.partition("#")
        if ":" in path:  # elsewhere
            continue
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{link} is not there"
        if target.is_dir():
            target /= "README.md"
        assert not anchor or anchor in anchors(target), f"{link} has no such heading"


def test_the_readme_is_read_at_one_sitting():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200


def test_the_readmes_first_two_programs_start_and_test():
    """.ci/run takes the test command from there."""
    start = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Start\n")[1]
    first, second = re.findall(r"^```bash\n(.*?)^```", start, re.MULTILINE | re.DOTALL)[:2]
    assert first.splitlines()[-1] == "python app.py" and second.splitlines()[-1] == "python -m pytest"


def test_the_readmes_results_are_rows_of_the_table_of_all_runs():
    said = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = (ROOT / "assets" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    results = rows(said.split("<!-- results -->")[1].split("<!-- /results -->")[0])
    table = rows(measured.split("<!-- benchmarks -->")[1].split("<!-- /benchmarks -->")[0])
    assert 1 <= len(results) <= 8
    for row in results:
        assert any(row.items() <= whole.items() for whole in table), row


@pytest.mark.parametrize("room", ["engine", "ui"])
def test_a_rooms_readme_names_every_module(room):
    said = (ROOT / room / "README.md").read_text(encoding="utf-8")
    files = [file for file in (ROOT / room).rglob("*") if file.suffix in (".py", ".js") and file.parent.name != "words"]
    modules = [file.name for file in files if file.name != "__init__.py"]
    assert [name for name in modules if f"`{name}`" not in said and f"/{name}`" not in said] == []
