"""The tests on every Python, with the oldest and the newest JAX that snax takes: `make matrix`.

Those that need no torch: its reference is pinned, and compared with where all tests run. Each environment is made anew
and takes some minutes; Pythons are those that are there by the names python3.11 and so on.
"""

import re
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parents[1]
# What test_docs.py runs imports torch; test_packaging.py makes an environment of its own.
ELSEWHERE = ("test_docs.py", "test_packaging.py")
NEED_TORCH = re.compile(r"^(?:import|from) (?:torch|snac|reference|pairs|torch_training)\b", re.MULTILINE)
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
OLDEST = [line.replace(">=", "==") for line in DEPENDENCIES if re.match(r"(jax|flax|orbax)\b", line)]
NEWEST = ["--upgrade", "jax", "flax", "orbax-checkpoint"]


@nox.session(python=["3.11", "3.12", "3.13"], venv_backend="venv")
@nox.parametrize("versions", [nox.param(OLDEST, id="oldest"), nox.param(NEWEST, id="newest")])
def tests(session: nox.Session, versions: list[str]) -> None:
    """All that need no torch."""
    session.chdir(ROOT)
    session.install("--editable", ".[av,eval,train]", "beartype", "hypothesis", "playwright", "pytest", *versions)
    session.run("python", "-c", "import flax, jax; print('jax', jax.__version__, 'flax', flax.__version__)")
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.name not in ELSEWHERE]
    files = [path for path in files if not NEED_TORCH.search(path.read_text())]
    session.run("pytest", "--quiet", *map(str, files), *session.posargs)
