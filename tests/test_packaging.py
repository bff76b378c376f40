"""Our four package names are plain words: nobody else's distribution may own them in the environment we run in."""

from importlib.metadata import files, packages_distributions

import pytest

PACKAGES = ("addons", "pki", "policies", "proxy")


@pytest.mark.parametrize("package", PACKAGES)
def test_package_name_belongs_to_us_alone(package: str) -> None:
    owners = set(packages_distributions().get(package, ())) - {"outgate"}
    assert owners == set(), f"{owners} also install a package named {package}"


def test_no_installed_distribution_ships_files_under_our_names() -> None:
    for package in PACKAGES:
        for owner in packages_distributions().get(package, ()):
            names = {str(path).split("/")[0] for path in files(owner) or ()}
            assert owner == "outgate" or package not in names
