"""Every dependency is pinned to the version that was tested, so that an audit of the list is an audit of what runs.

`pip install pip-audit; pip-audit -r requirements.txt` asks the advisory database, over the network; CI has none.
"""

from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.requirements import Requirement

from tests.support.running import ROOT

LINES = [
    line.strip()
    for file in ("requirements.txt", "tests/requirements.txt")
    for line in (ROOT / file).read_text().splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.mark.parametrize("line", LINES)
def test_a_dependency_is_pinned_and_that_version_is_installed(line):
    wanted = Requirement(line)
    (pin,) = wanted.specifier
    assert pin.operator == "==" and "*" not in pin.version
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        pytest.skip(f"{wanted.name} is not installed")
    assert found.partition("+")[0] == pin.version
    assert wanted.url is None, "from the index, not from somewhere"


def test_the_space_runs_the_same_gradio():
    front_matter = (ROOT / "README.md").read_text().split("---")[1]
    assert f"sdk_version: {version('gradio')}\n" in front_matter
