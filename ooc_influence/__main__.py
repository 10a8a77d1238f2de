"""``python -m ooc_influence``: the command line."""

from ooc_influence.cli.main import main

if __name__ == "__main__":
    main()
