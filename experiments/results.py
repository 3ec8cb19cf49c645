"""The file that keeps what a study measured: one JSON, replaced whole after every finished part."""

import argparse
import json
from pathlib import Path

from runtime import monitor
from runtime.options import UserError, differences


class Results:
    """Measurements by section ("runs", "beyond_grid", ...) and key, under the settings that they belong to.

    Raises UserError when the file holds results of other settings.
    """

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.values = {"settings": json.loads(json.dumps(settings))}
        if path.exists():
            stored = monitor.read_json(path)
            if not isinstance(stored, dict) or not all(isinstance(part, dict) for part in stored.values()):
                raise UserError(f"{str(path)!r} holds no results of a study; use another --out")
            listed = differences(stored.get("settings", {}), self.values["settings"])
            if listed:
                raise UserError(
                    f"{str(path)!r} holds results of other settings: {listed}; remove it or use another --out"
                )
            self.values = stored

    def section(self, name: str) -> dict:
        return self.values.get(name, {})

    def add(self, name: str, key: str, value) -> None:
        """Set one entry and write the file."""
        self.values[name] = {**self.section(name), key: rounded(value)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        monitor.write_text(self.path, dumps(self.values))

    def environment(self, described: dict) -> str:
        """Number of an environment, under which it is in the section of that name, added where it is new."""
        known = self.section("environment")
        for number, other in known.items():
            if other == described:
                return number
        self.add("environment", str(len(known) + 1), described)
        return str(len(known) + 1)


def resolve_places(args: argparse.Namespace, out: Path, report: Path) -> None:
    """Set what the command leaves out: --out, and --report, which goes beside an --out that is given.

    Raises UserError for a place that cannot be written.
    """
    args.report = args.report or (report if args.out is None else args.out.with_suffix(".md"))
    args.out = args.out or out
    for option, path in (("--out", args.out), ("--report", args.report)):
        if path.is_dir():
            raise UserError(f"{option} {str(path)!r} is a folder; expected the name of a file")
    for option, folder in (("--work-dir", args.work_dir), ("--out", args.out.parent), ("--report", args.report.parent)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option}: {str(folder)!r} cannot be made ({error.strerror}); choose another") from error


def rounded(value):
    """Floats to seven significant digits, which is what float32 losses have."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def dumps(values: dict) -> str:
    """JSON with a line for every entry of every section, so that a run is one line of a diff."""
    sections = []
    for name, entries in values.items():
        lines = [f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items()]
        sections.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(sections) + "\n}\n"
