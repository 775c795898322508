"""`python -m vpmoe`, and with it `torchrun -m vpmoe`."""

from vpmoe.cli.main import entry

if __name__ == "__main__":
    entry()
