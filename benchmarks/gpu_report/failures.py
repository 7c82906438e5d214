"""A plugin of pytest (`-p benchmarks.gpu_report.failures`) that saves all results of a run that is cut short.

Every failure is appended with its traceback to the file named by POM_EXT_FAILED as soon as it is reported, and every
test's start and outcome to the file named by POM_EXT_JOURNAL. A process ends after a fatal CUDA error, or if a test
takes longer than POM_EXT_SECONDS: pytest-xdist replaces such a worker; without it the report starts pytest again, which
leaves out the tests in the journal.
"""

import faulthandler
import os
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_report.read import journal
from benchmarks.harness.fatal import LOST, is_fatal

LONGEST_FAILURE, LONGEST_FILE = 20_000, 4 * 2**20  # characters, bytes


def append(path, text):
    """Append and sync. A full disk must not fail the tests."""
    try:
        if path.exists() and path.stat().st_size > LONGEST_FILE:
            return
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        print(f"{path} could not be written: {error}", file=sys.stderr)


def message_of(report):
    """The error itself, not the source around it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else str(report.longrepr)


class Failures:
    """The plugin of the process that gets all reports: the controller of pytest-xdist, or pytest itself."""

    def __init__(self, config):
        self._failed, self._journal = (
            Path(os.environ[name]) if os.environ.get(name) else None for name in ("POM_EXT_FAILED", "POM_EXT_JOURNAL")
        )
        self._lost = set()  # tests that ended their process
        self._runs_tests = not getattr(config.option, "numprocesses", None)
        self._is_counted = False

    def _note(self, word, test=""):
        if self._journal:
            append(self._journal, f"{word} {test}\n")

    def _failure(self, test, when, text):
        if self._failed:
            append(self._failed, f"===== {test} ({when})\n{text[:LONGEST_FAILURE]}\n\n")

    def pytest_sessionstart(self):
        for test in journal(self._journal)["lost"] if self._journal else ():
            self._note("failed", test)
            self._failure(test, "call", "its process ended, or was stopped, while it ran")
        self._note("begin")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        """Leave out tests that another process of this run began. (Under pytest-xdist the workers collect.)"""
        begun = set(journal(self._journal)["started"] if self._journal else ())
        if left_out := [item for item in items if item.nodeid in begun]:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in begun]

    def pytest_collection_finish(self, session):
        if self._runs_tests:
            self._note("selected", len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        if not self._is_counted:  # every worker has the same tests
            self._is_counted = True
            self._note("selected", len(ids))

    def pytest_runtest_logstart(self, nodeid):
        self._note("start", nodeid)

    def pytest_runtest_logreport(self, report):
        if report.failed and report.when == "???" and report.nodeid in self._lost:
            return  # a worker ended by Worker below
        if report.failed:
            if is_fatal(message_of(report)):
                self._lost.add(report.nodeid)
            self._note("error" if report.when in ("setup", "teardown") else "failed", report.nodeid)
            self._failure(report.nodeid, report.when, report.longreprtext)
        elif report.when == "call" or report.skipped:
            self._note(report.outcome, report.nodeid)
        if report.failed and self._runs_tests and is_fatal(message_of(report)):
            os._exit(LOST)

    def pytest_collectreport(self, report):
        if report.failed:
            self._note("error", report.nodeid)
            self._failure(report.nodeid, "collected", report.longreprtext)

    def pytest_sessionfinish(self):
        self._note("end")


class Limit:
    """Ends a process whose test takes too long, in place of pytest-timeout."""

    def __init__(self, seconds):
        self._seconds = seconds
        self._stderr = os.dup(2)  # not the one that is captured during a test

    def pytest_runtest_logstart(self):
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._stderr)

    def pytest_runtest_logfinish(self):
        faulthandler.cancel_dump_traceback_later()


class Worker:
    """The plugin of a worker of pytest-xdist."""

    @pytest.hookimpl(trylast=True)  # after the report was sent
    def pytest_runtest_logreport(self, report):
        if report.failed and is_fatal(message_of(report)):
            os._exit(LOST)


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")
    config.pluginmanager.register(Worker() if is_worker else Failures(config))
    seconds = float(os.environ.get("POM_EXT_SECONDS", 0))
    if seconds and (is_worker or not getattr(config.option, "numprocesses", None)):
        config.pluginmanager.register(Limit(seconds))
