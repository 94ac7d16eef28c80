"""Make orchard.pyz: the whole product with its packages in one file that Python runs, for sites without internet.

    ./run pyz [DIRECTORY]      default: dist

Beside it are its SHA-256 and an SBOM (CycloneDX). The same packages make the same bytes: names are sorted, and all files have
the time 1980-01-01. The packages are those of this environment; files that only their own tests need are left out.

At its first start the archive unpacks itself (pyz_main.py says where and why).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "orchard-cluster"
MAIN = "pyz_main.py"
# The first line of the archive, by which a shell runs it.
SHEBANG = b"#!/usr/bin/env python3\n"
_LEFT_OUT = frozenset({"_tests", "tests", "__pycache__", "testing"})
_KEPT_TESTING = "trio/testing"
_LICENCE = re.compile(r"(licen[cs]e|copying|notice|authors)", re.IGNORECASE)
_TIME = (1980, 1, 1, 0, 0, 0)


def distributions() -> list[importlib.metadata.Distribution]:
    """Return the project's runtime packages and what they need, sorted by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = [PROJECT]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for requirement in found[name].requires or ():
            needed, _, marker = requirement.partition(";")
            # The archive leaves out packages that only Windows or an extra needs.
            if "extra" in marker or "nt" in marker.split('"') or "win32" in marker or "python_version" in marker:
                continue
            left.append(re.split(r"[\s<>=!~\[(]", needed.strip(), maxsplit=1)[0])
    return [found[name] for name in sorted(found)]


def files_of(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, bytes]]:
    """Yield the names in the archive and the contents of a package's modules, data and licences."""
    for file in distribution.files or ():
        path = PurePosixPath(file)
        is_info = path.parts[0].endswith(".dist-info")
        if ".." in path.parts or path.suffix in (".pyc", ".pth") or path.parts[0] in ("__editable__", "bin"):
            continue
        if is_info and not (_LICENCE.search(path.name) or "licenses" in path.parts or path.name == "METADATA"):
            continue
        if _LEFT_OUT & set(path.parts) and not str(path).startswith(_KEPT_TESTING):
            continue
        located = Path(str(distribution.locate_file(file)))
        if located.is_file():
            yield str(path), located.read_bytes()


def own_files() -> Iterator[tuple[str, bytes]]:
    """Yield the project's own modules and data, and its licence."""
    for path in (ROOT / "orchard").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield str(PurePosixPath(path.relative_to(ROOT))), path.read_bytes()
    yield "orchard/LICENSE", (ROOT / "LICENSE").read_bytes()


def archive_files() -> dict[str, bytes]:
    """Return the contents of the archive by their names."""
    files = dict(own_files())
    for distribution in distributions():
        if distribution.metadata["Name"] != PROJECT:
            files.update(files_of(distribution))
    return {"__main__.py": (ROOT / "tools" / MAIN).read_bytes(), **files}


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    with path.open("wb") as file:
        file.write(SHEBANG)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name in sorted(files):
                info = zipfile.ZipInfo(name, _TIME)
                info.external_attr = 0o644 << 16
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, files[name], compresslevel=9)
    path.chmod(0o755)


def bill_of_materials(digest: str) -> dict[str, object]:
    """Return the SBOM of an archive with this SHA-256, in CycloneDX 1.5."""
    components = []
    for distribution in distributions():
        name, version = distribution.metadata["Name"], distribution.version
        licence = distribution.metadata["License-Expression"] or distribution.metadata["License"] or ""
        component: dict[str, object] = {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name.lower()}@{version}",
        }
        if licence:
            component["licenses"] = [{"license": {"name": licence.splitlines()[0]}}]
        components.append(component)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "name": "orchard.pyz",
                "version": importlib.metadata.version(PROJECT),
                "hashes": [{"alg": "SHA-256", "content": digest}],
            }
        },
        "components": components,
    }


def main() -> int:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "dist")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "orchard.pyz"
    write_archive(path, archive_files())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (directory / "orchard.pyz.sha256").write_text(f"{digest}  orchard.pyz\n")
    (directory / "orchard.pyz.cdx.json").write_text(json.dumps(bill_of_materials(digest), indent=2) + "\n")
    print(f"{path}: {path.stat().st_size} bytes, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
