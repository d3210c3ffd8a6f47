"""``python -m memkern``: the ``memkern`` command."""

from memkern.cli import main

if __name__ == "__main__":
    main(prog_name="memkern")
