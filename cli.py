"""What every command line here shares: one-line errors with exit status 2, and files of prompts."""
import argparse
import errno
import inspect
import io
import json
import os
import signal
import sys
import time
import zlib
from array import array
from pathlib import Path

from tqdm import tqdm

KEYS = ("prompt", "caption", "text", "TEXT")               # where a JSON line may hold its prompt; LAION's own is TEXT

PREDICTIONS = ("velocity", "epsilon")
PREDICTION = ("what --model's U-Net predicts, for a folder or file that does not say so; "
              "Stable Diffusion's: epsilon (noise)")


class UserError(ValueError):
    """Something the user can mend. The message is one line that names the file or flag, and the mend."""


class Parser(argparse.ArgumentParser):
    """argparse with the launch lines of the script's docstring kept, and errors of one line."""

    def __init__(self, doc=None, **kwargs):
        super().__init__(description=doc and inspect.cleandoc(doc), allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the flags)\n")


def folder(text):
    """An argparse type: a folder's name. An empty one, as an unset variable of the shell leaves it,
    would be the current folder or "/"."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; name a folder")
    return text


def writable(path):
    """Raises OSError if no file can be written there: call it before the work, not after it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    wrong = errno.EISDIR if path.is_dir() else 0 if os.access(path.parent, os.W_OK) else errno.EACCES
    if wrong:
        raise OSError(wrong, os.strerror(wrong), str(path))


def another(out, model):
    """Raises UserError if the trained model would overwrite the model that it starts from, or as `fresh` does."""
    if Path(out).resolve() == Path(model).resolve():
        raise UserError(f"--out {out} is --model itself, which would be lost; name another folder")
    fresh(out)


def fresh(out, file="instaflow.json"):
    """Raises UserError if a trained model (its `file`) is there and its training/ is not, as with the shipped ones:
    it would be replaced."""
    if (Path(out) / file).exists() and not (Path(out) / "training").exists():
        raise UserError(f"--out {out} holds a trained model, which would be lost; name another folder")


def positive(text):
    """An argparse type: a whole number of at least 1."""
    value = int(text) if text.removeprefix("+").isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def seed(text):
    """An argparse type: a whole number from 0 (numpy's generators take no other) to 2^63 - 1 (nor does a tensor)."""
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0"
                                         + " and below 2^63" * (value > 0))
    return value


def number(low=-float("inf"), high=float("inf")):
    """An argparse type: a finite number from low to high."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low <= value <= high and abs(value) < float("inf")):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low:g} to {high:g}")
        return value
    return parse


def device(text):
    """An argparse type: a device that torch can compute on here.
    (No GPU is touched: under torchrun each process has its own.)"""
    import torch
    try:
        kind = torch.device(text)
        if kind.type != "cuda":
            torch.zeros(1, device=kind).item()             # .item(): "meta" would pass without
        elif (kind.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({str(error).splitlines()[0][:150]})") from None
    return text


def run(main):
    """Call `main()`; what the user can mend becomes one line on stderr and exit status 2, never a traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        # a file's name that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        fail(error)
    except BrokenPipeError:
        sys.exit(0)                                        # the reader of our output (`| head`) has seen enough
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise                                          # not about a user's file: a bug, so show the traceback
        mend = ("free some space and run the same line again" if error.errno == errno.ENOSPC
                else "check the path and its permissions")
        fail(f"{error.filename or 'disk'}: {error.strerror}; {mend}")
    except (RuntimeError, MemoryError) as error:
        if "gloo" in str(error).lower() or type(error).__name__ in ("DistBackendError", "DistNetworkError"):
            fail("another process of this run has ended; "
                 f"its own message says why ({str(error).splitlines()[0][:150]})")
        if "out of memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        fail("out of memory; give a smaller --batch, smaller pictures, or, in training, --accumulate or --checkpoint")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message):
    # the first process reports what all ran into, and torchrun ends the others meanwhile
    if int(os.environ.get("RANK", 0)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    # not at the end of a progress bar
    tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def read_prompts(path):
    """The prompts of a text file, one a line, blank lines skipped -> list[str]. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt file; write one prompt a line into it") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a text file with one prompt a line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8, one prompt a line") from None
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one prompt a line into it")
    return prompts


class Prompts:
    """The prompts of a text file, one a line, or of a .jsonl file, one JSON string or object with one of KEYS a line;
    blank ones are skipped. len() and prompts[i] work; of each line only its offset is kept (8 bytes), as there may be
    millions. crc: CRC-32 of all of them. A bad line anywhere raises UserError, before work begins."""

    def __init__(self, path):
        self.path, self.crc, self.starts, place = Path(path), 0, array("q"), 0
        try:
            self.file = open(path, "rb")
            if not self.file.seekable():                   # a pipe
                self.file = io.BytesIO(self.file.read())
        except FileNotFoundError:
            raise UserError(f"{path}: no such prompt file; write one prompt a line into it") from None
        except IsADirectoryError:
            raise UserError(f"{path} is a folder; name a text file with one prompt a line") from None
        for number, line in enumerate(self.file, 1):
            prompt = self._read(line, number)
            if prompt:
                self.crc = zlib.crc32(b"\n" * bool(self.starts) + prompt.encode(), self.crc)
                self.starts.append(place)
            place += len(line)
        if not self.starts:
            raise UserError(f"{path} holds no prompt; write one prompt a line into it")

    def _read(self, line, number):
        try:
            text = line.decode("utf-8-sig").strip()
            if not text or self.path.suffix not in (".jsonl", ".json", ".ndjson"):
                return text
            value = json.loads(text)
            text = " ".join((value if isinstance(value, str) else next(value[k] for k in KEYS if k in value)).split())
            text.encode()                                  # JSON can hold a lone surrogate
            return text
        except UnicodeError:
            raise UserError(f"{self.path}, line {number}: not UTF-8 text; "
                            "save it as UTF-8, one prompt a line") from None
        except (ValueError, TypeError, AttributeError, StopIteration, RecursionError):
            raise UserError(f"{self.path}, line {number}: no JSON string, and no object with a string under "
                            f"{', '.join(KEYS)}; write one a line") from None

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        self.file.seek(self.starts[i])
        return self._read(self.file.readline(), i + 1)
