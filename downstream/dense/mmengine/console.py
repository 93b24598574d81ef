"""Filters what mmengine and its libraries log to the console; the log file in the run's folder has all of it."""

import logging

from mmengine.logging import MMLogger

# The beginnings of messages that are long, or false alarms.
_FOR_THE_FILE = (
    "System environment:",
    "Config:",
    "Hooks will be executed",
    "Distributed training is not used, all SyncBatchNorm",
    "The prefix is not set in metric class",
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
)


def _is_for_the_console(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip("\n- ").startswith(_FOR_THE_FILE)


def shorten_console(logger: MMLogger) -> MMLogger:
    """Keeps an mmengine logger's long messages and false alarms out of the console."""
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(_is_for_the_console)
    return logger
