"""The kind of click command that every entry point is."""

import logging
import os
import sys

import click
import mlflow

# Before anything imports TensorFlow: its greetings would stand between the user and what a step says.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def set_up_logging():
    """Has what our steps say, and warnings of others, written to standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("carflavor").setLevel(logging.INFO)


class StepCommand(click.Command):
    """A command that answers a refused input with one sentence and an interruption with the shell's exit code.

    A step raises ValueError, OSError or MlflowException for what its user can mend. The traceback is not lost: it is
    the artifact `error.txt` of the run. What went well returns, as a function does: a job of Databricks runs Python
    files in IPython, which takes `SystemExit` for a failure, whatever its code.
    """

    def main(self, *args, **options):
        try:
            return super().main(*args, **options)
        except SystemExit as end:
            if end.code:
                raise

    def invoke(self, context):
        set_up_logging()
        try:
            return super().invoke(context)
        except (ValueError, OSError, mlflow.MlflowException) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            context.exit(130)  # 128 + SIGINT, as shells count
        except Exception as error:
            # Of packages that need not be installed: no login, a storage account behind a firewall, a slow upload.
            if not any(base.__module__.startswith(("azure.", "azureml.")) for base in type(error).__mro__):
                raise
            raise click.ClickException(f"Azure: {' '.join(str(error).split())}") from error


class OrWord(click.ParamType):
    """One word, or a value of another click type.

    Args:
        word: What is passed on as it is, such as `auto`.
        click_type: Type of everything else.
    """

    def __init__(self, word, click_type):
        self.name = f"{word} or {click_type.name}"
        self._word = word
        self._click_type = click_type

    def convert(self, value, param, ctx):
        if value == self._word:
            return value
        try:
            return self._click_type.convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message.rstrip('.')}, nor the word {self._word}.", param, ctx)
