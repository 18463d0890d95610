"""Shared by the tests of a Blackwell GPU that is not there."""

import pytest


@pytest.fixture(scope="module")
def on_blackwell():
    from tests.support.blackwell import blackwell

    with blackwell():
        yield
