"""`python -m contrec_fast` is the command `contrec`."""

from contrec_fast.cli import app

if __name__ == "__main__":
    app(prog_name="contrec")
