"""Serialization of jobs, tasks and messages between processes: JSON.

Python's own JSON, since it holds infinity and whole numbers beyond 64 bits, which a client may send; msgspec's JSON and MessagePack
do not. A float comes back with the same bits. The format is private to one version of the program.
"""

import json
from typing import Any

from msgspec import convert, to_builtins

from launcher.job.job import Job
from launcher.job.messages import Command, Event
from launcher.job.tasks import Task


def write(value: Any) -> str:
    """One line of JSON, for the reader of this kind of value below."""
    return json.dumps(to_builtins(value))


def read_job(text: str | bytes) -> Job:
    """A job that `write` wrote."""
    return convert(json.loads(text), Job)


def read_task(text: str | bytes) -> Task:
    """A task that `write` wrote."""
    task: Task = convert(json.loads(text), Task)
    return task


def read_event(text: str | bytes) -> Event:
    """An event that `write` wrote."""
    event: Event = convert(json.loads(text), Event)
    return event


def read_command(text: str | bytes) -> Command:
    """A command that `write` wrote."""
    command: Command = convert(json.loads(text), Command)
    return command


def read_commands(text: str | bytes) -> list[Command]:
    """A list of commands that `write` wrote."""
    return convert(json.loads(text), list[Command])
