"""What every command line here shares: one-line errors with exit status 2, and files of prompts."""
import argparse
import errno
import sys
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend. The message is one line that names the file or flag, and the mend."""


class Parser(argparse.ArgumentParser):
    """argparse with the launch lines of the script's docstring kept, and errors of one line."""

    def __init__(self, doc=None, **kwargs):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def positive(text):
    """An argparse type: a whole number of at least 1."""
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def seed(text):
    """An argparse type: a whole number of at least 0 (numpy's generators take no other)."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def run(main):
    """Call `main()`; what the user can mend becomes one line on stderr and exit status 2, never a traceback."""
    try:
        main()
    except UserError as error:
        fail(error)
    except BrokenPipeError:
        sys.exit(0)                                        # the reader of our output (`| head`) has seen enough
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise                                          # not a file of the user's: a defect, so show it whole
        mend = "free some space and run the same line again: it goes on where it was" if error.errno == errno.ENOSPC else "check the path and its permissions"
        fail(f"{error.filename or 'disk'}: {error.strerror}; {mend}")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message):
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def read_prompts(path):
    """The prompts of a text file, one a line, blank lines skipped -> list[str]. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt file; write one prompt a line into it") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a text file with one prompt a line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8, one prompt a line") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one prompt a line into it")
    return prompts
