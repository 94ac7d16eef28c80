# The start of orchard.pyz. Older Pythons read this file, too, to say what is needed.
#
# The archive unpacks itself once, into a directory named by its contents in Orchard's own directory, and runs from there:
# Python keeps compiled modules only of files, and the archive may be exchanged while processes run that still import.
#
# Each process that runs from such a directory holds a lock of it until its end. When another one is unpacked, those that are
# not in use are removed, but for the last one, to which an upgrade may be rolled back.
#
# $ORCHARD_PYZ_DIRECTORY is another place for these directories, which all users can read: a worker that starts as root and
# becomes another user must not run as root what that user can change.

import os
import sys

if sys.version_info < (3, 11):
    sys.stderr.write(
        "orchard.pyz needs Python 3.11 or newer, this is %d.%d; run it by a newer one: python3.13 orchard.pyz\n"
        % sys.version_info[:2]
    )
    sys.exit(2)

SHARED = os.environ.get("ORCHARD_PYZ_DIRECTORY")
# The length of the names of directories.
DIGITS = 32
# Ends the name of a directory that is being removed.
GONE = ".removed"
# Attempts while another process is about to remove the directory, which takes it a moment.
TRIES = 100
TRY_SECONDS = 0.01


def lock(directory, exclusive=False):
    """Lock a directory until the descriptor that is returned is closed; None where there are no such locks.

    Raises BlockingIOError or FileNotFoundError when another process uses or removes it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    os.close(descriptor)
    raise FileNotFoundError(directory)


def unpack(file, base, directory):
    """Make a directory with the contents of an archive."""
    import shutil
    import tempfile
    import zipfile

    before = os.umask(0o022 if SHARED else 0o077)
    draft = ""
    try:
        os.makedirs(base, exist_ok=True)
        draft = tempfile.mkdtemp(dir=base)
        if SHARED:
            os.chmod(draft, 0o755)
        # The lock goes with the directory to its new name.
        lock(draft)
        with zipfile.ZipFile(file) as contents:
            contents.extractall(draft)
        # Another start may have been faster.
        try:
            os.rename(draft, directory)
        except OSError:
            if not os.path.isdir(directory):
                raise
    finally:
        os.umask(before)
        shutil.rmtree(draft, ignore_errors=True)


def remove_unused(base, directory):
    """Remove directories that no process uses, except `directory` and the newest other one. Also incomplete ones."""
    import shutil

    others = [os.path.join(base, name) for name in os.listdir(base)]
    made = [path for path in others if len(os.path.basename(path)) == DIGITS and path != directory]
    kept = max(made, key=os.path.getmtime, default=None)
    for path in others:
        if path in (directory, kept):
            continue
        try:
            descriptor = lock(path, exclusive=True)
            if descriptor is not None:
                # Renamed first, so that a start cannot find it half removed.
                gone = path if path.endswith(GONE) else path + GONE
                os.rename(path, gone)
                shutil.rmtree(gone, ignore_errors=True)
                os.close(descriptor)
        except OSError:
            # The directory is in use, or another process removes it.
            pass


def home_directory():
    """Return $ORCHARD_HOME or the home directory; root's own one in place of another user's, which sudo may leave."""
    home = os.environ.get("ORCHARD_HOME") or os.path.expanduser("~")
    if hasattr(os, "geteuid") and os.geteuid() == 0 and os.path.isdir(home) and os.stat(home).st_uid != 0:
        return os.path.expanduser("~root")
    return home


def unpacked(archive):
    """Return the directory with the contents of the archive, which is made if it is not there, and stays locked."""
    import hashlib
    import time

    base = SHARED or os.path.join(home_directory(), ".orchard", "pyz")
    is_new = False
    with open(archive, "rb") as file:
        directory = os.path.join(base, hashlib.sha256(file.read()).hexdigest()[:DIGITS])
        for left in reversed(range(TRIES)):
            try:
                if not os.path.isdir(directory):
                    unpack(file, base, directory)
                    is_new = True
                lock(directory)
                break
            except (BlockingIOError, FileNotFoundError):
                if not left:
                    raise
                time.sleep(TRY_SECONDS)
    if is_new:
        remove_unused(base, directory)
    return directory


def main():
    try:
        directory = unpacked(sys.path[0])
    except OSError as error:
        sys.stderr.write(
            "orchard.pyz cannot unpack itself: %s; set ORCHARD_HOME to a directory that this user may write to\n"
            % error
        )
        return 1
    sys.path[0] = directory
    # So that the processes that Orchard starts find the modules, too.
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != directory]
    os.environ["PYTHONPATH"] = os.pathsep.join([directory] + others)
    from orchard.__main__ import main as run

    return run()


sys.exit(main())
