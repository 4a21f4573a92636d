"""Versions of the packages that a run's numbers depend on."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("nybble", "torch", "triton", "transformers", "accelerate", "datasets", "safetensors")


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """By name, those of `packages` that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
