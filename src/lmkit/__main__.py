"""`python -m lmkit`: the command line, where the `lmkit` script is not on the path."""

from lmkit.cli.commands import main

if __name__ == "__main__":
    main()
