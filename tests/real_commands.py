"""Runs commands one after the other in one process, as python would each alone: python real_commands.py COMMANDS.json.

Status, output and errors of command i go to i.json in the working folder; the last one keeps this process's own output.
"""

import json
import os
import runpy
import sys
from pathlib import Path

commands = json.loads(Path(sys.argv[1]).read_text())
own = [os.dup(stream) for stream in (1, 2)]
for number, sys.argv in enumerate(commands):
    status, last = 0, number == len(commands) - 1
    names = [f"{number}.output", f"{number}.errors"]
    for stream, name in enumerate(names, start=1):
        os.dup2(own[stream - 1] if last else os.open(name, os.O_CREAT | os.O_WRONLY), stream)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    if not last:
        sys.stdout.flush()
        Path(f"{number}.json").write_text(json.dumps([status, *(Path(name).read_text() for name in names)]))
