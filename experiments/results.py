"""The file that keeps what a study measured: one JSON, replaced whole after every finished part."""

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
