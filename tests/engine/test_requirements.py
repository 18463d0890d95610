"""Every dependency is pinned to the version that was tested, so that an audit of the list is an audit of what runs.

`pip install pip-audit; pip-audit -r requirements.txt` asks the advisory database, over the network; CI has none.
"""

from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.requirements import Requirement

from engine import catalog
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


def front_matters():
    """Of the ordinary Space and of the one on ZeroGPU: key -> value, a list where it is one."""
    said = (ROOT / "README.md").read_text(encoding="utf-8").split("---")[1]
    lent = (ROOT / "assets" / "docs" / "deploy.md").read_text(encoding="utf-8").split("```yaml")[1].split("```")[0]
    for text in (said, lent):
        pairs = (line.partition(": ") for line in text.strip().splitlines())
        yield {
            key: value.strip("[]").split(", ") if value.startswith("[") else value.strip('"') for key, _, value in pairs
        }


def test_both_spaces_run_the_tested_gradio_and_the_same_app():
    ordinary, lent = front_matters()
    for said in (ordinary, lent):
        assert said["sdk_version"] == version("gradio") and said["python_version"] == "3.12"
        assert (ROOT / said["app_file"]).is_file() and len(said["short_description"]) <= 60
    assert {
        key: ordinary[key] for key in ordinary if key not in ("suggested_hardware", "startup_duration_timeout")
    } == {key: lent[key] for key in ordinary if key not in ("suggested_hardware", "startup_duration_timeout")}
    assert (ROOT / lent["thumbnail"].partition("/resolve/main/")[2]).is_file()


def test_a_space_fetches_models_that_everybody_may_have():
    _, lent = front_matters()
    free = {spec.source for spec in catalog.MODELS.values() if spec.licence == "Apache-2.0" and not spec.gated}
    assert set(lent["preload_from_hub"]) == set(lent["models"]) <= free
