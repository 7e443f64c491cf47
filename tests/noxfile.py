"""The tests that need no torch, on each Python with the oldest and the newest supported JAX: `make matrix`.

The tests that compare with torch run in CI, with a pinned torch. Each session creates an environment, which takes some
minutes. Pythons that are not installed as `python3.11` and so on are skipped.
"""

import re
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parents[1]
# test_docs.py runs code that imports torch, and test_packaging.py creates environments.
EXCLUDED = ("test_docs.py", "test_packaging.py")
NEED_TORCH = re.compile(
    r"^(?:import|from) (?:torch|snac)\b|^from helpers.* import .*\b(?:reference|pairs|torch_training)\b"
    r"|^from helpers\.(?:reference|pairs|torch_training)\b",
    re.MULTILINE,
)
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
OLDEST = [line.replace(">=", "==") for line in DEPENDENCIES if re.match(r"(jax|flax|orbax)\b", line)]
NEWEST = ["--upgrade", "jax", "flax", "orbax-checkpoint"]


@nox.session(python=["3.11", "3.12", "3.13"], venv_backend="venv")
@nox.parametrize("versions", [nox.param(OLDEST, id="oldest"), nox.param(NEWEST, id="newest")])
def tests(session: nox.Session, versions: list[str]) -> None:
    """Run the tests that need no torch."""
    session.chdir(ROOT)
    session.install(
        "--editable",
        ".[av,cluster,eval,serve,train]",
        "beartype",
        "httpx2",
        "hypothesis",
        "playwright",
        "pytest",
        *versions,
    )
    session.run("python", "-c", "import flax, jax; print('jax', jax.__version__, 'flax', flax.__version__)")
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.name not in EXCLUDED]
    files = [path for path in files if not NEED_TORCH.search(path.read_text())]
    session.run("pytest", "--quiet", *map(str, files), *session.posargs)
