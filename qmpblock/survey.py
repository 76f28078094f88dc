"""Survey: which journals there are, on this host and beside images, of changes not finished."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qmpblock.errors import RecordError, printable
from qmpblock.journal import (
    DistrustedError,
    Journal,
    content,
    home_path,
    is_elsewhere,
    of_vm,
    run_of,
    state_directory,
)
from qmpblock.record import VMIdentity

__all__ = ["Survey", "is_of", "journals", "survey"]


@dataclass(frozen=True)
class Survey:
    """What was found of journals.

    :ivar journals: those that can be read.
    :ivar unreadable: one error for each that is ours by its name, and cannot.
    :ivar distrusted: those beside the images that others could have written, and why.
    """

    journals: list[Journal] = field(default_factory=list)
    unreadable: list[RecordError] = field(default_factory=list)
    distrusted: list[tuple[Path, str]] = field(default_factory=list)


def journals(images: tuple[str, ...] = ()) -> Iterator[Journal]:
    """Yield every journal that can be read, as `survey` finds them."""
    yield from survey(images).journals


def survey(images: tuple[str, ...] = ()) -> Survey:
    """Look for every journal on this host: of the state directory, and beside `images`.

    The two files of one change come as one journal. The one beside the image has every entry,
    in their order; which of two entries was the last only it can tell.
    """
    result = Survey()
    found: dict[str, Journal] = {}
    places = [path for path in _list(state_directory(), "", result) if not is_elsewhere(path)]
    elsewhere: dict[Path, str] = {}
    about: dict[Path, tuple[str, ...]] = {}  # the image files that what lies there must be about
    for image in images:
        path = Path(image)
        for other in _list(path.parent, f"{path.name}.qmpblock-", result):
            if is_elsewhere(other):
                elsewhere[other] = image
            else:
                about[other] = (image,)
    places += about
    asked = set(about)
    seen: set[Path] = set()
    while places:
        path = places.pop(0)
        if path in seen:
            continue
        seen.add(path)
        try:
            data = content(path)
            journal = None if data is None else Journal.parse(path, data)
        except RecordError as error:
            if path in about:
                error.files = (*about[path], *(error.files or ()))
            result.unreadable.append(error)
            continue
        except DistrustedError as error:
            if path in asked:
                result.distrusted.append((path, str(error)))
            continue
        if journal is None:
            continue
        record = journal.record
        if record.home:
            places.append(home_path(record))
            about.setdefault(places[-1], (*record.images, *record.files))
        known = found.get(record.run)
        if known is None:
            found[record.run] = journal
        elif known.record == record and known.alone == journal.alone:
            known.paths += journal.paths
            if path.name == home_path(record).name:
                known.entries = journal.entries
        elif path in asked:
            result.distrusted.append((path, f"it contradicts {printable(known.paths[0])}"))
    for path, image in elsewhere.items():
        if run_of(path) not in found:
            _note_elsewhere(image, path, result)
    result.journals.extend(found.values())
    return result


def _note_elsewhere(image: str, path: Path, result: Survey) -> None:
    """Note that the journal of a change to an image lies on another host."""
    try:
        content(path)
    except DistrustedError as error:
        result.distrusted.append((path, str(error)))
        return
    except RecordError:
        pass  # that it is there says it all
    result.unreadable.append(
        RecordError(
            f"a change of {printable(image)} was not finished, and its journal is not here: "
            f"{printable(path)} says that it lies on the host where it was begun, or in another "
            "QMPBLOCK_STATE, because there was no room beside the image",
            standing="nothing was touched",
            remedy=f"run there: qmpblock recover {printable(image)}. If that host is lost: find "
            "out which of the images is the newest before any of them is used, then remove that "
            "file",
            path=path,
            run=run_of(path),
            files=(image,),
        )
    )


def _list(directory: Path, prefix: str, result: Survey) -> list[Path]:
    """List what is a journal by its name, or says that there is one elsewhere."""
    try:
        return sorted(
            path for path in directory.iterdir() if path.name.startswith(prefix) and run_of(path)
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        result.unreadable.append(
            RecordError(
                f"whether journals lie in {printable(directory)} cannot be seen: {error.strerror}",
                standing="nothing was touched",
            )
        )
        return []


def is_of(error: RecordError, vm: VMIdentity) -> bool:
    """Whether a journal that cannot be read is of that QEMU, by its name."""
    return error.path is not None and error.path.name.startswith(of_vm(vm))
