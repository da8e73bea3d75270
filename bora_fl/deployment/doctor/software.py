"""Versions: what is installed against what this package asks for."""

import platform
import re
from collections.abc import Iterable, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bora_fl.config import extras
from bora_fl.deployment.doctor.finding import Finding


def check_python(version: str, wanted: str) -> Finding:
    """Compare Python's version with ``requires-python``."""
    if SpecifierSet(wanted).contains(version):
        return Finding("python", "pass", version)
    return Finding("python", "fail", f"{version} is not {wanted}", "make the environment with another Python")


def check_requirement(requirement: Requirement, installed: str | None) -> Finding:
    """Compare an installed version with a requirement.

    Args:
        requirement: Such as ``flwr[simulation]<1.43,>=1.41``.
        installed: The version, None if it is missing.
    """
    remedy = f'pip install "{requirement}" with --constraint constraints.txt'
    if installed is None:
        return Finding(requirement.name, "fail", "is not installed", remedy)
    if requirement.specifier.contains(installed, prereleases=True):
        return Finding(requirement.name, "pass", installed)
    return Finding(requirement.name, "fail", f"{installed} is not {requirement.specifier}", remedy)


def check_versions() -> list[Finding]:
    """Check Python, every dependency, and what is installed of the extras; those in order share one line."""
    try:
        package = metadata.metadata("bora-fl")
    except metadata.PackageNotFoundError:
        text = "bora-fl is not installed here, so that the versions it needs are not known"
        return [Finding("versions", "warn", text, "pip install bora-fl, the same version at the server and all sites")]
    wanted = [Requirement(text) for text in metadata.requires("bora-fl") or ()]
    applying = [r for r in wanted if _applies(r, "")]
    optional = [r for r in wanted if r not in applying and any(_applies(r, extra) for extra in extras.EXTRAS)]
    applying += [r for r in optional if _installed(r.name)]
    findings = [check_python(platform.python_version(), package["Requires-Python"])]
    findings += [check_requirement(requirement, _installed(requirement.name)) for requirement in applying]
    named = {f.subject: f.text for f in findings} | {"bora-fl": package["Version"]}
    return [_summary(named, findings), *(finding for finding in findings if finding.level != "pass")]


def _summary(versions: Mapping[str, str], findings: Iterable[Finding]) -> Finding:
    """One line of the versions that matter when server and sites are compared."""
    main = ("bora-fl", "python", "torch", "flwr", "transformers", "peft", "opacus")
    right = sum(finding.level == "pass" for finding in findings)
    text = ", ".join(f"{name} {versions[name]}" for name in main if re.match(r"\d", versions.get(name, "")))
    return Finding("versions", "pass", f"{text}; {right} requirements are met")


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
