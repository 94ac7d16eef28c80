# The start of orchard.pyz. Older Pythons read this file, too, to say what is needed.
#
# The archive unpacks itself once, into a directory named by its contents in Orchard's own directory, and runs from there:
# Python keeps compiled modules only of files, and the archive may be exchanged while processes run that still import.

import os
import sys

if sys.version_info < (3, 11):
    sys.stderr.write(
        "orchard.pyz needs Python 3.11 or newer, this is %d.%d; run it by a newer one: python3.13 orchard.pyz\n"
        % sys.version_info[:2]
    )
    sys.exit(2)


def unpacked(archive):
    """Return the directory with the contents of the archive, which is made if it is not there."""
    import hashlib
    import shutil
    import tempfile
    import zipfile

    base = os.path.join(os.environ.get("ORCHARD_HOME") or os.path.expanduser("~"), ".orchard", "pyz")
    with open(archive, "rb") as file:
        directory = os.path.join(base, hashlib.sha256(file.read()).hexdigest()[:32])
        if not os.path.isdir(directory):
            os.makedirs(base, mode=0o700, exist_ok=True)
            draft = tempfile.mkdtemp(dir=base)
            try:
                with zipfile.ZipFile(file) as contents:
                    contents.extractall(draft)
                # Another start may have been faster.
                try:
                    os.rename(draft, directory)
                except OSError:
                    if not os.path.isdir(directory):
                        raise
            finally:
                shutil.rmtree(draft, ignore_errors=True)
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
    # For the processes that Orchard starts.
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != directory]
    os.environ["PYTHONPATH"] = os.pathsep.join([directory] + others)
    from orchard.__main__ import main as run

    return run()


sys.exit(main())
