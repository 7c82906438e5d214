"""The command line, called in this process."""

from typer.testing import CliRunner

from pom_ext.cli import app


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_fails(result, *texts):
    """One line on stderr, exit code 1, no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for text in texts:
        assert text in message
