"""Survey: which journals there are, on this host and beside images, of changes not finished.

What counts is what the state directory says. What lies beside an image counts where that directory
has nothing of the run and a key of this installation proves it; the rest is told to the person.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qmpblock.changes.journal import Journal, home_path
from qmpblock.changes.journalfile import DistrustedError, JournalFile
from qmpblock.changes.record import Record, VMIdentity
from qmpblock.errors import UNTOUCHED, RecordError, printable, shell_words
from qmpblock.host.statedirectory import OpenDirectory, StateDirectory, state_directory
from qmpblock.names import is_beside, is_elsewhere, is_of_vm, run_of_journal

__all__ = ["Survey", "find", "is_of", "is_same_process", "journals", "survey", "unproven"]

#: Journals beside one image that are read. Whoever may write to its directory can make many.
MOST = 1000


@dataclass
class Survey:
    """What was found of journals.

    :ivar journals: those that can be read, and count.
    :ivar unproven: those beside the images that nobody else could have written, as it seems, but
        no key of ours proves, and of which the state directory has nothing.
    :ivar unreadable: one error for each that is ours by its name, and cannot be read.
    :ivar distrusted: those beside the images that others could have written, and why.
    """

    journals: list[Journal] = field(default_factory=list)
    unproven: list[Journal] = field(default_factory=list)
    unreadable: list[RecordError] = field(default_factory=list)
    distrusted: list[tuple[Path, str]] = field(default_factory=list)


def journals(images: tuple[str, ...] = ()) -> Iterator[Journal]:
    """Yield every journal that can be read and counts, as `survey` finds them."""
    yield from survey(images).journals


def survey(images: tuple[str, ...] = ()) -> Survey:
    """Look for every journal on this host: of the state directory, and beside `images`.

    The two files of one change come as one journal.
    """
    return _Look(images).result


class _Look:
    """One look at all places."""

    def __init__(self, images: tuple[str, ...]) -> None:
        self.result = Survey()
        self.found: dict[str, Journal] = {}
        self.keys: list[bytes] = []
        self._homes: dict[Path, OpenDirectory | None] = {}
        self._look_inside()
        copies: dict[Path, tuple[str, ...]] = {}  # and the image files that they must be about
        elsewhere: dict[Path, str] = {}
        for image in images:
            for other in self._list(Path(image)):
                if is_elsewhere(other.name):
                    elsewhere[other] = image
                else:
                    copies[other] = (image,)
        asked = frozenset(copies)
        for journal in self.found.values():
            record = journal.record
            if record.home:
                copies.setdefault(home_path(record), (*record.images, *record.files))
        for path, about in copies.items():
            self._look_at_copy(path, about, asked=path in asked)
        for path, image in elsewhere.items():
            if run_of_journal(path.name) not in self.found:
                self._note_elsewhere(image, path)
        self.result.journals.extend(self.found.values())

    def _look_inside(self) -> None:
        """Read what the state directory has."""
        try:
            state = StateDirectory.proven()
            names = state.names() if state is not None else []
            self.keys = state.keys() if state is not None else []
        except OSError as error:
            self._note_unseen(state_directory(), error)
            return
        for name in names:
            path = Path(name)
            if state is None or not run_of_journal(path.name) or is_elsewhere(name):
                continue
            try:
                file = JournalFile.open(state, name)
                journal = None if file is None else Journal.parse(file, file.read())
            except RecordError as error:
                error.run = error.run or run_of_journal(path.name)
                self.result.unreadable.append(error)
            except DistrustedError:
                continue
            else:
                if journal is not None:
                    self.found.setdefault(journal.record.run, journal)

    def _look_at_copy(self, path: Path, about: tuple[str, ...], *, asked: bool) -> None:
        """Read what lies beside an image, and see what it counts."""
        home = self._home(path.parent)
        try:
            file = None if home is None else JournalFile.open(home, path.name)
            data = b"" if file is None else file.read()
            copy = None if file is None else Journal.parse(file, data)
        except RecordError as error:
            error.run = error.run or run_of_journal(path.name)
            error.files = (*about, *(error.files or ()))
            self.result.unreadable.append(error)
            return
        except DistrustedError as error:
            if asked:
                self.result.distrusted.append((path, str(error)))
            return
        if file is None:
            return
        run = run_of_journal(path.name)
        known = self.found.get(run)
        if copy is None:  # torn before it began
            if known is not None:
                known.take_torn(file, data)
        elif copy.record.run != run or home_path(copy.record).name != path.name:
            if asked:
                self.result.distrusted.append((path, "it is of another change, or image"))
        elif known is not None:
            if not known.take_copy(copy, self.keys) and asked:
                why = f"it contradicts {printable(known.paths[0])}"
                self.result.distrusted.append((path, why))
        elif copy.is_proven(self.keys):
            self.found[copy.record.run] = copy
        elif asked:
            self.result.unproven.append(copy)

    def _home(self, path: Path) -> OpenDirectory | None:
        """Open the directory of an image; None if it is not there, or cannot be looked at."""
        if path not in self._homes:
            self._homes[path] = None
            try:
                self._homes[path] = OpenDirectory.at(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                self._note_unseen(path, error)
        return self._homes[path]

    def _list(self, image: Path) -> list[Path]:
        """List what is a journal beside an image by its name, or says that one is elsewhere."""
        home = self._home(image.parent)
        try:
            names = home.names() if home is not None else []
        except OSError as error:
            self._note_unseen(image.parent, error)
            return []
        paths = [image.with_name(name) for name in names if is_beside(name, image.name)]
        if len(paths) > MOST:
            self.result.unreadable.append(
                RecordError(
                    f"beside {printable(image)} lie {len(paths)} files that are journals by their "
                    f"names, and no more than {MOST} are read",
                    standing=UNTOUCHED,
                    remedy=f"see whose they are: ls -l {printable(paths[0])}. Those that are "
                    "neither root's nor of the user who runs qmpblock are not ours: remove them",
                    files=(str(image),),
                )
            )
            return []
        return paths

    def _note_unseen(self, directory: Path, error: OSError) -> None:
        self.result.unreadable.append(
            RecordError(
                f"whether journals lie in {printable(directory)} cannot be seen: {error.strerror}",
                standing=UNTOUCHED,
            )
        )

    def _note_elsewhere(self, image: str, path: Path) -> None:
        """Note that the journal of a change to an image lies on another host."""
        home = self._home(path.parent)
        try:
            if home is not None:
                JournalFile.open(home, path.name)
        except DistrustedError as error:
            self.result.distrusted.append((path, str(error)))
            return
        except RecordError:
            pass  # that it is there says it all
        self.result.unreadable.append(
            RecordError(
                f"a change of {printable(image)} was not finished, and its journal is not here: "
                f"{printable(path)} says that it lies on the host where it was begun, or in "
                "another QMPBLOCK_STATE, because there was no room beside the image",
                standing=UNTOUCHED,
                remedy=f"run there: qmpblock recover {shell_words([image])}. If that host is lost: "
                "find out which of the images is the newest before any of them is used, then "
                "remove that file",
                path=path,
                run=run_of_journal(path.name),
                files=(image,),
            )
        )


def find(record: Record, vm: VMIdentity) -> Journal | None:
    """Find the journal of a change that a VM's lock tells of.

    Whoever is in that VM may have put the lock there. So it only says which journal to look for:
    one counts if it says just the same, and is of this very process.

    :param record: what the lock says.
    :param vm: the process, as we see it.
    :raise RecordError: it is there, and cannot be read, or not be proven to be of this process.
    """
    surveyed = survey()
    seen = {journal.record.run for journal in surveyed.journals}
    if record.home and record.run not in seen | {error.run for error in surveyed.unreadable}:
        # There may have been no room for it but beside the image: to be proven there.
        surveyed = survey((record.home,))
    for error in surveyed.unreadable:
        if error.run == record.run or error.path is None:
            raise error
    for journal in surveyed.journals:
        if journal.record == record:
            if bool(record.vm.pid) != bool(vm.pid) or (
                not vm.pid and record.vm.monitor != vm.monitor
            ):
                raise _begun_elsewhere(journal)
            return journal if is_same_process(record.vm, vm) else None
    for journal in surveyed.unproven:
        if journal.record.run == record.run:
            raise unproven(journal)
    return None


def is_same_process(one: VMIdentity, vm: VMIdentity) -> bool:
    """Whether a change was begun in this process, by what we saw then and see now.

    Over TCP no process is seen; there it must be the same address.
    """
    if not vm.pid:
        same = not one.pid and one.monitor == vm.monitor
    else:
        same = (one.pid, one.start, one.boot) == (vm.pid, vm.start, vm.boot)
    return same and one.uuid == vm.uuid


def _begun_elsewhere(journal: Journal) -> RecordError:
    monitor = printable(journal.record.vm.monitor)
    return RecordError(
        f"{journal.record.describe()} was begun by the monitor {monitor}; whether that is of this "
        "VM cannot be proven, so that its journal is not touched",
        standing=UNTOUCHED,
        remedy=f"run: qmpblock recover {shell_words([journal.record.vm.monitor])}",
        path=journal.paths[0],
        run=journal.record.run,
    )


def unproven(journal: Journal) -> RecordError:
    """Say of a journal beside an image what it claims, and how it can be acted upon."""
    path, record = journal.paths[0], journal.record
    home = printable(record.home)
    return RecordError(
        f"the journal {printable(path)} is not proven to be ours: no key of this installation "
        f"({printable(state_directory())}) made it. It says that {record.describe()}, from "
        f"{printable(record.top_file)} into {printable(record.base_file)}, was not finished and "
        + (
            f"that {printable(record.base_file)} is the newest image"
            if journal.pivoted
            else f"that {printable(record.top_file)} is the newest image"
        ),
        standing=UNTOUCHED,
        remedy=f"run on the host where it was begun: qmpblock recover {home}. Or bring that "
        f"host's key here, as {printable(state_directory() / 'NAME.key')}. Or, if nobody who is "
        "not trusted can write to the image's directory: qmpblock recover --believe-journal "
        f"{home}",
        path=path,
        run=record.run,
        files=(*record.images, *record.files),
    )


def is_of(error: RecordError, vm: VMIdentity) -> bool:
    """Whether a journal that cannot be read is of that QEMU, by its name."""
    return error.path is not None and is_of_vm(error.path.name, vm)
