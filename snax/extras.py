"""Errors for packages that are installed with an extra only."""


def missing(error: ImportError, extra: str) -> ImportError:
    """An error that says how to install the package that `error` did not find.

    Args:
        error: the failed import.
        extra: the extra of snax that installs the package.
    """
    return ImportError(f"{error.name} is not installed. In a clone of snax, install it with: pip install '.[{extra}]'")
