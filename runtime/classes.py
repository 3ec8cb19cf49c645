"""Classes by name: what a class is called, and which class a name means.

Folders of ImageNet are named by WordNet ids (n02099601); timm's table gives the names that people use for them.
"""

import difflib
import functools
import re

from timm.data import ImageNetInfo

from runtime.options import UserError

# Eight ImageNet classes that differ in subject and background; the DiT paper's repository shows the same.
IMAGENET_CHOICE = (207, 360, 387, 974, 88, 979, 417, 279)
LISTED = 8  # classes at most where none are asked for, or in a message


@functools.cache
def imagenet() -> dict[str, tuple[str, ...]]:
    """WordNet ids of ImageNet's 1,000 classes in the order of their labels, each with its names, the usual first."""
    names = ImageNetInfo().label_descriptions(as_dict=True)
    return {key: tuple(name.strip() for name in text.split(",")) for key, text in names.items()}


def names_of(label: int, classes: list[str] | None) -> tuple[str, ...]:
    """Names of a class, the one to show first: its folder's, or ImageNet's and then the WordNet id; () if unknown."""
    if classes is None or label >= len(classes):
        return ()
    return (*imagenet().get(classes[label], ()), classes[label])


def class_name(label: int, classes: list[str] | None) -> str:
    """The name of a class to show, or its number where names are not known."""
    return (*names_of(label, classes), str(label))[0]


def describe(label: int, classes: list[str] | None) -> str:
    """Number and name, as in "207 golden retriever"; the number alone where there is no other name."""
    name = class_name(label, classes)
    return str(label) if name == str(label) else f"{label} {name}"


def default_labels(classes: list[str] | None, num_classes: int) -> list[int]:
    """Labels to show where none are asked for: eight of ImageNet's, or the first eight of other classes."""
    if classes == list(imagenet()):
        return list(IMAGENET_CHOICE)
    return list(range(min(num_classes, LISTED)))


def find_labels(text: str, classes: list[str] | None, num_classes: int) -> list[int]:
    """Labels of a list of numbers and names with commas between them. Raises UserError."""
    return [find_label(item.strip(), classes, num_classes) for item in text.split(",")]


def find_label(text: str, classes: list[str] | None, num_classes: int) -> int:
    """The label that a number or a name means.

    The case of letters does not count, and an underscore is a space. The name that is shown goes before other names
    of a class, and these before parts of names. Raises UserError when there is no such class, or more than one.
    """
    numbers = f"0 to {num_classes - 1}"
    if not text:
        raise UserError(f"--classes has an empty entry; expected names, or numbers from {numbers}, with commas between")
    if re.fullmatch(r"-?\d{1,18}", text):
        if not 0 <= int(text) < num_classes:
            raise UserError(f"--classes {text} is not a class of the checkpoint; expected a number from {numbers}")
        return int(text)
    if not classes:
        raise UserError(f"--classes {text!r}: the checkpoint does not name its classes; pass numbers from {numbers}")
    found = _matches(text, classes)
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(describe(label, classes) for label in found[:LISTED])
        more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise UserError(f"--classes {text!r} fits {len(found)} classes: {listed}{more}; pass the number of one")
    remedy = f"expected a name such as {names_of(0, classes)[0]!r}, or a number from {numbers}"
    if close := _close(text, classes):
        remedy = f"did you mean {' or '.join(describe(label, classes) for label in close)}?"
    raise UserError(f"--classes {text!r} is not a class of the checkpoint; {remedy}")


def _simplified(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip().casefold()


def _matches(text: str, classes: list[str]) -> list[int]:
    """Labels whose first name is text; failing that, one of whose names is; failing that, contains it."""
    wanted = _simplified(text)
    names = [[_simplified(name) for name in names_of(label, classes)] for label in range(len(classes))]
    first = [label for label, known in enumerate(names) if known[0] == wanted]
    exact = [label for label, known in enumerate(names) if wanted in known]
    return first or exact or [label for label, known in enumerate(names) if any(wanted in name for name in known)]


def _close(text: str, classes: list[str]) -> list[int]:
    """Labels of up to three names that are nearly text."""
    labels = {_simplified(name): label for label in range(len(classes)) for name in names_of(label, classes)}
    return list(dict.fromkeys(labels[name] for name in difflib.get_close_matches(_simplified(text), labels, n=3)))
