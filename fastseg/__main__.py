"""``python -m fastseg``: the command line, also for torchrun."""

from fastseg.cli import main

if __name__ == "__main__":  # demo's memory measurement starts processes that import this module
    main()
