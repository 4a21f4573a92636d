"""`python -m nybble` is `nybble`."""

from nybble.cli import app

if __name__ == "__main__":
    app(prog_name="nybble")
