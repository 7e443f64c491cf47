"""The `snax` command. A subcommand's module is imported when it runs, so that `snax --help` starts at once."""

import contextlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterator, Sequence

import cyclopts
import pydantic
from tqdm import tqdm

from .config_errors import describe

app = cyclopts.App(
    name="snax",
    help="The SNAC neural audio codec.",
    version=lambda: importlib.metadata.version("snax-codec"),
    default_parameter=cyclopts.Parameter(negative=()),
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command(add_to_startup=False)
app.command("snax.files.command:encode", help="Encode audio files to codes: a.wav to a.codes.safetensors.")
app.command("snax.files.command:decode", help="Decode files of codes to audio: a.codes.safetensors to a.snac.wav.")
app.command("snax.files.command:reconstruct", help="Encode and decode audio files: a.wav to a.snac.wav.")
app.command("snax.files.command:info", help="Print facts about models, audio files, files of codes and extractions.")
app.command("snax.serve.command:serve", help="Decode streams of tokens to speech over WebSocket and HTTP.")
app.command("snax.evaluate.command:report", help="Write an HTML page to compare audio before and after the codec.")
app.command("snax.extract.command:extract", help="Tokenize a corpus to Parquet shards. Run it again to resume.")
app.command("snax.train.command:train", help="Train or fine-tune a codec. Run it again to resume.")
app.command("snax.evaluate.command:evaluate", name="eval", help="Score a model on audio: distances, STOI, PESQ, codes.")
app.command("snax.weights.command:convert", help="Convert weights from PyTorch to Orbax, or back.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0, 1 if some inputs failed, 2 if the command could not run, 130 if it was interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "-" in arguments and "--" not in arguments:
        # cyclopts reads a lone hyphen as an option, unless it follows `--`.
        arguments = [argument for argument in arguments if argument != "-"] + ["--", "-"]
    with _logging_to_stderr():
        log = logging.getLogger("snax")  # `__name__` is `__main__` under `python -m snax.cli`
        try:
            code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
            return int(code or 0)
        except cyclopts.CycloptsError as error:
            log.error("%s See `%s --help`.", _message(error), " ".join(["snax", *(error.command_chain or ())]))
            return 2
        except (ValueError, OSError, ImportError) as error:
            log.error("%s", error)
            return 2
        except KeyboardInterrupt:
            log.error("interrupted.")
            return 130


def _message(error: cyclopts.CycloptsError) -> str:
    if isinstance(error, cyclopts.MissingArgumentError) and error.argument is not None:
        positional = error.argument.index is not None
        return f"{error.argument.name.strip('-').upper() if positional else error.argument.name} is missing."
    if isinstance(error.__cause__, pydantic.ValidationError):
        return describe(error.__cause__, options=True)
    return str(error)


class _TqdmHandler(logging.Handler):
    """Writes log lines to standard error, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    logger, handler = logging.getLogger("snax"), _TqdmHandler()
    handler.setFormatter(logging.Formatter("snax: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries such as absl add a handler to the root logger
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
