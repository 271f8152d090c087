"""Tests on clusters made of namespaces: slow, and skipped with the reason where the programs or
the rights are missing.
"""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = __file__.removesuffix("conftest.py")
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.slow)
            # One worker for all: two clusters at a time would starve each other.
            item.add_marker(pytest.mark.xdist_group("cluster"))
